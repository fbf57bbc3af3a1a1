"""What the tests of attacks share."""

from __future__ import annotations

from torch import Tensor

from convex_head.attacks import ModelView
from convex_head.attacks.conformance import linear_case


def view_of(num_classes: int = 4) -> tuple[ModelView, Tensor, Tensor]:
    model, images, labels = linear_case(num_classes)
    return ModelView(model, tuple(images.shape[1:])), images, labels
