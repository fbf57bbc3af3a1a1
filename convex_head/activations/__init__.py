"""The activations that a head can have: one file each, one line in the registry."""

from __future__ import annotations

from typing import Any

from convex_head.activations.base import Activation, Geometry, Task, TrainingData, Weights
from convex_head.activations.gated_relu import GatedRelu
from convex_head.activations.polynomial import Polynomial
from convex_head.activations.relu import Relu
from convex_head.errors import SettingError, UnknownActivationError

ACTIVATIONS: dict[str, type[Activation]] = {"polynomial": Polynomial, "relu": Relu, "gated_relu": GatedRelu}


def make_activation(name: str, settings: dict[str, Any]) -> Activation:
    """The activation of that name.

    Args:
        name: one of :data:`ACTIVATIONS`.
        settings: constructor arguments; those that are None are left at the activation's default.

    Raises:
        UnknownActivationError: there is no such activation.
        SettingError: a setting belongs to another activation.
        InputError: a subclass, where a setting has a value that it cannot have.
    """
    if name not in ACTIVATIONS:
        raise UnknownActivationError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; found {name!r}.")
    kind = ACTIVATIONS[name]
    known = kind.__init__.__annotations__.keys() - {"return"}
    given = {key: value for key, value in settings.items() if value is not None}
    for key, value in given.items():
        if key not in known:
            raise SettingError(
                f"activation={name!r} has the settings {', '.join(sorted(known))}; found {key}={value!r}. Leave it out."
            )
    return kind(**given)


__all__ = ["ACTIVATIONS", "Activation", "Geometry", "Task", "TrainingData", "Weights", "make_activation"]
