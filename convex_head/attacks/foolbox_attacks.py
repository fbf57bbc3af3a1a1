"""Any attack class of Foolbox 3 (Rauber et al. 2020), where it is installed: "foolbox:LinfPGD(steps=100)".

Attacks with a fixed eps get the evaluation's; minimum-norm attacks are clipped to it by Foolbox.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

from torch import Tensor

from convex_head.attacks.base import Attack
from convex_head.attacks.registry import add_factory
from convex_head.attacks.view import ModelView
from convex_head.errors import AttackError, MissingExtraError, UnknownAttackError
from convex_head.threat import NORMS, ThreatModel

_NORM_OF = {math.inf: "Linf", 2: "L2", 1: "L1"}


def foolbox_package() -> ModuleType:
    """foolbox.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module("foolbox")
    except ImportError as problem:
        raise MissingExtraError("Foolbox is not installed; run: pip install foolbox.") from problem


class FoolboxAttack(Attack):
    """One class of ``foolbox.attacks``.

    Args:
        kind: its name, for example "LinfPGD".
        settings: its keyword arguments.

    Raises:
        UnknownAttackError: Foolbox has no such class.
    """

    def __init__(self, kind: str, **settings: Any) -> None:
        package = foolbox_package()
        chosen = getattr(package.attacks, kind, None)
        if not (isinstance(chosen, type) and issubclass(chosen, package.attacks.base.Attack)):
            raise UnknownAttackError(f"foolbox.attacks has no attack {kind!r}. See its documentation for the names.")
        self.kind, self._settings = kind, settings
        self._attack = chosen(**settings)
        self.name = f"foolbox:{kind}"
        self.minimum_norm = isinstance(self._attack, package.attacks.base.MinimizationAttack)
        order = getattr(getattr(self._attack, "distance", None), "p", None)
        self.norms = (_NORM_OF[order],) if order in _NORM_OF else NORMS
        self.cost = 2.0 * float(settings.get("steps", getattr(self._attack, "steps", 1)) or 1)

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    def perturb(self, model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
        package = foolbox_package()
        wrapped = package.PyTorchModel(model, bounds=(0, 1), device=images.device)
        criterion = package.criteria.Misclassification(labels)
        try:
            _, clipped, _ = self._attack(wrapped, images, criterion, epsilons=threat.eps)
        except (ValueError, AssertionError) as problem:
            raise AttackError(f"{self.name} failed on this model: {problem}. Choose another attack.") from problem
        found: Tensor = clipped
        return found


add_factory("foolbox:", FoolboxAttack)
