"""Dual norms of feature balls, and smoothed maxima of the problems on fixed gates (problems/gates.py)."""

from __future__ import annotations

import torch
from torch import Tensor


def dual_norm(v: Tensor, ball: str) -> Tensor:
    """Dual norm of the ball over the last axis, the constant's entry left out; (..., d+1) -> (...)."""
    return v[..., :-1].abs().sum(-1) if ball == "linf" else v[..., :-1].norm(dim=-1)


def huber(size: Tensor, width: float) -> Tensor:
    """|t| smoothed: t^2 / (2 width) inside the width, |t| - width / 2 outside."""
    if width <= 0:
        return size
    return torch.where(size <= width, size.square() / (2 * width), size - 0.5 * width)


class BallNorm:
    """r |v|_* over the last axis, the constant's entry left out, its smoothed version and the gradient of that.

    Args:
        radius: r >= 0.
        ball: "l2" or "linf".
        width: the smoothed norm is at most width / 2 smaller.
    """

    def __init__(self, radius: float, ball: str, width: float):
        self.radius, self.ball, self.width = radius, ball, width

    def size(self, v: Tensor) -> Tensor:
        """What :meth:`values` and :meth:`pull_` need of v (..., d+1): its 2-norm (...), or its entries' (..., d)."""
        head = v[..., :-1]
        return head.abs() if self.ball == "linf" else head.norm(dim=-1)

    def _narrow(self, size: Tensor) -> float:
        entries = size.shape[-1] if self.ball == "linf" else 1
        return self.width / max(self.radius * entries, 1e-300)

    def values(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """(...) r |v|_* and its smoothed version."""
        linf = self.ball == "linf"
        hard = self.radius * (size.sum(-1) if linf else size)
        if self.width <= 0 or self.radius == 0:
            return hard, hard
        soft = huber(size, self._narrow(size))
        return hard, self.radius * (soft.sum(-1) if linf else soft)

    def pull_(self, v: Tensor, size: Tensor, weights: Tensor) -> Tensor:
        """v overwritten by weights (...) times the gradient of the smoothed norm (..., d+1)."""
        if self.radius == 0:
            return v.zero_()
        v[..., -1] = 0
        narrow = max(self._narrow(size), 1e-300)
        if self.ball == "linf":
            return v.div_(narrow).clamp_(-1, 1).mul_(self.radius * weights.unsqueeze(-1))
        return v.mul_((self.radius * weights / size.clamp_min(narrow)).unsqueeze(-1))


def smooth_hinge(z: Tensor, width: float) -> Tensor:
    """max(0, z) smoothed: 0, z^2 / (2 width), z - width / 2."""
    if width <= 0:
        return z.clamp_min(0)
    s = (z / width).clamp(0, 1)
    return s * (z - 0.5 * width * s)
