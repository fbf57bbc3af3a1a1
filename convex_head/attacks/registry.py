"""Attacks by name.

Three ways to a name: built in, the decorator :func:`register_attack`, and the entry point group
``convex_head.attacks`` of an installed package. A name may carry settings, "torchattacks:PGD(steps=20)"; what
stands before the colon is a family, the rest is handed to it.

    @register_attack("noise")
    def noise(model, images, labels, threat, *, seed):
        return threat.project(images, images + threat.eps * torch.randn_like(images).sign())
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor

from convex_head.attacks.base import Attack
from convex_head.attacks.view import ModelView
from convex_head.errors import AttackError, UnknownAttackError
from convex_head.threat import ThreatModel

Perturb = Callable[..., Tensor]
Factory = Callable[..., Attack]
AttackLike = str | Attack | tuple[str, dict[str, Any]]

ENTRY_POINT_GROUP = "convex_head.attacks"
_FACTORIES: dict[str, Factory] = {}


class FunctionAttack(Attack):
    """An attack made of one function with the signature of :meth:`Attack.perturb`."""

    def __init__(self, name: str, function: Perturb, settings: dict[str, Any]) -> None:
        self.name = name
        self._function = function
        self._settings = settings

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    def perturb(self, model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
        return self._function(model, images, labels, threat, seed=seed, **self._settings)


def register_attack(name: str) -> Callable[[Any], Any]:
    """Decorator that registers an :class:`Attack` subclass or a perturb function under ``name``.

    A function is called as ``f(model, images, labels, threat, *, seed, **settings)`` and returns candidates.
    Registering a name again replaces it, so that a notebook cell can be run twice.

    Raises:
        AttackError: the name is empty or holds "(", or the object is neither a class of attack nor callable.
    """
    if not name or "(" in name:
        raise AttackError(f"The name of an attack is not empty and holds no '('; found {name!r}. Rename it.")

    def decorate(target: Any) -> Any:
        if isinstance(target, type) and issubclass(target, Attack):
            add_factory(name, target)
        elif callable(target) and not isinstance(target, type):
            add_factory(name, lambda **settings: FunctionAttack(name, target, settings))
        else:
            raise AttackError(
                f"An attack is a subclass of convex_head.attacks.Attack or a function; {name!r} is a "
                f"{type(target).__name__}. Wrap it in a function."
            )
        return target

    return decorate


def add_factory(name: str, factory: Factory) -> None:
    """Register ``factory(**settings) -> Attack``; under "family:" it gets the member's name first."""
    _FACTORIES[name] = factory


def attack_names() -> list[str]:
    """Every name that resolves without an argument, sorted."""
    _load_built_in()
    return sorted({*_FACTORIES, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def resolve_attack(attack: AttackLike) -> Attack:
    """An attack from its name, from (name, settings), or unchanged.

    Raises:
        UnknownAttackError: nothing is registered under that name.
        AttackError: the settings do not fit.
    """
    if isinstance(attack, Attack):
        return attack
    text, settings = attack if isinstance(attack, tuple) else (attack, {})
    name, parsed = _parse(text)
    settings = {**parsed, **settings}
    _load_built_in()
    family, _, member = name.partition(":")
    if name in _FACTORIES:
        factory, members = _FACTORIES[name], []
    elif member and f"{family}:" in _FACTORIES:
        factory, members = _FACTORIES[f"{family}:"], [member]
    else:
        factory, members = _from_entry_point(name), []
    try:
        resolved = factory(*members, **settings)
    except TypeError as problem:
        raise AttackError(f"{name} does not take the settings {settings}: {problem}.") from problem
    # The name in a record says how to ask for this attack again.
    if settings:
        resolved.name = f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"
    return resolved


def resolve_attacks(attacks: AttackLike | Iterable[AttackLike]) -> tuple[Attack, ...]:
    """All attacks, cheapest first, black-box ones last; attacks of equal cost keep their order.

    A black-box attack that breaks what all white-box attacks left is a sign of masked gradients, which shows only
    in this order.

    Raises:
        AttackError: a name occurs twice.
    """
    resolved = [resolve_attack(attack) for attack in _as_list(attacks)]
    names = [attack.name for attack in resolved]
    if len(set(names)) != len(names):
        raise AttackError(f"Each attack runs once; found {names}. Remove the repeated one.")
    return tuple(sorted(resolved, key=lambda attack: (not attack.white_box, attack.cost)))


def _as_list(attacks: AttackLike | Iterable[AttackLike]) -> list[AttackLike]:
    """One attack, however it is written, or several."""
    if isinstance(attacks, str | Attack):
        return [attacks]
    several = list(attacks)
    if len(several) == 2 and isinstance(several[0], str) and isinstance(several[1], dict):
        return [(several[0], several[1])]
    return several  # type: ignore[return-value]


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """ "name(key=value, ...)" to its name and literal settings."""
    name, bracket, rest = text.partition("(")
    if not bracket:
        return text, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("settings are key=value")
        return name, {str(item.arg): ast.literal_eval(item.value) for item in call.keywords}
    except (SyntaxError, ValueError) as problem:
        raise AttackError(
            f"Settings are written name(key=value, ...) with plain values; found {text!r}: {problem}."
        ) from problem


def _from_entry_point(name: str) -> Factory:
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            register_attack(name)(point.load())
            return _FACTORIES[name]
    raise UnknownAttackError(
        f"No attack is registered as {name!r}; known are {', '.join(sorted(_FACTORIES))}, where a name that "
        "ends in ':' takes a class of that library. Register yours with convex_head.register_attack."
    )


def _load_built_in() -> None:
    # Imported for their registrations; here and not at the top, because they import this module.
    from convex_head.attacks import (  # noqa: F401
        auto_attack,
        feature_exact,
        foolbox_attacks,
        soft_gate,
        torch_attacks,
    )
