"""Standard training: SGD on the cross-entropy, as :class:`Recipe` states it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .recipe import Recipe, register_recipe


@register_recipe
@dataclass(frozen=True)
class Standard(Recipe):
    """min_theta L(theta)."""

    name: ClassVar[str] = "standard"
