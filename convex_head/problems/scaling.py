"""The best scaling of a network's output weights: margins are linear in them, so one pass tries many scalings.

Only sums over the data are kept, one number a scaling, so that data may come in chunks and lie on several processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Margins are exact up to 2 in these passes, so that no scaling below 1/2 is admissible.
_FINE = (0.0, 0.0003, 0.001, 0.003, 0.007, 0.015, 0.03, 0.07, 0.15, 0.3)
SCALES = (0.5, *sorted({1 + s * f for f in _FINE for s in (-1.0, 1.0)}), 1.5, 2.0)


def losses_at_scales(margins: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of ``loss`` over the rows of the margins at every scaling, (len(SCALES),) float64."""
    return torch.stack([loss(t * margins).double().sum() for t in SCALES])


def objectives(sums: Tensor, n: int, penalty: float) -> list[float]:
    """sums / n + scale * penalty."""
    return [total / n + t * penalty for t, total in zip(SCALES, sums.tolist(), strict=True)]


def best_scale(values: list[float]) -> tuple[float, float]:
    """The scaling with the smallest objective, and that objective."""
    best = min(range(len(values)), key=values.__getitem__)
    return SCALES[best], values[best]


def interpolated_scale(values: list[float]) -> float:
    """Minimum of the parabola through the smallest of the values and its neighbours, between these."""
    i = min(max(1, min(range(len(values)), key=values.__getitem__)), len(values) - 2)
    left, right = SCALES[i] - SCALES[i - 1], SCALES[i + 1] - SCALES[i]
    falling, rising = (values[i] - values[i - 1]) / left, (values[i + 1] - values[i]) / right
    if rising <= falling:
        return SCALES[i]
    vertex = SCALES[i] - 0.5 * (falling * right + rising * left) / (rising - falling)
    return min(max(vertex, SCALES[i - 1]), SCALES[i + 1])
