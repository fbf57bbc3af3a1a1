"""Compiled: passes whose forms are functions, not differences of two, where all forms are factored.

The gradient in the eigenvectors of a function's Hessian tells its norm, which bounds a margin from below, and is what a
trust-region problem starts from: one product serves both. A tile goes from projections to derivatives at once.
"""

from __future__ import annotations

import math

import numpy as np

from convex_head.kernels.ball import minimise
from convex_head.kernels.compiled import Compact, Setting, Sums, Tables, inner
from convex_head.kernels.derivatives import add_tile
from convex_head.kernels.loss import loss
from convex_head.kernels.tiles import LANES, STEP, gather, product, tile

# Numbers that a tile keeps from its margins to its derivatives, at most.
_KEPT = 1 << 23


@inner
def _expand(
    tau: np.ndarray,
    start: int,
    net: Compact,
    setting: Setting,
    form: int,
    row: np.ndarray,
    work: tuple[np.ndarray, np.ndarray, np.ndarray],
    value: np.ndarray,
    norm: np.ndarray,
) -> None:
    """Values and gradient norms (lanes,) of a function; the gradient, in its eigenvectors, into work[1]."""
    slopes, gradient, _ = work
    width, begin = len(row), net.offsets[form]
    size, rank = gather(tau, start, net, form, row, slopes), net.rank[form]
    for l in range(width):
        value[l], norm[l] = net.base[form], setting.zero
    for position in range(size):
        slope, twice, linear = slopes[position], net.twice[begin + position], net.linear[begin + position]
        for l in range(width):
            projection = slope[l]
            slope[l] = twice * projection + linear
            value[l] += setting.half * projection * (slope[l] + linear)
    product(net.project[form], slopes, rank, size, width, gradient)
    for i in range(rank):
        g = gradient[i]
        for l in range(width):
            norm[l] += g[l] * g[l]
    for l in range(width):
        norm[l] = math.sqrt(norm[l])


@inner
def _solve(
    form: int,
    negative: int,
    count: int,
    wanted: np.ndarray,
    net: Compact,
    setting: Setting,
    work: tuple[np.ndarray, np.ndarray, np.ndarray],
    found: tuple[np.ndarray, np.ndarray],
    column: int,
    lane: np.ndarray,
    value: np.ndarray,
    e: np.ndarray,
    spread: np.ndarray,
    margins: np.ndarray,
) -> int:
    """Exact margins of the lanes that are wanted, ``count`` of them; returns how many are solved.

    Where they are most of the tile it is solved as it is, else they are moved together. lane gets their rows.
    """
    compressed, gradient, magnitude = work
    gaps, exact = found
    width, rank, height = len(wanted), net.rank[form], len(compressed)
    sign = -setting.one if negative else setting.one
    dense = 2 * count > width
    number = 0
    for l in range(width):
        if dense or wanted[l] == 1 + negative:
            lane[number] = l
            exact[number] = sign * value[l]
            number += 1
    for i in range(rank):
        g, c = gradient[i], compressed[i]
        if dense:
            for l in range(width):
                c[l] = sign * g[l]
        else:
            for l in range(number):
                c[l] = sign * g[lane[l]]
    minimise(
        net.eigenvalues[form],
        negative,
        rank,
        compressed,
        number,
        setting,
        exact,
        magnitude,
        gaps,
        tile(e, height, 0, number),
        tile(spread, height if len(spread) else 0, 0, number),
    )
    for l in range(number):
        if wanted[lane[l]] == 1 + negative:
            margins[lane[l], column] = exact[l]
    return number


@inner
def separate(
    tau: np.ndarray,
    labels: np.ndarray,
    start: int,
    stop: int,
    centre: np.ndarray,
    net: Compact,
    tables: Tables,
    setting: Setting,
    coefficient: np.ndarray,
    sums: Sums,
    work: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """Rows start..stop: coefficients (N, rows) and sums."""
    columns, height = tables.form.shape[1], len(work[0])
    blurred = setting.blur > setting.zero
    # Of a column and sign: steps, their rows, and how many they are.
    lanes = max(STEP, min(LANES, _KEPT // (2 * columns * height)))
    room = height * lanes
    e = np.zeros(2 * columns * room, tau.dtype)
    spread = np.empty(len(e) if blurred else 0, tau.dtype)
    lane = np.empty((2 * columns, LANES), np.int64)
    number = np.zeros(2 * columns, np.int64)
    wanted = np.zeros((columns, LANES), np.int8)
    margins, slopes = np.empty((LANES, columns), tau.dtype), np.empty((LANES, columns), tau.dtype)
    value, norm, omega = np.empty(LANES, tau.dtype), np.empty(LANES, tau.dtype), np.empty(LANES, tau.dtype)
    order = np.empty(columns, tau.dtype)
    found = np.empty(len(work[2]), tau.dtype), np.empty(LANES, tau.dtype)
    every = np.arange(LANES)
    curved = setting.half * setting.radius * setting.radius
    scale = setting.one / tau.dtype.type(setting.examples)
    for first in range(start, stop, lanes):
        width = min(lanes, stop - first)
        for k in range(columns):
            _expand(tau, first, net, setting, k, every[:width], work, value, norm)
            counts = [0, 0]
            for l in range(width):
                negative = tables.negative[labels[first + l], k]
                bound = -value[l] if negative else value[l]
                bound += curved * net.curvature[negative, k] - setting.radius * norm[l]
                if len(centre) > 0:
                    bound -= setting.mu * centre[first + l, k]
                margins[l, k] = bound
                needed = bound < setting.threshold
                wanted[k, l] = 1 + negative if needed else 0
                counts[negative] += needed
            for negative in range(2):
                at = 2 * k + negative
                number[at] = 0
                if counts[negative] > 0:
                    here, around = e[at * room : (at + 1) * room], spread
                    if blurred:
                        around = spread[at * room : (at + 1) * room]
                    number[at] = _solve(
                        k,
                        negative,
                        counts[negative],
                        wanted[k, :width],
                        net,
                        setting,
                        work,
                        found,
                        k,
                        lane[at],
                        value,
                        here,
                        around,
                        margins,
                    )
        for l in range(width if len(centre) > 0 else 0):
            for k in range(columns):
                if wanted[k, l] != 0:
                    margins[l, k] -= setting.mu * centre[first + l, k]
        for l in range(width):
            loss(margins[l], setting, order, slopes[l], sums.losses)
        for at in range(2 * columns):
            k, count = at // 2, number[at]
            if count == 0:
                continue
            for l in range(count):
                i = lane[at, l]
                omega[l] = -scale * slopes[i, k] if wanted[k, i] == 1 + at % 2 else setting.zero
            here, around = e[at * room : (at + 1) * room], spread
            if blurred:
                around = spread[at * room : (at + 1) * room]
            add_tile(
                tau,
                first,
                net,
                setting,
                at,
                k,
                lane[at, :count],
                omega,
                tile(here, height, 0, count),
                tile(around, height if blurred else 0, 0, count),
                work,
                coefficient,
                sums,
            )
