"""Compiled: a loss of problems/losses.py and its slopes, for one row of margins."""

from __future__ import annotations

import numpy as np

from convex_head.kernels.compiled import Setting, inner


@inner
def loss(margins: np.ndarray, setting: Setting, order: np.ndarray, slopes: np.ndarray, losses: np.ndarray) -> None:
    """Slopes of the smoothed loss of one row of margins (K,); adds the smoothed and the hard loss to ``losses``."""
    zero, one, half, mu = setting.zero, setting.one, setting.half, setting.mu
    smoothed, hard = zero, zero
    if setting.joint:
        count, total, threshold = 0, zero, zero
        lowest = margins[0]
        for k in range(len(margins)):
            lowest = min(lowest, margins[k])
        largest = (one - lowest) / mu
        for k in range(len(margins)):
            # The projection leaves nothing of what is 1 below the largest.
            y = (one - margins[k]) / mu
            if y > zero and y > largest - one:
                place = count
                while place > 0 and order[place - 1] < y:
                    order[place] = order[place - 1]
                    place -= 1
                order[place] = y
                count += 1
        for c in range(count):
            total += order[c]
            excess = total - one
            number = margins.dtype.type(c + 1)
            if order[c] * number > excess:
                threshold = max(zero, excess / number)
            else:
                break
        for k in range(len(margins)):
            z = one - margins[k]
            s = max(zero, z / mu - threshold)
            slopes[k] = s
            smoothed += s * z - half * mu * s * s
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
