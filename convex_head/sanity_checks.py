"""After the attacks: signs that a robust accuracy was not earned (Carlini et al. 2019, section 4).

black_box_wins           a black-box attack broke points that white-box attacks had left: their gradients are blind
attack_outside           an attack returned points outside the threat set; they count as not broken
unbounded_eps            gradient descent does not break every probe when any image is allowed
accuracy_rises_with_eps  it breaks fewer probes in the four times larger ball than were broken at eps
stateful                 the weights, or the clean predictions, are not what they were before the attacks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from convex_head.attacks.base import Attack
from convex_head.attacks.descent import descend, random_start
from convex_head.attacks.isolation import isolated
from convex_head.attacks.view import ModelView, attack_shape, margins
from convex_head.model_checks import PROBE
from convex_head.resume import StageProgress
from convex_head.threat import ThreatModel

# AutoAttack warns from 0.2 % on; on small samples one lucky point is no sign.
_BLACK_BOX_SHARE, _BLACK_BOX_POINTS = 0.002, 2
_STEPS = 40
_LARGER = 4.0
# Share of probes that may survive an unbounded attack of a few dozen steps.
_SURVIVORS = 0.1
_ALL_IMAGES = ThreatModel("Linf", 1.0)


def check_stages(stages: Sequence[tuple[Attack, StageProgress]], n: int) -> dict[str, str]:
    """Flags from the counts of the stages, in the order in which they ran; flag -> one sentence."""
    flags: dict[str, str] = {}
    seen_white = False
    for stage, done in stages:
        broken = done.row.count("0")
        if stage.white_box:
            seen_white = True
        elif seen_white and broken >= max(_BLACK_BOX_POINTS, _BLACK_BOX_SHARE * n):
            flags["black_box_wins"] = f"{stage.name} broke {broken} points that white-box attacks had left"
        if done.outside and not stage.minimum_norm:
            flags["attack_outside"] = f"{stage.name} returned {done.outside} points outside the threat set"
    return flags


def check_larger_eps(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    robust: Tensor,
    threat: ThreatModel,
    *,
    scale: float,
    seed: int,
    device: torch.device,
) -> dict[str, str]:
    """Gradient descent on the margin at four times eps and without a bound.

    Args:
        model: images (b, ...) to logits, in eval mode on ``device``.
        images, labels: points classified rightly without attack; the first few dozen are probed.
        robust: (n,) bool, not broken by any attack at eps.
        threat: the threat model of the evaluation.
        scale: factor of the logits.
        seed: seed of the random starts.

    Returns:
        flag -> one sentence.
    """
    if len(images) == 0:
        return {}
    shape = tuple(images.shape[1:])
    view = ModelView(model, shape, scale=scale)
    probes = images[:PROBE].reshape(-1, *attack_shape(shape)).to(device)
    y = labels[:PROBE].to(device)
    flags: dict[str, str] = {}
    with isolated(model, seed):
        if threat.eps > 0:
            at_eps = int(robust[:PROBE].sum())
            larger = _survivors(view, probes, y, ThreatModel(threat.norm, _LARGER * threat.eps), seed)
            if larger > at_eps + max(1, _SURVIVORS * len(y)):
                flags["accuracy_rises_with_eps"] = (
                    f"{at_eps} of {len(y)} probes survive the attacks at eps, {larger} at {_LARGER:g} eps"
                )
        left = _survivors(view, probes, y, _ALL_IMAGES, seed)
        if left > _SURVIVORS * len(y):
            flags["unbounded_eps"] = f"{left} of {len(y)} probes survive gradient descent over all images"
    return flags


def _survivors(view: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, seed: int) -> int:
    """How many points neither a start at the image nor one at random leads over the boundary."""
    generator = torch.Generator().manual_seed(seed)
    for start_at_random in (False, True):
        start = random_start(images, threat, generator) if start_at_random else images

        def margin(points: Tensor, y: Tensor = labels) -> Tensor:
            return margins(view(points), y)

        _, value = descend(margin, images, start, threat, steps=_STEPS, stop_below=0.0)
        left = ~(value < 0)
        images, labels = images[left], labels[left]
        if len(labels) == 0:
            return 0
    return len(labels)


def check_unchanged(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """The flag ``stateful`` if a fingerprint or the clean predictions changed during the attacks."""
    changed = [name for name, value in before.items() if after[name] != value]
    return {"stateful": f"the {' and the '.join(changed)} changed during the attacks"} if changed else {}
