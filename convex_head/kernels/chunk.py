"""Compiled: one part of a chunk from projections to derivatives; the reference is problems/adjoint.py with its sources.

Rows are worked on in tiles of at most ``LANES`` that share a form. Loops over a tile run along memory, so that they
become vector instructions, and a tile stays in the first cache.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convex_head.kernels.ball import minimise
from convex_head.kernels.compiled import Compact, Lanes, Setting, Sums, Tables, entry, inner
from convex_head.kernels.derivatives import add_tile
from convex_head.kernels.factors import combine_one
from convex_head.kernels.lanes import factored, gather_lanes
from convex_head.kernels.loss import loss
from convex_head.kernels.marks import mark_all, mark_lowest, mark_near, mark_rest
from convex_head.kernels.separate import separate
from convex_head.kernels.tiles import LANES, gather, product, tile


@inner
def _bounds(
    tau: np.ndarray,
    labels: np.ndarray,
    start: int,
    net: Compact,
    tables: Tables,
    setting: Setting,
    slopes: np.ndarray,
    margins: np.ndarray,
) -> None:
    """Lower bounds (rows, K) of all margins, for the rows from ``start`` on."""
    functions, size = len(net.base), len(slopes)
    values, norms = np.empty((functions, LANES), tau.dtype), np.empty((functions, LANES), tau.dtype)
    across = np.zeros((size, LANES), tau.dtype)
    rows, columns = margins.shape
    for first in range(0, rows, LANES):
        width = min(LANES, rows - first)
        for f in range(functions):
            begin, end = net.offsets[f], net.offsets[f + 1]
            value, norm = values[f], norms[f]
            for l in range(width):
                value[l], norm[l] = net.base[f], setting.zero
            for j in range(begin, end):
                t, slope, twice, linear = tau[j, start + first :], slopes[j - begin], net.twice[j], net.linear[j]
                for l in range(width):
                    slope[l] = twice * t[l] + linear
                    value[l] += setting.half * t[l] * (slope[l] + linear)
            product(net.root[f], slopes, end - begin, end - begin, width, across)
            for i in range(end - begin):
                row = across[i]
                for l in range(width):
                    norm[l] += row[l] * row[l]
            for l in range(width):
                norm[l] = math.sqrt(norm[l])
        curved = setting.half * setting.radius * setting.radius
        for l in range(width):
            label = labels[start + first + l]
            for k in range(columns):
                form, negative, rival = tables.form[label, k], tables.negative[label, k], tables.rival[label, k]
                value, norm = values[rival, l], norms[rival, l]
                if tables.pairwise:
                    value, norm = values[label, l] - value, norm + norms[label, l]
                elif negative:
                    value = -value
                margins[first + l, k] = value - setting.radius * norm + curved * net.curvature[negative, form]


@inner
def _solve(
    tau: np.ndarray,
    start: int,
    net: Compact,
    setting: Setting,
    lanes: Lanes,
    work: tuple[np.ndarray, np.ndarray, np.ndarray],
    margins: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact margins of all lanes, into ``margins``; returns steps and spreads, tile by tile (M, width)."""
    first, row, column = lanes.first, lanes.row, lanes.column
    slopes, gradient, magnitude = work
    height = len(slopes)
    e = np.zeros(height * len(row), tau.dtype)
    spread = np.empty(len(e) if setting.blur > setting.zero else 0, tau.dtype)
    gaps = np.empty(len(magnitude), tau.dtype)
    value = np.empty(LANES, tau.dtype)
    for index in range(len(lanes.keys)):
        form, negative, slot = lanes.keys[index] // 2, lanes.keys[index] % 2, lanes.slots[index]
        for begin in range(first[index], first[index + 1], LANES):
            width = min(LANES, first[index + 1] - begin)
            size = gather(tau, start, net, form, row[begin : begin + width], slopes)
            plus, minus = net.plus[form], net.minus[form]
            constant = net.base[plus] - (net.base[minus] if minus >= 0 else setting.zero)
            for l in range(width):
                value[l] = -constant if negative else constant
            positives, position = net.offsets[plus + 1] - net.offsets[plus], 0
            for position in range(size):
                own = position < positives
                j = net.offsets[plus] + position if own else net.offsets[minus] + position - positives
                sign = setting.one if own != (negative == 1) else -setting.one
                slope, twice, linear = slopes[position], sign * net.twice[j], sign * net.linear[j]
                for l in range(width):
                    projection = slope[l]
                    slope[l] = twice * projection + linear
                    value[l] += setting.half * projection * (slope[l] + linear)
            rank = net.rank[slot]
            product(net.project[slot], slopes, rank, size, width, gradient)
            minimise(
                net.eigenvalues[slot],
                negative,
                rank,
                gradient,
                width,
                setting,
                value,
                magnitude,
                gaps,
                tile(e, height, begin, width),
                tile(spread, height if len(spread) else 0, begin, width),
            )
            for l in range(width):
                if column[begin + l] >= 0:
                    margins[row[begin + l], column[begin + l]] = value[l]
    return e, spread


