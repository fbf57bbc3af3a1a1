"""Compiled: one part of a chunk from projections to derivatives; the reference is problems/adjoint.py with its sources.

Rows are worked on in tiles of at most ``LANES`` that share a form. Loops over a tile run along memory, so that they
become vector instructions, and a tile stays in the first cache.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convex_head.kernels.ball import minimise
from convex_head.kernels.compiled import Compact, Setting, Sums, Tables, entry, inner
from convex_head.kernels.loss import loss
from convex_head.kernels.tiles import add_outer, dot, gather, product, tile

LANES = 64
# Tiles are filled up to a multiple of this, so that loops have no scalar rest.
_STEP = 8


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
                form, negative, rival = tables.form[k, label], tables.negative[k, label], tables.rival[k, label]
                value, norm = values[rival, l], norms[rival, l]
                if tables.pairwise:
                    value, norm = values[label, l] - value, norm + norms[label, l]
                elif negative:
                    value = -value
                margins[first + l, k] = value - setting.radius * norm + curved * net.curvature[negative, form]


@inner
def _lanes(wanted: np.ndarray, stage: Any, labels: np.ndarray, start: int, tables: Tables, forms: int) -> Any:
    """Entries (row, column) with wanted == stage, those of a form and sign together, each filled up with column -1.

    Returns the first lane of every key 2 form + negative and past the last, and rows and columns of the lanes.
    """
    rows, columns = wanted.shape
    first = np.zeros(2 * forms + 1, np.int64)
    for i in range(rows):
        label = labels[start + i]
        for k in range(columns):
            if wanted[i, k] == stage:
                first[2 * tables.form[k, label] + tables.negative[k, label] + 1] += 1
    for key in range(2 * forms):
        first[key + 1] = first[key] + (first[key + 1] + _STEP - 1) // _STEP * _STEP
    row, column = np.empty(first[-1], np.int64), np.empty(first[-1], np.int64)
    place = np.empty(2 * forms, np.int64)
    for key in range(2 * forms):
        place[key] = first[key]
    for i in range(rows):
        label = labels[start + i]
        for k in range(columns):
            if wanted[i, k] == stage:
                key = 2 * tables.form[k, label] + tables.negative[k, label]
                row[place[key]], column[place[key]] = i, k
                place[key] += 1
    for key in range(2 * forms):
        for l in range(place[key], first[key + 1]):
            row[l], column[l] = row[first[key]], -1
    return first, row, column


@inner
def _solve(
    tau: np.ndarray,
    start: int,
    net: Compact,
    setting: Setting,
    lanes: Any,
    work: tuple[np.ndarray, np.ndarray, np.ndarray],
    margins: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact margins of all lanes, into ``margins``; returns steps and spreads, tile by tile (M, width)."""
    first, row, column = lanes
    slopes, gradient, magnitude = work
    height = len(slopes)
    e = np.zeros(height * len(row), tau.dtype)
    spread = np.empty(len(e) if setting.blur > setting.zero else 0, tau.dtype)
    gaps = np.empty(len(magnitude), tau.dtype)
    value = np.empty(LANES, tau.dtype)
    for key in range(len(first) - 1):
        form, negative = key // 2, key % 2
        for begin in range(first[key], first[key + 1], LANES):
            width = min(LANES, first[key + 1] - begin)
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
            rank = net.rank[form]
            product(net.project[form], slopes, rank, size, width, gradient)
            minimise(
                net.eigenvalues[form],
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
    lanes: Any,
    steps: tuple[np.ndarray, np.ndarray],
    slopes: np.ndarray,
    work: tuple[np.ndarray, np.ndarray, np.ndarray],
    coefficient: np.ndarray,
    sums: Sums,
) -> None:
    """Add the derivatives of -slopes * margins / n to coefficient (N, rows) and to the sums (GroupPass.backward)."""
    first, row, column = lanes
    e, spread = steps
    at_worst, across, _ = work
    height = len(at_worst)
    omega = np.empty(LANES, tau.dtype)
    scale = setting.one / tau.dtype.type(setting.examples)
    for key in range(len(first) - 1):
        form, sign = key // 2, -setting.one if key % 2 else setting.one
        plus, minus, rank = net.plus[form], net.minus[form], net.rank[form]
        for begin in range(first[key], first[key + 1], LANES):
            width = min(LANES, first[key + 1] - begin)
            here = row[begin : begin + width]
            total = setting.zero
            for l in range(width):
                k = column[begin + l]
                omega[l] = -scale * slopes[row[begin + l], k] if k >= 0 else setting.zero
                total += omega[l]
            if total == setting.zero:
                continue
            size = gather(tau, start, net, form, here, at_worst)
            step = tile(e, height, begin, width)
            product(net.lift[form], step, size, rank, width, across)
            positives = net.offsets[plus + 1] - net.offsets[plus]
            for position in range(size):
                own = position < positives
                j = net.offsets[plus] + position if own else net.offsets[minus] + position - positives
                s = sign if own else -sign
                projection, change, out = at_worst[position], across[position], coefficient[j, start:]
                twice, linear = s * net.twice[j], s * net.linear[j]
                for l in range(width):
                    projection[l] += change[l]
                sums.projections[j] += s * dot(omega, projection, width)
                sums.weights[j] += s * total
                for l in range(width):
                    projection[l] = omega[l] * (twice * projection[l] + linear)
                for l in range(width):
                    out[here[l]] += projection[l]
            in_basis = sums.in_basis[form]
            add_outer(step, at_worst, rank, size, width, in_basis)
            if setting.blur > setting.zero:
                around = tile(spread, height, begin, width)
                for i in range(rank):
                    weight = dot(omega, around[i], width)
                    for position in range(size):
                        own = position < positives
                        j = net.offsets[plus] + position if own else net.offsets[minus] + position - positives
                        s = sign if own else -sign
                        in_basis[i, position] += weight * s * net.twice[j] * net.lift[form, position, i]


