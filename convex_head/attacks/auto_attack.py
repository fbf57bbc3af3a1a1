"""AutoAttack (Croce and Hein 2020) through pyautoattack, right for every number of classes and every shape.

The components are run one by one, so that the evaluation can stop and go on between batches; with the same
points, seed and batch size the result is that of ``AutoAttack.run_standard_evaluation``, which also
starts every batch of every component from the same seed. What is run:

    classes  standard
    2        apgd-ce (5 restarts), fab, fab-t (1 target), square
    3        apgd-ce, apgd-dlr (5 restarts), fab, fab-t (2 targets), square
    4 .. 9   apgd-ce, apgd-t, fab-t (classes - 1 targets), square
    >= 10    apgd-ce, apgd-t, fab-t (9 targets), square: AutoAttack's own standard

because the targeted DLR loss needs four logits and AutoAttack indexes out of range below ten classes.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from convex_head.attacks.base import Attack, run_stages
from convex_head.attacks.registry import add_factory
from convex_head.attacks.view import ModelView
from convex_head.errors import AttackError, MissingExtraError
from convex_head.threat import ThreatModel

_VERSIONS = ("standard", "plus", "rand")
_PLUS = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
_LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
# Windows of Square in L2 and L1 are fifths of the height.
_SQUARE_LEAST_SIDE = 5


def autoattack_package() -> ModuleType:
    """pyautoattack, or AutoAttack's git version where only that is installed.

    Raises:
        MissingExtraError: neither is installed.
    """
    for name in ("pyautoattack", "autoattack"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise MissingExtraError(
        "AutoAttack is not installed; run: pip install '.[bench]' in the checkout (it brings pyautoattack)."
    )


class Component(Attack):
    """One component of AutoAttack.

    Args:
        kind: "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t" or "square".
        restarts: random restarts (a target); AutoAttack's standard uses 1, for apgd-ce in L1 it uses 5.
        targets: target classes of apgd-t and fab-t; None for all that are there, 9 at most.
        eot: gradients averaged a step, for random models.
        queries: model queries of square.
    """

    def __init__(
        self,
        kind: str,
        *,
        restarts: int | None = None,
        targets: int | None = None,
        eot: int = 1,
        queries: int = 5000,
    ) -> None:
        self.name = self.kind = kind
        self.restarts, self.targets, self.eot, self.queries = restarts, targets, eot, queries
        self.white_box = kind != "square"
        goals = 9 if targets is None else targets
        runs = 1 if restarts is None else restarts
        self.cost = {
            "apgd-ce": 212.0 * runs * eot,
            "apgd-dlr": 212.0 * runs * eot,
            "apgd-t": 204.0 * goals * runs,
            "fab": 1000.0 * runs,
            "fab-t": 304.0 * goals * runs,
            "square": 1.0 + queries,
        }[kind]

    def stages(self, model: ModelView, num_classes: int, threat: ThreatModel) -> tuple[Attack, ...]:
        self.check_norm(threat)
        least = _LEAST_CLASSES.get(self.kind, 2)
        if num_classes < least:
            raise AttackError(
                f"{self.kind} needs at least {least} classes, the model has {num_classes}. "
                "Use 'autoattack', which picks the components that fit."
            )
        if self.kind not in ("apgd-t", "fab-t"):
            return (self,)
        # AutoAttack aims at 5 classes in L1 with apgd-t, at 9 otherwise.
        usual = 5 if threat.norm == "L1" and self.kind == "apgd-t" else 9
        fitted = Component(
            self.kind,
            restarts=self.restarts,
            targets=min(usual if self.targets is None else self.targets, num_classes - 1),
            eot=self.eot,
        )
        fitted.name = self.name
        return (fitted,)

    def settings(self) -> dict[str, Any]:
        chosen = {"restarts": self.restarts, "targets": self.targets}
        kept: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
        if self.eot != 1:
            kept["eot"] = self.eot
        if self.kind == "square":
            kept["queries"] = self.queries
        return kept

    def perturb(self, model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
        if self.kind == "square":
            return self._square(model, images, labels, threat, seed)
        return self._searcher(model, images.device, threat, seed).perturb(images, labels)

    def _searcher(self, model: Callable[[Tensor], Tensor], device: torch.device, threat: ThreatModel, seed: int) -> Any:
        """AutoAttack's own object for this component, set up as its standard version sets it up."""
        # Its warnings about zero gradients are flags of the record here.
        logging.getLogger("auto-attack").setLevel(logging.CRITICAL)
        adversary = autoattack_package().AutoAttack(
            model, norm=threat.norm, eps=threat.eps, seed=seed, version="standard", device=str(device)
        )
        if self.kind == "square":
            adversary.square.n_queries = self.queries
            searcher = adversary.square
        elif self.kind in ("apgd-ce", "apgd-dlr"):
            searcher = adversary.apgd
            searcher.loss = self.kind.removeprefix("apgd-")
        elif self.kind == "apgd-t":
            searcher = adversary.apgd_targeted
            searcher.n_target_classes = self.targets
        else:
            searcher = adversary.fab
            searcher.targeted = self.kind == "fab-t"
            searcher.n_target_classes = self.targets
        if self.eot != 1:
            searcher.eot_iter = self.eot
        if self.restarts is not None:
            searcher.n_restarts = self.restarts
        searcher.seed = seed
        return searcher

    def _square(self, model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        """Square on images that are too thin for its L2 and L1 windows is run on a folded, padded copy.

        Padding only wastes budget: a perturbation of the padded image restricts to one of no larger norm.
        """
        shape = images.shape[1:]
        if threat.norm == "Linf" or min(shape[1:]) >= _SQUARE_LEAST_SIDE:
            return self._searcher(model, images.device, threat, seed).perturb(images, labels)
        size = math.prod(shape)
        side = max(_SQUARE_LEAST_SIDE, math.isqrt(size - 1) + 1)

        def fold(batch: Tensor) -> Tensor:
            flat = batch.flatten(1)
            return torch.nn.functional.pad(flat, (0, side * side - size)).view(-1, 1, side, side)

        def unfold(batch: Tensor) -> Tensor:
            return batch.flatten(1)[:, :size].reshape(-1, *shape)

        searcher = self._searcher(lambda folded: model(unfold(folded)), images.device, threat, seed)
        return unfold(searcher.perturb(fold(images), labels))


class AutoAttack(Attack):
    """The ensemble.

    Args:
        version: "standard", "plus" or "rand" (for random models; averages 20 gradients a step).
    """

    def __init__(self, version: str = "standard") -> None:
        if version not in _VERSIONS:
            raise AttackError(f"AutoAttack has the versions {', '.join(_VERSIONS)}; found {version!r}.")
        self.version = version
        self.name = "autoattack" if version == "standard" else f"autoattack-{version}"
        self.cost = {"standard": 9798.0, "plus": 16000.0, "rand": 8500.0}[version]

    def stages(self, model: ModelView, num_classes: int, threat: ThreatModel) -> tuple[Attack, ...]:
        self.check_norm(threat)
        chosen = getattr(self, f"_{self.version}")(num_classes)
        return tuple(stage for component in chosen for stage in component.stages(model, num_classes, threat))

    def settings(self) -> dict[str, Any]:
        return {"version": self.version, "package": autoattack_package().__name__}

    def perturb(self, model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
        return run_stages(self, model, images, labels, threat, seed=seed)

    @staticmethod
    def _standard(num_classes: int) -> list[Component]:
        if num_classes >= 4:
            return [Component("apgd-ce"), Component("apgd-t"), Component("fab-t"), Component("square")]
        # Without the targeted DLR loss the untargeted ones get the restarts that 'plus' gives them.
        untargeted = ["apgd-ce"] if num_classes == 2 else ["apgd-ce", "apgd-dlr"]
        return [
            *(Component(kind, restarts=5) for kind in untargeted),
            Component("fab"),
            Component("fab-t"),
            Component("square"),
        ]

    @staticmethod
    def _plus(num_classes: int) -> list[Component]:
        usable = [kind for kind in _PLUS if num_classes >= _LEAST_CLASSES.get(kind, 2)]
        return [Component(kind, restarts=5 if kind in ("apgd-ce", "apgd-dlr", "fab") else None) for kind in usable]

    @staticmethod
    def _rand(num_classes: int) -> list[Component]:
        kinds = ["apgd-ce"] if num_classes == 2 else ["apgd-ce", "apgd-dlr"]
        return [Component(kind, restarts=1, eot=20) for kind in kinds]


for _version in _VERSIONS:
    add_factory("autoattack" if _version == "standard" else f"autoattack-{_version}", partial(AutoAttack, _version))
for _kind in _PLUS:
    add_factory(_kind, partial(Component, _kind))
