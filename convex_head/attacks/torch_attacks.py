"""Any attack class of torchattacks (Kim 2020), with the eps, norm, seed and class count of the evaluation.

    "torchattacks:PGD"   "torchattacks:MIFGSM(steps=20, decay=0.9)"
    short names: fgsm, bim, pgd, mifgsm, cw, deepfool

Settings that are not given keep the library's defaults, with one exception: a step size ``alpha`` keeps its
default *ratio* to eps, since the default of 2/255 never reaches the border of a large ball. Attacks
without an eps (CW, DeepFool, EAD, JSMA ...) look for near examples; only those inside the ball count.

torchattacks.AutoAttack is refused: it runs 10 steps where AutoAttack runs 100.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from convex_head.attacks.base import Attack, run_stages
from convex_head.attacks.registry import AttackLike, add_factory, resolve_attack
from convex_head.attacks.view import ModelView, attack_shape, is_right
from convex_head.errors import AttackError, MissingExtraError, UnknownAttackError
from convex_head.threat import ThreatModel

_SHORT = {
    "fgsm": "FGSM",
    "bim": "BIM",
    "pgd": "PGD",
    "mifgsm": "MIFGSM",
    "cw": "CW",
    "deepfool": "DeepFool",
}
_NOT_ATTACKS = {
    "AutoAttack": "it runs 10 steps instead of 100; use 'autoattack'",
    "MultiAttack": "it takes attacks, not a model; list the attacks themselves",
    "LGV": "it trains surrogates on a data loader; build it yourself and register it",
    "VANILA": "it changes nothing",
}
# Perturb within an eps of another norm than Linf; attacks with a norm argument take the threat's.
_OTHER_NORMS = {"PGDL2": "L2", "PGDRSL2": "L2"}
_BLACK_BOX = ("GN", "OnePixel", "Pixle", "SPSA", "Square")
_LEAST_CLASSES = {"APGDT": 4, "JSMA": 10}


def torchattacks_package() -> ModuleType:
    """torchattacks.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module("torchattacks")
    except ImportError as problem:
        raise MissingExtraError(
            "torchattacks is not installed; run: pip install '.[torchattacks]' in the checkout."
        ) from problem


