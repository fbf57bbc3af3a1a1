"""Compiled: derivatives of the margins of a tile, as in GroupPass.backward of adversary/scan.py."""

from __future__ import annotations

import numpy as np

from convex_head.kernels.compiled import Compact, Setting, Sums, inner
from convex_head.kernels.tiles import STEP, add_outer, dot, gather, product, scatter


@inner
def _moving(
    rank: int, row: np.ndarray, omega: np.ndarray, step: np.ndarray, out: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> int:
    """Move the lanes where omega is not zero together; returns how many they are, filled up with others of weight 0."""
    rows, omegas, steps = out
    count = 0
    for l in range(len(row)):
        if omega[l] != 0:
            rows[count] = l
            omegas[count] = omega[l]
            count += 1
    width = min(len(row), -STEP * (-count // STEP))
    for l in range(count, width):
        rows[l], omegas[l] = rows[0], 0
    for i in range(rank):
        e, s = step[i], steps[i]
        for l in range(width):
            s[l] = e[rows[l]]
    for l in range(width):
        rows[l] = row[rows[l]]
    return width


@inner
def add_tile(
    tau: np.ndarray,
    start: int,
    net: Compact,
    setting: Setting,
    key: int,
    slot: int,
    row: np.ndarray,
    omega: np.ndarray,
    step: np.ndarray,
    spread: np.ndarray,
    work: tuple[np.ndarray, np.ndarray, np.ndarray],
    coefficient: np.ndarray,
    sums: Sums,
) -> None:
    """Add the derivatives of omega * margins of one tile, whose lanes share the form and sign of a key.

    Args:
        row: (lanes,) rows, from start on.
        omega: (lanes,) or longer.
        step, spread: (k, lanes), in the eigenvectors of the form.
    """
    form, width, rank = key // 2, len(row), net.rank[slot]
    sign = -setting.one if key % 2 else setting.one
    count, total = 0, setting.zero
    for l in range(width):
        count += omega[l] != setting.zero
        total += omega[l]
    if count == 0:
        return
    if setting.blur > setting.zero:
        for i in range(rank):
            sums.spread[slot, i] += sign * dot(omega, spread[i], width)
    at_worst, across, steps = work
    if 4 * count < 3 * width:
        moved = np.empty(width, row.dtype), np.empty(width, omega.dtype), steps
        width = _moving(rank, row, omega, step, moved)
        row, omega, step = moved[0][:width], moved[1], steps
    plus, minus = net.plus[form], net.minus[form]
    size = gather(tau, start, net, form, row, at_worst)
    product(net.lift[slot], step, size, rank, width, across)
    positives = net.offsets[plus + 1] - net.offsets[plus]
    for position in range(size):
        own = position < positives
        j = net.offsets[plus] + position if own else net.offsets[minus] + position - positives
        s = sign if own else -sign
        projection, change = at_worst[position], across[position]
        twice, linear = s * net.twice[j], s * net.linear[j]
        for l in range(width):
            projection[l] += change[l]
        sums.projections[j] += s * dot(omega, projection, width)
        sums.weights[j] += s * total
        for l in range(width):
            projection[l] = omega[l] * (twice * projection[l] + linear)
        scatter(projection, start, row, coefficient[j])
    add_outer(step, at_worst, rank, size, width, sums.in_basis[slot])
