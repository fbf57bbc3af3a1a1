"""From a backbone, training data and a pixel threat to a spliced robust model in one call.

Pixel eps and feature radius are not linked by theory, so ``radius="auto"`` measures: it follows a warm-started path
of feature radii, attacks the spliced model end to end at the pixel eps on a validation split taken from the
*training* data, and keeps the radius with the best robust validation accuracy. The test set plays no part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convex_head.baselines.pgd import pgd_accuracy
from convex_head.data import as_pair
from convex_head.errors import ConvergenceWarning, InputError, RadiusError
from convex_head.features import extract_features
from convex_head.head import ConvexRobustHead
from convex_head.problems.base import Network
from convex_head.splice import SplicedModel, replace_head
from convex_head.threat import ThreatModel
from convex_head.validation import check_radius, check_reg

RADII = (0.25, 0.5, 1.0, 2.0)
REGS = (0.1, 0.03)
_LOOSE = 5.0


@dataclass(frozen=True)
class Candidate:
    """One head of the path.

    Attributes:
        radius, reg: its settings.
        clean, robust: accuracy on the validation images, without attack and under the validation attack.
        gap: its relative duality gap.
    """

    radius: float
    reg: float
    clean: float
    robust: float
    gap: float


def robustify(
    backbone: nn.Module,
    train_data: Any,
    threat: ThreatModel,
    *,
    radius: float | str = "auto",
    reg: float | str = "auto",
    at: str | None = None,
    radii: Sequence[float] = RADII,
    regs: Sequence[float] = REGS,
    validation_share: float = 0.2,
    tol: float = 1e-2,
    max_seconds: float | None = None,
    batch_size: int = 256,
    seed: int = 0,
    cache_dir: Any = None,
    progress: Callable[[str], Any] | None = None,
    **head_settings: Any,
) -> SplicedModel:
    """Extract features, choose radius and regularisation, fit a certified head on all of them, splice.

    Args:
        backbone: images in [0, 1] to logits; copied, never changed.
        train_data: a dataset name, an (images, labels) pair, a Dataset or a DataLoader. Training data only.
        threat: the pixel threat; Linf or L2 for "auto".
        radius: feature radius in standardised units, or "auto" to choose among ``radii``.
        reg: regularisation weight, or "auto" to choose among ``regs``.
        at: node where the head goes; the classifier if None (see :func:`~convex_head.splice.replace_head`).
        validation_share: share of the training data that candidates are compared on and not fitted on.
        tol: relative gap of the head that is returned; candidates stop at five times it.
        max_seconds: limit of one fit.
        batch_size: for feature extraction.
        seed: of the split and of the fits.
        cache_dir: folder of the feature cache, or None.
        progress: called with one line of text a step.
        **head_settings: passed to :class:`~convex_head.head.ConvexRobustHead` (loss, coefficients, ...).

    Returns:
        The spliced model; ``model.path_`` holds every :class:`Candidate`, ``model.head.result_`` the certificate.

    Raises:
        RadiusError, RegularisationError: a candidate is not admissible.
        InputError: ``validation_share`` is not inside (0, 1), or leaves no example on a side.
    """
    say = progress or (lambda line: None)
    images, labels = as_pair(train_data)
    num_classes = int(labels.max()) + 1
    path_radii = _candidates("radius", radius, radii)
    path_regs = _candidates("reg", reg, regs)
    say("extracting features")
    probe = replace_head(backbone, nn.Identity(), at=at, example_input=images[:2])
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    features = extract_features(probe.backbone, images, batch_size=batch_size, cache_dir=cache_dir).to(device)

    def fit(r: float, b: float, rows: Tensor, aim: float, start: Network | None) -> ConvexRobustHead:
        head = ConvexRobustHead(features.shape[1], num_classes, radius=r, reg=b, **head_settings).to(device)
        return head.fit(
            features[rows], labels[rows], tol=aim, max_seconds=max_seconds, progress=False, seed=seed, start=start
        )

    everything = torch.arange(len(labels))
    start, path = None, []
    if len(path_radii) * len(path_regs) > 1:
        rest, held_out = _split(len(labels), validation_share, seed)
        heads = []
        for b in path_regs:
            start = None
            for r in path_radii:
                with warnings.catch_warnings():
                    # Candidates may stop early; their gap stands in the path.
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    head = fit(r, b, rest, _LOOSE * tol, start)
                start = head.network()
                model = replace_head(backbone, head, at=at, example_input=images[:2])
                clean, robust = pgd_accuracy(model, images[held_out].to(device), labels[held_out].to(device), threat)
                assert head.result_ is not None
                path.append(Candidate(r, b, clean, robust, head.result_.gap))
                heads.append(head)
                say(f"radius {r:g}, reg {b:g}: validation clean {clean:.3f}, robust {robust:.3f}")
        best = max(range(len(path)), key=lambda i: (path[i].robust, path[i].clean))
        chosen_radius, chosen_reg, start = path[best].radius, path[best].reg, heads[best].network()
    else:
        chosen_radius, chosen_reg = path_radii[0], path_regs[0]
    say(f"fitting radius {chosen_radius:g}, reg {chosen_reg:g} on all {len(labels)} examples")
    head = fit(chosen_radius, chosen_reg, everything, tol, start)
    model = replace_head(backbone, head, at=at, example_input=images[:2])
    model.path_ = tuple(path)
    return model


def _candidates(name: str, value: float | str, auto: Sequence[float]) -> list[float]:
    check = check_radius if name == "radius" else check_reg
    if isinstance(value, str):
        if value != "auto":
            raise RadiusError(f"{name} must be a number or 'auto'; found {value!r}.")
        if not auto:
            raise InputError(f"{name}='auto' needs at least one candidate; found none. Pass {name}s or a number.")
        return [check(v) for v in auto]
    return [check(value)]


def _split(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Random (rest, held out) rows."""
    if not 0 < share < 1 or not 0 < int(share * n) < n:
        raise InputError(
            f"validation_share must leave examples on both sides; found {share!r} of {n} examples. Use for example 0.2."
        )
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held_out = int(share * n)
    return shuffled[held_out:], shuffled[:held_out]
