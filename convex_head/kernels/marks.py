"""Compiled: which margins have to be solved for the joint loss, whose slopes are a point of a simplex.

First the smallest of a row by its bound (1), then those near it (2), then those that can still have a slope (3): what
is exact already has taken a part of the simplex.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convex_head.kernels.compiled import Compact, Few, Setting, Tables, inner
from convex_head.kernels.loss import insert, water_level

# First the margins within this share of the smoothing width above the smallest of their row.
_NEAR = 0.3
# What a tightened bound leaves, so that no rounding matters.
_LEFT = 1e-4


@inner
def _inner_product(tau: np.ndarray, i: int, net: Compact, few: Few, f: int, g: int) -> float:
    """(grad f)'(grad g) of two functions at row i."""
    total = 0.0
    for j in range(net.offsets[f], net.offsets[f + 1]):
        inside = 0.0
        for l in range(net.offsets[g], net.offsets[g + 1]):
            inside += few.gram[j, l] * (net.twice[l] * tau[l, i] + net.linear[l])
        total += inside * (net.twice[j] * tau[j, i] + net.linear[j])
    return total


@inner
def _gain(tau: np.ndarray, i: int, net: Compact, few: Few, f: int, g: int) -> float:
    """|grad f| + |grad g| - |grad f - grad g| at row i: what the bounds give away."""
    own, other = _inner_product(tau, i, net, few, f, f), _inner_product(tau, i, net, few, g, g)
    between = own + other - 2.0 * _inner_product(tau, i, net, few, f, g)
    # No more than rounding is lost by leaving a little of it.
    return (1.0 - _LEFT) * (math.sqrt(max(own, 0.0)) + math.sqrt(max(other, 0.0)) - math.sqrt(max(between, 0.0)))


@inner
def mark_all(wanted: np.ndarray, setting: Setting, margins: np.ndarray) -> None:
    """Mark with 1 all margins that are not known to be satisfied."""
    for i in range(len(margins)):
        for k in range(margins.shape[1]):
            wanted[i, k] = margins[i, k] < setting.threshold


@inner
def mark_lowest(wanted: np.ndarray, lowest: np.ndarray, setting: Setting, margins: np.ndarray) -> None:
    """Mark with 1 the smallest of every row, and write its column into lowest."""
    for i in range(len(margins)):
        for k in range(margins.shape[1]):
            if margins[i, k] < margins[i, lowest[i]]:
                lowest[i] = k
        wanted[i, lowest[i]] = margins[i, lowest[i]] < setting.threshold


@inner
def mark_near(
    wanted: np.ndarray,
    lowest: np.ndarray,
    labels: np.ndarray,
    tau: np.ndarray,
    start: int,
    net: Compact,
    tables: Tables,
    setting: Setting,
    few: Any,
    margins: np.ndarray,
) -> None:
    """Mark with 2 what a part of the window has; bounds within the window are tightened where that is cheap."""
    for i in range(len(margins)):
        smallest, label = margins[i, lowest[i]], labels[start + i]
        limit = min(setting.threshold, smallest + setting.window)
        near = min(setting.threshold, smallest + _NEAR * setting.mu)
        for k in range(margins.shape[1]):
            if wanted[i, k] == 0 and margins[i, k] < limit:
                if few is not None:
                    gain = _gain(tau, start + i, net, few, label, tables.rival[label, k])
                    margins[i, k] += setting.radius * gain
                if margins[i, k] < near:
                    wanted[i, k] = 2


@inner
def mark_rest(wanted: np.ndarray, lowest: np.ndarray, setting: Setting, margins: np.ndarray, order: np.ndarray) -> None:
    """Mark with 3 what can still have a slope: what is exact already has taken a part of the simplex."""
    slack = setting.window - setting.mu
    for i in range(len(margins)):
        count, smallest = 0, setting.one
        for k in range(margins.shape[1]):
            if wanted[i, k] != 0:
                smallest = min(smallest, margins[i, k])
        for k in range(margins.shape[1]):
            if wanted[i, k] != 0 and margins[i, k] < setting.one:
                count = insert(order, count, (smallest - margins[i, k]) / setting.mu)
        level = water_level(order, count, (smallest - setting.one) / setting.mu)
        limit = smallest - setting.mu * level + slack + setting.tol * max(setting.one, abs(smallest))
        limit = min(limit, setting.threshold, margins[i, lowest[i]] + setting.window)
        for k in range(margins.shape[1]):
            if wanted[i, k] == 0 and margins[i, k] < limit:
                wanted[i, k] = 3
