"""What an attack is: a search inside the threat set, whose success is measured again by the base class.

An attack implements :meth:`Attack.perturb`. :meth:`Attack.run` isolates it from the process and the model,
then measures what came back itself: shape, finiteness, distance, range, prediction. An attack can
therefore claim nothing; a point outside the threat set counts as not broken, whatever the model says there.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convex_head.attacks.isolation import isolated
from convex_head.attacks.view import ModelView, is_right
from convex_head.errors import AttackContractError, AttackError
from convex_head.threat import NORMS, ThreatModel

# Room for float32 rounding in an attack's own projection; measured in tests/test_attacks.py.
_RELATIVE_SLACK = 1e-4
_ABSOLUTE_SLACK = 1e-6


@dataclass(frozen=True)
class AttackResult:
    """One measured batch.

    Attributes:
        images: (n, c, h, w) what the attack returned, clamped to [0, 1]; the clean image where that
            was not inside the threat set.
        broken: (n,) bool, ``images`` is inside the threat set and classified wrongly.
        outside: points returned outside the threat set.
        forwards, backwards: examples sent through the model.
        seconds: wall clock, device synchronised.
    """

    images: Tensor
    broken: Tensor
    outside: int
    forwards: int
    backwards: int
    seconds: float


class Attack(ABC):
    """One search for adversarial examples.

    Attributes:
        name: how users and records call it.
        cost: forwards + backwards for an example that is never broken; cheap attacks run first.
        white_box: uses gradients. A black-box attack that breaks what white-box ones did not is a flag.
        minimum_norm: looks for the nearest adversarial example and may end beyond eps without fault.
        norms: norms that it can search.
    """

    name: str
    cost: float = 100.0
    white_box: bool = True
    minimum_norm: bool = False
    norms: tuple[str, ...] = NORMS

    @abstractmethod
    def perturb(self, model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
        """Search around ``images``.

        Args:
            model: (n, c, h, w) images in [0, 1] to (n, classes) logits, differentiable.
            images: (n, c, h, w) float32 clean images, all classified rightly.
            labels: (n,) int64.
            threat: norm and eps.
            seed: seed of every random choice; the global generators already start from it.

        Returns:
            (n, c, h, w) candidates; success is measured by the caller.
        """

    def stages(self, model: ModelView, num_classes: int, threat: ThreatModel) -> tuple[Attack, ...]:
        """The attacks to run one after the other on what survives; a simple attack is its own stage.

        Called for every attack before the first one runs, so that a misfit costs no hours.

        Raises:
            AttackError: the attack does not fit this model, number of classes or threat.
        """
        self.check_norm(threat)
        return (self,)

    def settings(self) -> dict[str, Any]:
        """What identifies this attack beyond its name, as plain JSON: kept in records, compared on resume."""
        return {}

    def check_norm(self, threat: ThreatModel) -> None:
        """Raise :class:`AttackError` unless the attack searches in ``threat.norm``."""
        if threat.norm not in self.norms:
            raise AttackError(
                f"{self.name} searches in {', '.join(self.norms)}; the threat model is {threat}. "
                "Choose another attack or another norm."
            )

    def run(self, model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int) -> AttackResult:
        """Run :meth:`perturb` in isolation and measure its result.

        Args: as :meth:`perturb`.

        Raises:
            AttackContractError: the result is not a tensor of the shape of ``images``.
        """
        before = (model.passes.forwards, model.passes.backwards)
        start = _now(images.device)
        with isolated(model, seed):
            # eps = 0 leaves nothing to search, and some libraries divide by it.
            candidate = (
                self.perturb(model, images.clone(), labels.clone(), threat, seed=seed) if threat.eps > 0 else images
            )
            measured, broken, outside = self._measure(model, images, labels, candidate, threat)
        return AttackResult(
            images=measured,
            broken=broken,
            outside=outside,
            forwards=model.passes.forwards - before[0],
            backwards=model.passes.backwards - before[1],
            seconds=_now(images.device) - start,
        )

    def _measure(
        self, model: ModelView, images: Tensor, labels: Tensor, candidate: Tensor, threat: ThreatModel
    ) -> tuple[Tensor, Tensor, int]:
        if not isinstance(candidate, Tensor) or candidate.shape != images.shape:
            found = tuple(candidate.shape) if isinstance(candidate, Tensor) else type(candidate).__name__
            raise AttackContractError(
                f"An attack returns a tensor of shape {tuple(images.shape)}; {self.name} returned {found}. "
                "Correct its perturb()."
            )
        candidate = candidate.detach().to(images.device, images.dtype)
        inside = within(images, candidate, threat)
        columns = (-1, *(1 for _ in images.shape[1:]))
        measured = torch.where(inside.view(columns), candidate, images).clamp(0.0, 1.0)
        return measured, inside & ~is_right(model, measured, labels), int((~inside).sum())


def run_stages(
    attack: Attack, model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int
) -> Tensor:
    """(n, c, h, w): every stage of ``attack`` on what the stages before it left; clean where none succeeds."""
    with torch.no_grad():
        num_classes = model(images[:1]).shape[1]
    found, left = images.clone(), torch.arange(len(images), device=images.device)
    for stage in attack.stages(model, num_classes, threat):
        result = stage.run(model, images[left], labels[left], threat, seed=seed)
        found[left[result.broken]] = result.images[result.broken]
        left = left[~result.broken]
        if len(left) == 0:
            break
    return found


def within(images: Tensor, candidate: Tensor, threat: ThreatModel) -> Tensor:
    """(n,) bool: finite, in [0, 1] and within eps of ``images``, up to float32 rounding."""
    finite = torch.isfinite(candidate).flatten(1).all(dim=1)
    flat = candidate.flatten(1)
    in_range = (flat.amin(dim=1) >= -_ABSOLUTE_SLACK) & (flat.amax(dim=1) <= 1 + _ABSOLUTE_SLACK)
    distance = threat.distance(images.double(), candidate.double())
    return finite & in_range & (distance <= threat.eps * (1 + _RELATIVE_SLACK) + _ABSOLUTE_SLACK)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
