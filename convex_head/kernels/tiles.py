"""Compiled: products and sums on tiles, arrays (K, lanes) whose columns are rows of the data that share a form."""

from __future__ import annotations

from typing import Any

import numpy as np

from convex_head.kernels.compiled import Compact, inner, inner_sums

# Columns of a tile, at most, and a multiple that they are filled up to, so that loops have no scalar rest.
LANES = 256
STEP = 8


@inner
def product(left: np.ndarray, right: np.ndarray, rows: int, size: int, width: int, out: np.ndarray) -> None:
    """out = left @ right on (rows, size) and (size, width), four rows and terms at a time.

    All have room for a multiple of 4, where left is zero beyond ``size`` and out has no meaning beyond ``rows``.
    """
    if size == 1 and rows == 1:
        for l in range(width):
            out[0, l] = left[0, 0] * right[0, l]
        return
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
def gather(tau: np.ndarray, start: int, net: Compact, form: int, row: np.ndarray, out: np.ndarray) -> int:
    """Projections (K, lanes) on the neurons of a form; returns K."""
    position, first = 0, start + row[0]
    together = _are_together(row)
    for function in (net.plus[form], net.minus[form]):
        if function >= 0:
            for j in range(net.offsets[function], net.offsets[function + 1]):
                o = out[position]
                if together:
                    t = tau[j, first:]
                    for l in range(len(row)):
                        o[l] = t[l]
                else:
                    t = tau[j, start:]
                    for l in range(len(row)):
                        o[l] = t[row[l]]
                position += 1
    return position


@inner
def scatter(values: np.ndarray, start: int, row: np.ndarray, out: np.ndarray) -> None:
    """Add a value (lanes,) to out at each row."""
    if _are_together(row):
        o = out[start + row[0] :]
        for l in range(len(row)):
            o[l] += values[l]
    else:
        o = out[start:]
        for l in range(len(row)):
            o[row[l]] += values[l]


@inner
def _are_together(row: np.ndarray) -> bool:
    """Rows, which ascend but for those that fill up, have no gap; then loops over them are vector instructions."""
    return row[len(row) - 1] - row[0] == len(row) - 1


@inner
def tile(flat: np.ndarray, height: int, begin: int, width: int) -> np.ndarray:
    """(height, width) of the lanes from ``begin`` on."""
    return flat[height * begin : height * (begin + width)].reshape((height, width))


@inner_sums
def add_outer(left: np.ndarray, right: np.ndarray, rank: int, size: int, width: int, out: np.ndarray) -> None:
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
def dot(left: np.ndarray, right: np.ndarray, width: int) -> Any:
    total = left.dtype.type(0)
    for l in range(width):
        total += left[l] * right[l]
    return total
