"""What an attack sees of a model: images (n, c, h, w) to float32 logits, every pass counted.

AutoAttack and torchattacks assume float32 logits, four-dimensional contiguous images and an output that
depends on the input through autograd. :class:`ModelView` gives them that for any module: flat or
other-shaped data is folded to (n, 1, 1, d), other dtypes are cast at the border, logits may be
multiplied by a power of two (which changes no prediction), and an output without a gradient gets a zero one
instead of an exception.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convex_head.errors import AttackError


@dataclass
class PassCount:
    """Examples sent through a model, and examples whose gradient came back."""

    forwards: int = 0
    backwards: int = 0


def attack_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Shape (c, h, w) in which attacks see examples of ``shape``: images as they are, the rest (1, 1, d)."""
    if len(shape) == 3:
        return (shape[0], shape[1], shape[2])
    if len(shape) == 2:
        return (1, shape[0], shape[1])
    return (1, 1, math.prod(shape))


class ModelView(nn.Module):
    """A counting view of ``inner``.

    Args:
        inner: the module under attack, from (n, *input_shape) to (n, classes).
        input_shape: shape of one example as ``inner`` wants it.
        scale: factor of the logits, a power of two so that no prediction changes.
        passes: counter to share with another view.

    Calling it takes (n, c, h, w) images (any shape with the same number of entries works).
    """

    def __init__(
        self,
        inner: nn.Module,
        input_shape: tuple[int, ...],
        *,
        scale: float = 1.0,
        passes: PassCount | None = None,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.input_shape = tuple(input_shape)
        self.scale = scale
        self.passes = passes if passes is not None else PassCount()
        self.dtype = next((p.dtype for p in inner.parameters() if p.is_floating_point()), torch.float32)

    def part(self, name: str) -> ModelView:
        """A view of the submodule ``name`` on the same images, unscaled, on the same counter."""
        return ModelView(self.inner.get_submodule(name), self.input_shape, passes=self.passes)

    def forward(self, images: Tensor) -> Tensor:
        """(n, c, h, w) images to (n, classes) float32 outputs."""
        batch = images.reshape(images.shape[0], *self.input_shape).to(self.dtype)
        output = self.inner(batch)
        self.passes.forwards += images.shape[0]
        # The copy keeps attacks that write into logits (Square does) out of a model's own buffers.
        logits = output.float() * self.scale
        if torch.is_grad_enabled() and images.requires_grad:
            if not logits.requires_grad:
                logits = logits + 0.0 * images.flatten(1).sum(dim=1, keepdim=True)
            logits.register_hook(self._count_backward)
        return logits

    def _count_backward(self, gradient: Tensor) -> None:
        self.passes.backwards += gradient.shape[0]


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) logit of the label minus the largest other logit."""
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -math.inf)
    return own - others.amax(dim=1)


def spliced_parts(view: ModelView, method: str, attack: str) -> tuple[ModelView, Any]:
    """The counted backbone and the head of a spliced model whose head has ``method``.

    Raises:
        AttackError: the model has no submodules ``backbone`` and ``head``, or the head lacks the method.
    """
    parts = dict(view.inner.named_children())
    if "backbone" not in parts or not callable(getattr(parts.get("head"), method, None)):
        raise AttackError(
            f"{attack} needs a spliced model whose head has {method}(); found {type(view.inner).__name__} with "
            f"the parts {', '.join(parts) or 'none'}. Splice a head with convex_head.replace_head."
        )
    return view.part("backbone"), parts["head"]


@torch.no_grad()
def is_right(view: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(n,) bool: finite logits whose largest entry is the label's."""
    logits = view(images)
    return (logits.argmax(dim=1) == labels) & torch.isfinite(logits).all(dim=1)