@inner
def _derive(
    tau: np.ndarray,
    start: int,
    net: Compact,
    setting: Setting,
    lanes: Lanes,
    steps: tuple[np.ndarray, np.ndarray],
    slopes: np.ndarray,
    work: tuple[np.ndarray, np.ndarray, np.ndarray],
    coefficient: np.ndarray,
    sums: Sums,
) -> None:
    """Add the derivatives of -slopes * margins / n to coefficient (N, rows) and to the sums (GroupPass.backward)."""
    first, row, column = lanes.first, lanes.row, lanes.column
    e, spread = steps
    height = len(work[0])
    omega = np.empty(LANES, tau.dtype)
    scale = setting.one / tau.dtype.type(setting.examples)
    for index in range(len(lanes.keys)):
        for begin in range(first[index], first[index + 1], LANES):
            width = min(LANES, first[index + 1] - begin)
            for l in range(width):
                k = column[begin + l]
                omega[l] = -scale * slopes[row[begin + l], k] if k >= 0 else setting.zero
            add_tile(
                tau,
                start,
                net,
                setting,
                lanes.keys[index],
                lanes.slots[index],
                row[begin : begin + width],
                omega,
                tile(e, height, begin, width),
                tile(spread, height if len(spread) else 0, begin, width),
                work,
                coefficient,
                sums,
            )


@inner
def _lower(lanes: Lanes, start: int, centre: np.ndarray, setting: Setting, margins: np.ndarray) -> None:
    """Take mu c off the margins that have been solved."""
    if len(centre) > 0:
        for l in range(len(lanes.row)):
            i, k = lanes.row[l], lanes.column[l]
            if k >= 0:
                margins[i, k] -= setting.mu * centre[start + i, k]


@inner
def _stage(
    wanted: np.ndarray,
    stage: Any,
    labels: np.ndarray,
    tau: np.ndarray,
    start: int,
    centre: np.ndarray,
    net: Compact,
    tables: Tables,
    setting: Setting,
    sums: Sums,
    place: np.ndarray,
    few: Any,
    work: tuple[np.ndarray, np.ndarray, np.ndarray],
    margins: np.ndarray,
) -> Any:
    """Solve the entries with wanted == stage; returns what their derivatives need."""
    lanes = gather_lanes(wanted, stage, labels, start, tables, place, few)
    if few is None:
        steps = _solve(tau, start, net, setting, lanes, work, margins)
        _lower(lanes, start, centre, setting, margins)
        return lanes, net, steps, sums, sums.in_basis
    local, combination, in_basis, spread = factored(net, lanes, setting, few)
    steps = _solve(tau, start, local, setting, lanes, work, margins)
    _lower(lanes, start, centre, setting, margins)
    return lanes, local, steps, Sums(sums.losses, in_basis, spread, sums.projections, sums.weights), combination


@inner
def _finish(
    solved: Any,
    tau: np.ndarray,
    start: int,
    setting: Setting,
    slopes: np.ndarray,
    work: tuple[np.ndarray, np.ndarray, np.ndarray],
    coefficient: np.ndarray,
    few: Any,
) -> None:
    """Add the derivatives of what :func:`_stage` has solved."""
    lanes, net, steps, sums, combination = solved
    _derive(tau, start, net, setting, lanes, steps, slopes, work, coefficient, sums)
    if few is not None:
        member, row = np.empty(len(few.mixed), np.int64), np.empty(len(few.mixed))
        for slot in range(len(lanes.keys)):
            combine_one(net, combination, sums, lanes.keys[slot] // 2, slot, member, row, few.mixed)


@inner
def _part(
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
    place: np.ndarray,
    few: Any,
    work: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """Rows start..stop at once."""
    margins = np.empty((stop - start, tables.form.shape[1]), tau.dtype)
    _bounds(tau, labels, start, net, tables, setting, work[0], margins)
    if len(centre) > 0:
        for i in range(len(margins)):
            for k in range(margins.shape[1]):
                margins[i, k] -= setting.mu * centre[start + i, k]
    wanted = np.zeros(margins.shape, np.int8)
    lowest = np.zeros(len(margins), np.int64)
    narrow = setting.joint and margins.shape[1] > 1
    if narrow:
        mark_lowest(wanted, lowest, setting, margins)
    else:
        mark_all(wanted, setting, margins)
    given = (labels, tau, start, centre, net, tables, setting, sums, place, few, work, margins)
    first = _stage(wanted, np.int8(1), *given)
    second = third = first
    order = np.empty(margins.shape[1], tau.dtype)
    if narrow:
        mark_near(wanted, lowest, labels, tau, start, net, tables, setting, few, margins)
        second = _stage(wanted, np.int8(2), *given)
        mark_rest(wanted, lowest, setting, margins, order)
        third = _stage(wanted, np.int8(3), *given)
    slopes = np.empty_like(margins)
    for i in range(len(margins)):
        loss(margins[i], setting, order, slopes[i], sums.losses)
    _finish(first, tau, start, setting, slopes, work, coefficient, few)
    if narrow:
        _finish(second, tau, start, setting, slopes, work, coefficient, few)
        _finish(third, tau, start, setting, slopes, work, coefficient, few)


@entry
def run(
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
    few: Any,
) -> None:
    """Rows start..stop of a chunk: projections tau (N, rows) -> coefficients (N, rows) of the rows, and sums.

    centre is (rows, K), what smoothing is centred on, or (0, K) for nothing (problems/multipliers.py).
    few is None where all forms are factored; else (:class:`Few`) some rows are worked on at a time, with their forms.
    """
    size = net.lift.shape[1]
    work = (
        np.zeros((size, LANES), tau.dtype),
        np.zeros((size, LANES), tau.dtype),
        np.zeros((size + 1, LANES), tau.dtype),
    )
    for j in range(len(coefficient)):
        for i in range(start, stop):
            coefficient[j, i] = setting.zero
    if few is None and not tables.pairwise:
        separate(tau, labels, start, stop, centre, net, tables, setting, coefficient, sums, work)
        return
    place = np.zeros(2 * len(net.plus), np.int64)
    rows = max(1, stop - start) if few is None else few.rows
    for begin in range(start, stop, rows):
        end = min(begin + rows, stop)
        _part(tau, labels, begin, end, centre, net, tables, setting, coefficient, sums, place, few, work)
