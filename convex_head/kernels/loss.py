"""Compiled: a loss of problems/losses.py and its slopes, for one row of margins."""

from __future__ import annotations

from typing import Any

import numpy as np

from convex_head.kernels.compiled import Setting, inner


@inner
def water_level(order: np.ndarray, count: int, least: Any) -> Any:
    """Level >= least at which the max(0, order - level) sum up to 1 at most; order descends up to ``count``."""
    total, level = order.dtype.type(0), least
    for c in range(count):
        total += order[c]
        excess, number = total - order.dtype.type(1), order.dtype.type(c + 1)
        if not order[c] * number > excess:
            break
        level = max(least, excess / number)
    return level


@inner
def insert(order: np.ndarray, count: int, y: Any) -> int:
    """Put y into the first ``count`` numbers of order, which descend; returns how many there are now."""
    place = count
    while place > 0 and order[place - 1] < y:
        order[place] = order[place - 1]
        place -= 1
    order[place] = y
    return count + 1


@inner
def loss(margins: np.ndarray, setting: Setting, order: np.ndarray, slopes: np.ndarray, losses: np.ndarray) -> None:
    """Slopes of the smoothed loss of one row of margins (K,); adds the smoothed and the hard loss to ``losses``."""
    zero, one, half, mu = setting.zero, setting.one, setting.half, setting.mu
    smoothed, hard = zero, zero
    if setting.joint:
        count, lowest = 0, margins[0]
        for k in range(len(margins)):
            lowest = min(lowest, margins[k])
        for k in range(len(margins)):
            # The projection leaves nothing of what is 1 below the largest, which is 0.
            y = (lowest - margins[k]) / mu
            if y > -one and margins[k] < one:
                count = insert(order, count, y)
        level = water_level(order, count, (lowest - one) / mu)
        total = 0.0
        for k in range(len(margins)):
            slopes[k] = max(zero, (lowest - margins[k]) / mu - level)
            total += slopes[k]
        most = margins.dtype.type(max(1.0, total))
        for k in range(len(margins)):
            s = slopes[k] / most
            slopes[k] = s
            smoothed += s * (one - margins[k]) - half * mu * s * s
        hard = max(zero, one - lowest)
    else:
        for k in range(len(margins)):
            z = one - margins[k]
            s = min(one, max(zero, z / mu))
            slopes[k] = setting.share * s
            smoothed += setting.share * (s * z - half * mu * s * s)
            hard += setting.share * max(zero, z)
    losses[0] += smoothed
    losses[1] += hard