class TorchAttack(Attack):
    """One class of torchattacks.

    Args:
        kind: its name, for example "PGD".
        settings: its keyword arguments; eps, norm, seed and n_classes come from the evaluation.

    Raises:
        UnknownAttackError: torchattacks has no such class, or it is no attack on one model.
        AttackError: the class does not take one of the settings.
    """

    def __init__(self, kind: str, *, name: str | None = None, **settings: Any) -> None:
        package = torchattacks_package()
        if kind in _NOT_ATTACKS:
            raise UnknownAttackError(f"torchattacks.{kind} is not used here: {_NOT_ATTACKS[kind]}.")
        if kind not in package.__all__:
            usable = sorted(set(package.__all__) - set(_NOT_ATTACKS))
            raise UnknownAttackError(f"torchattacks has no {kind!r}; it has {', '.join(usable)}.")
        self.kind, self._settings = kind, settings
        self._class = getattr(package, kind)
        self._parameters = inspect.signature(self._class.__init__).parameters
        self.name = name or f"torchattacks:{kind}"
        self.white_box = kind not in _BLACK_BOX
        self._eps_key = next((key for key in ("eps", "max_epsilon") if key in self._parameters), None)
        self.minimum_norm = self._eps_key is None
        self._refuse_unknown_settings()
        self.norms = self._searchable_norms()
        self.cost = self._passes()
        self._num_classes = 0

    def stages(self, model: ModelView, num_classes: int, threat: ThreatModel) -> tuple[Attack, ...]:
        self.check_norm(threat)
        least = _LEAST_CLASSES.get(self.kind, 2)
        if num_classes < least:
            raise AttackError(f"{self.name} needs at least {least} classes, the model has {num_classes}.")
        self._num_classes = num_classes
        return (self,)

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    def perturb(self, model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
        # The library prints when a model has no parameter to take the device from.
        with contextlib.redirect_stdout(io.StringIO()):
            attack = self._class(model, **self._arguments(threat, seed))
            attack.set_device(images.device)
            try:
                found: Tensor = attack(images, labels)
            except (RuntimeError, ValueError, IndexError) as problem:
                raise AttackError(
                    f"{self.name} fails on images of shape {tuple(images.shape[1:])}: {problem}. "
                    "Choose another attack; some of torchattacks' take RGB images only."
                ) from problem
        return found

    def _arguments(self, threat: ThreatModel, seed: int) -> dict[str, Any]:
        """The evaluation's values for the arguments that the class has, then the user's."""
        chosen: dict[str, Any] = {}
        if self._eps_key:
            chosen[self._eps_key] = threat.eps
            step = self._parameters.get("alpha")
            if step is not None:
                chosen["alpha"] = threat.eps * step.default / self._parameters[self._eps_key].default
        values = {"norm": threat.norm, "seed": seed, "n_classes": self._num_classes}
        chosen.update({key: value for key, value in values.items() if key in self._parameters})
        return {**chosen, **self._settings}

    def _refuse_unknown_settings(self) -> None:
        fixed = {"self", "model", "eps", "max_epsilon", "norm", "seed", "n_classes"}
        allowed = [key for key in self._parameters if key not in fixed]
        unknown = [key for key in self._settings if key not in allowed]
        if unknown:
            raise AttackError(
                f"{self.name} takes the settings {', '.join(allowed) or 'none'}; found {', '.join(unknown)}. "
                "eps, norm and seed come from the evaluation."
            )

    def _searchable_norms(self) -> tuple[str, ...]:
        if self.minimum_norm:
            return ("Linf", "L2", "L1")
        if "norm" in self._parameters:
            return ("Linf", "L2")
        return (_OTHER_NORMS.get(self.kind, "Linf"),)

    def _passes(self) -> float:
        """Rough forwards + backwards of an example, to order attacks by."""
        values = {key: item.default for key, item in self._parameters.items()}
        values.update(self._settings)
        keys = (
            "steps",
            "num_iter_set",
            "n_queries",
            "nb_sample",
            "eot_iter",
            "N",
            "m",
            "binary_search_steps",
        )
        passes = 2.0
        for key in keys:
            if isinstance(values.get(key), int):
                passes *= max(1, values[key])
        return passes


def as_torchattack(model: nn.Module, attack: AttackLike, threat: ThreatModel, *, seed: int = 0) -> Any:
    """Any attack of this package as a ``torchattacks.Attack``: called with (images, labels), returns images.

    Args:
        model: images in [0, 1] to logits; for "feature-exact" a spliced model.
        attack: name, (name, settings) or :class:`Attack`.
        threat: norm and eps.
        seed: seed of every call.

    Raises:
        MissingExtraError: torchattacks is not installed.
        UnknownAttackError, AttackError: the attack is not known or does not fit.
    """
    resolved = resolve_attack(attack)
    base = torchattacks_package().attack.Attack

    class ConvexHeadAttack(base):  # type: ignore[misc, valid-type]
        """One attack of convex_head behind torchattacks' interface."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__(resolved.name, model)
            self.eps, self.norm, self.seed = threat.eps, threat.norm, seed

        def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
            """(n, c, h, w) images and (n,) labels to adversarial images; those not broken come back as given."""
            view = ModelView(self.model, tuple(inputs.shape[1:]))
            images = inputs.detach().reshape(-1, *attack_shape(view.input_shape))
            found, right = images.clone(), is_right(view, images, labels)
            if right.any():
                found[right] = run_stages(resolved, view, images[right], labels[right], threat, seed=seed)
            return found.reshape(inputs.shape)

    return ConvexHeadAttack(model)


add_factory("torchattacks:", TorchAttack)
for _short, _kind in _SHORT.items():
    add_factory(_short, partial(TorchAttack, _kind, name=_short))
