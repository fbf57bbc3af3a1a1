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


def smooth_hinge(z: Tensor, width: float) -> Tensor:
    """max(0, z) smoothed: 0, z^2 / (2 width), z - width / 2."""
    if width <= 0:
        return z.clamp_min(0)
    s = (z / width).clamp(0, 1)
    return s * (z - 0.5 * width * s)
