"""Compiled: one part of a chunk from projections to derivatives; the reference is problems/adjoint.py with its sources.

Rows are worked on in tiles of at most ``LANES`` that share a form. Loops over a tile run along memory, so that they
become vector instructions, and a tile stays in the first cache.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convex_head.kernels.compiled import Compact, Setting, Sums, Tables, entry, inner, inner_sums

LANES = 64
# Tiles are filled up to a multiple of this, so that loops have no scalar rest.
_STEP = 8
_MAX_NEWTON = 60


@inner
def _product(left: np.ndarray, right: np.ndarray, rows: int, size: int, width: int, out: np.ndarray) -> None:
    """out = left @ right on (rows, size) and (size, width), four rows and terms at a time.

    All have room for a multiple of 4, where left is zero beyond ``size`` and out has no meaning beyond ``rows``.
    """
    for i in range(0, rows, 4):
        o0, o1, o2, o3 = out[i], out[i + 1], out[i + 2], out[i + 3]
        for l in range(width):
            o0[l], o1[l], o2[l], o3[l] = 0.0, 0.0, 0.0, 0.0
        for j in range(0, size, 4):
            r0, r1, r2, r3 = right[j], right[j + 1], right[j + 2], right[j + 3]
            a0, a1, a2, a3 = left[i, j], left[i, j + 1], left[i, j + 2], left[i, j + 3]
            b0, b1, b2, b3 = left[i + 1, j], left[i + 1, j + 1], left[i + 1, j + 2], left[i + 1, j + 3]
            c0, c1, c2, c3 = left[i + 2, j], left[i + 2, j + 1], left[i + 2, j + 2], left[i + 2, j + 3]
            d0, d1, d2, d3 = left[i + 3, j], left[i + 3, j + 1], left[i + 3, j + 2], left[i + 3, j + 3]
            for l in range(width):
                x0, x1, x2, x3 = r0[l], r1[l], r2[l], r3[l]
                o0[l] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                o1[l] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
                o2[l] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
                o3[l] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3


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
            _product(net.root[f], slopes, end - begin, end - begin, width, across)
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
def _gather(tau: np.ndarray, start: int, net: Compact, form: int, row: np.ndarray, out: np.ndarray) -> int:
    """Projections (K, lanes) on the neurons of a form; returns K."""
    position = 0
    for function in (net.plus[form], net.minus[form]):
        if function >= 0:
            for j in range(net.offsets[function], net.offsets[function + 1]):
                t, o = tau[j, start:], out[position]
                for l in range(len(row)):
                    o[l] = t[row[l]]
                position += 1
    return position


@inner
def _tile(flat: np.ndarray, height: int, begin: int, width: int) -> np.ndarray:
    """(height, width) of the lanes from ``begin`` on."""
    return flat[height * begin : height * (begin + width)].reshape((height, width))


@inner
def _secular(gaps: np.ndarray, size: int, magnitude: np.ndarray, width: int, floor: Any, setting: Setting) -> np.ndarray:
    """Largest root delta >= floor of |magnitude / (gaps + delta)| = radius, or floor; (width,)."""
    zero, one, tiny = setting.zero, setting.one, setting.tiny
    inverse_radius = one / setting.radius
    delta, norm2, slope = np.empty_like(magnitude[0]), np.empty_like(magnitude[0]), np.empty_like(magnitude[0])
    largest = gaps[0]
    for l in range(width):
        delta[l], norm2[l] = floor, zero
    for i in range(size):
        m, gap = magnitude[i], gaps[i]
        largest = max(largest, gap)
        for l in range(width):
            norm2[l] += m[l] * m[l]
            delta[l] = max(delta[l], m[l] * inverse_radius - gap)
    for l in range(width):
        delta[l] = max(delta[l], math.sqrt(norm2[l]) * inverse_radius - largest)
    for _ in range(_MAX_NEWTON):
        for l in range(width):
            norm2[l], slope[l] = zero, zero
        for i in range(size):
            m, gap = magnitude[i], gaps[i]
            for l in range(width):
                inverse = one / max(gap + delta[l], tiny)
                square = (m[l] * inverse) * (m[l] * inverse)
                norm2[l] += square
                slope[l] += square * inverse
        moving = 0
        for l in range(width):
            step = norm2[l] / max(slope[l], tiny) * (math.sqrt(norm2[l]) * inverse_radius - one)
            new = max(delta[l] + step, delta[l])
            moving += new - delta[l] > setting.tol * new
            slope[l] = new
        if moving == 0:
            break
        for l in range(width):
            delta[l] = slope[l]
    return delta


@inner
def _minimise(
    eigenvalues: np.ndarray,
    negative: int,
    rank: int,
    gradient: np.ndarray,
    width: int,
    setting: Setting,
    value: np.ndarray,
    magnitude: np.ndarray,
    gaps: np.ndarray,
    e: np.ndarray,
    spread: np.ndarray,
) -> None:
    """Add the minimum over the ball to value; write e and, with blur, spread (rank, width)."""
    zero, one, half = setting.zero, setting.one, setting.half
    radius, blur = setting.radius, setting.blur
    if radius == zero or (rank == 0 and blur == zero):
        return
    size = rank
    for i in range(rank):
        gaps[i] = -eigenvalues[i] if negative else eigenvalues[i]
        g, m = gradient[i], magnitude[i]
        for l in range(width):
            m[l] = math.sqrt(g[l] * g[l] + blur * blur)
    if blur > zero and setting.features > rank:
        gaps[rank] = zero
        flat = blur * magnitude.dtype.type(math.sqrt(setting.features - rank))
        for l in range(width):
            magnitude[rank, l] = flat
        size = rank + 1
    lowest, place = gaps[0], 0
    for i in range(size):
        if gaps[i] < lowest:
            lowest, place = gaps[i], i
    for i in range(size):
        gaps[i] -= lowest
    delta = _secular(gaps, size, magnitude, width, max(lowest, zero), setting)
    norm2, quotient = np.zeros_like(magnitude[0]), np.zeros_like(magnitude[0])
    for i in range(size):
        m, gap = magnitude[i], gaps[i]
        for l in range(width):
            scaled = m[l] / max(gap + delta[l], setting.tiny)
            norm2[l] += scaled * scaled
            quotient[l] += m[l] * scaled
    for l in range(width):
        value[l] -= half * (quotient[l] + (delta[l] - lowest) * radius * radius)
        quotient[l] = radius / math.sqrt(max(norm2[l], radius * radius))
    for i in range(rank):
        g, out, around, gap = gradient[i], e[i], spread[i] if blur > zero else e[i], gaps[i]
        for l in range(width):
            shrink = quotient[l] / max(gap + delta[l], setting.tiny)
            out[l] = -g[l] * shrink
            if blur > zero:
                around[l] = (blur * shrink) * (blur * shrink)
    if blur == zero and lowest < zero:
        # The hard case: onto the sphere along the lowest eigenvector.
        for l in range(width):
            missing = radius * radius - norm2[l]
            if missing > setting.hard * radius * radius:
                length = math.sqrt(max(missing + e[place, l] * e[place, l], zero))
                e[place, l] = -length if gradient[place, l] > zero else length


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
            size = _gather(tau, start, net, form, row[begin : begin + width], slopes)
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
            _product(net.project[form], slopes, rank, size, width, gradient)
            _minimise(
                net.eigenvalues[form],
                negative,
                rank,
                gradient,
                width,
                setting,
                value,
                magnitude,
                gaps,
                _tile(e, height, begin, width),
                _tile(spread, height if len(spread) else 0, begin, width),
            )
            for l in range(width):
                if column[begin + l] >= 0:
                    margins[row[begin + l], column[begin + l]] = value[l]
    return e, spread


@inner
def _loss(margins: np.ndarray, setting: Setting, order: np.ndarray, slopes: np.ndarray, losses: np.ndarray) -> None:
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


@inner_sums
def _add_outer(left: np.ndarray, right: np.ndarray, rank: int, size: int, width: int, out: np.ndarray) -> None:
    """out (rank, size) += left @ right', sums over the lanes; all have room for a multiple of 4."""
    for i in range(0, rank, 2):
        a, b = left[i], left[i + 1]
        for j in range(0, size, 4):
            r0, r1, r2, r3 = right[j], right[j + 1], right[j + 2], right[j + 3]
            s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = left.dtype.type(0)
            for l in range(width):
                s0 += a[l] * r0[l]
                s1 += a[l] * r1[l]
                s2 += a[l] * r2[l]
                s3 += a[l] * r3[l]
                t0 += b[l] * r0[l]
                t1 += b[l] * r1[l]
                t2 += b[l] * r2[l]
                t3 += b[l] * r3[l]
            out[i, j] += s0
            out[i, j + 1] += s1
            out[i, j + 2] += s2
            out[i, j + 3] += s3
            out[i + 1, j] += t0
            out[i + 1, j + 1] += t1
            out[i + 1, j + 2] += t2
            out[i + 1, j + 3] += t3