@entry
def run(
    tau: np.ndarray,
    labels: np.ndarray,
    start: int,
    stop: int,
    net: Compact,
    tables: Tables,
    setting: Setting,
    coefficient: np.ndarray,
    sums: Sums,
) -> None:
    """Rows start..stop of a chunk: projections tau (N, rows) -> coefficients (N, rows) of the rows, and sums."""
    size, forms = net.lift.shape[1], len(net.plus)
    work = (
        np.zeros((size, LANES), tau.dtype),
        np.zeros((size, LANES), tau.dtype),
        np.zeros((size + 1, LANES), tau.dtype),
    )
    margins = np.empty((stop - start, tables.form.shape[0]), tau.dtype)
    _bounds(tau, labels, start, net, tables, setting, work[0], margins)
    wanted = np.zeros(margins.shape, np.int8)
    lowest = np.zeros(len(margins), np.int64)
    narrow = setting.joint and margins.shape[1] > 1
    for i in range(len(margins)):
        if narrow:
            for k in range(margins.shape[1]):
                if margins[i, k] < margins[i, lowest[i]]:
                    lowest[i] = k
            wanted[i, lowest[i]] = margins[i, lowest[i]] < setting.threshold
        else:
            for k in range(margins.shape[1]):
                wanted[i, k] = margins[i, k] < setting.threshold
    lanes = _lanes(wanted, np.int8(1), labels, start, tables, forms)
    steps = _solve(tau, start, net, setting, lanes, work, margins)
    others, more = lanes, steps
    if narrow:
        for i in range(len(margins)):
            limit = min(setting.threshold, margins[i, lowest[i]] + setting.window)
            for k in range(margins.shape[1]):
                if wanted[i, k] == 0 and margins[i, k] < limit:
                    wanted[i, k] = 2
        others = _lanes(wanted, np.int8(2), labels, start, tables, forms)
        more = _solve(tau, start, net, setting, others, work, margins)
    slopes, order = np.empty_like(margins), np.empty(margins.shape[1], tau.dtype)
    for i in range(len(margins)):
        loss(margins[i], setting, order, slopes[i], sums.losses)
    for j in range(len(coefficient)):
        for i in range(start, stop):
            coefficient[j, i] = setting.zero
    _derive(tau, start, net, setting, lanes, steps, slopes, work, coefficient, sums)
    if narrow:
        _derive(tau, start, net, setting, others, more, slopes, work, coefficient, sums)