@inner_sums
def _dot(left: np.ndarray, right: np.ndarray, width: int) -> Any:
    total = left.dtype.type(0)
    for l in range(width):
        total += left[l] * right[l]
    return total


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
            size = _gather(tau, start, net, form, here, at_worst)
            step = _tile(e, height, begin, width)
            _product(net.lift[form], step, size, rank, width, across)
            positives = net.offsets[plus + 1] - net.offsets[plus]
            for position in range(size):
                own = position < positives
                j = net.offsets[plus] + position if own else net.offsets[minus] + position - positives
                s = sign if own else -sign
                projection, change, out = at_worst[position], across[position], coefficient[j, start:]
                twice, linear = s * net.twice[j], s * net.linear[j]
                for l in range(width):
                    projection[l] += change[l]
                sums.projections[j] += s * _dot(omega, projection, width)
                sums.weights[j] += s * total
                for l in range(width):
                    projection[l] = omega[l] * (twice * projection[l] + linear)
                for l in range(width):
                    out[here[l]] += projection[l]
            in_basis = sums.in_basis[form]
            _add_outer(step, at_worst, rank, size, width, in_basis)
            if setting.blur > setting.zero:
                around = _tile(spread, height, begin, width)
                for i in range(rank):
                    weight = _dot(omega, around[i], width)
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
        _loss(margins[i], setting, order, slopes[i], sums.losses)
    for j in range(len(coefficient)):
        for i in range(start, stop):
            coefficient[j, i] = setting.zero
    _derive(tau, start, net, setting, lanes, steps, slopes, work, coefficient, sums)
    if narrow:
        _derive(tau, start, net, setting, others, more, slopes, work, coefficient, sums)
