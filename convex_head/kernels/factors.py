"""Compiled: the factors of all forms of a network, as in adversary/margins.py, without padding of functions.

Where the neurons of a form are independent, a Cholesky factor of their products stands for their eigendecomposition.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convex_head.kernels.compiled import Compact, Sums, entry, inner

_NULL = 1e-13
# Share of a neuron's square that those before it leave, below which they are taken as dependent.
_DEPENDENT = 1e-8


@inner
def _cholesky(gram: np.ndarray, lower: np.ndarray) -> bool:
    """Lower factor of gram; False where rows are nearly dependent."""
    size = len(gram)
    for i in range(size):
        for j in range(i + 1):
            total = gram[i, j]
            for l in range(j):
                total -= lower[i, l] * lower[j, l]
            if i == j:
                if not total > _DEPENDENT * gram[i, i]:
                    return False
                lower[i, i] = math.sqrt(total)
            else:
                lower[i, j] = total / lower[j, j]
    return True


@inner
def _root(gram: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """R' (K, k) and S (K, k) with R'R = gram, S = W diag(s)^(-1/2) of adversary/margins.py (zero where s is)."""
    square, vectors = np.linalg.eigh(gram)
    size = len(gram)
    root, inverse = np.zeros((size, rank)), np.zeros((size, rank))
    largest = square[size - 1]
    for i in range(rank):
        value = square[size - rank + i]
        if value > 0.0:
            scale = math.sqrt(value)
            for j in range(size):
                root[j, i] = vectors[j, size - rank + i] * scale
                if value > _NULL * largest:
                    inverse[j, i] = vectors[j, size - rank + i] / scale
    return root, inverse


@entry
def factor_functions(gram: np.ndarray, net: Compact) -> None:
    """Fill ``net.root``: the transpose of L, L L' the products of the neurons of a function."""
    for f in range(len(net.base)):
        begin, end = net.offsets[f], net.offsets[f + 1]
        size = end - begin
        if size == 0:
            continue
        own, lower = np.empty((size, size)), np.zeros((size, size))
        for i in range(size):
            for j in range(size):
                own[i, j] = gram[begin + i, begin + j]
        if not _cholesky(own, lower):
            lower = _root(own, size)[0]
        for i in range(size):
            for j in range(size):
                net.root[f, i, j] = lower[j, i]


@inner
def _eigen(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending eigenvalues and eigenvectors of a symmetric matrix; of 2 x 2 by one rotation."""
    if len(matrix) != 2:
        return np.linalg.eigh(matrix)
    p, q, r = matrix[0, 0], matrix[1, 0], matrix[1, 1]
    if not math.isfinite(p + q + r):
        raise np.linalg.LinAlgError("Array must not contain infs or NaNs.")
    tangent = 0.0
    if q != 0.0:
        half = (r - p) / (2.0 * q)
        tangent = math.copysign(1.0, half) / (abs(half) + math.hypot(1.0, half))
    cosine = 1.0 / math.hypot(1.0, tangent)
    sine = tangent * cosine
    values, vectors = np.empty(2), np.empty((2, 2))
    values[0], values[1] = p - tangent * q, r + tangent * q
    first = 0 if values[0] <= values[1] else 1
    vectors[0, first], vectors[1, first] = cosine, -sine
    vectors[0, 1 - first], vectors[1, 1 - first] = sine, cosine
    if first == 1:
        values[0], values[1] = values[1], values[0]
    return values, vectors


@inner
def _factor_form(gram: np.ndarray, beta: np.ndarray, a: float, rank: int) -> tuple[Any, Any, Any]:
    """Eigenvalues (k,), P (K, k) and Z (K, k) of adversary/margins.py."""
    size = len(gram)
    root = np.zeros((size, size))
    independent = rank == size and _cholesky(gram, root)
    inverse = root
    if not independent:
        root, inverse = _root(gram, rank)
    weighted = np.empty((size, rank))
    for j in range(size):
        for i in range(rank):
            weighted[j, i] = 2.0 * a * beta[j] * root[j, i]
    # The factorisation reads the lower triangle.
    hessian = np.zeros((rank, rank))
    for l in range(size):
        for i in range(rank):
            for j in range(rank):
                hessian[i, j] += root[l, i] * weighted[l, j]
    eigenvalues, y = _eigen(hessian)
    lift, combination = np.zeros((size, rank)), np.zeros((size, rank))
    for l in range(size):
        for i in range(rank):
            for j in range(rank):
                lift[l, j] += root[l, i] * y[i, j]
    if independent:
        # root' combination = y, from the last row on.
        for l in range(size - 1, -1, -1):
            for j in range(rank):
                combination[l, j] = y[l, j]
            for i in range(l + 1, size):
                for j in range(rank):
                    combination[l, j] -= root[i, l] * combination[i, j]
            for j in range(rank):
                combination[l, j] /= root[l, l]
    else:
        for l in range(size):
            for i in range(rank):
                for j in range(rank):
                    combination[l, j] += inverse[l, i] * y[i, j]
    return eigenvalues, lift, combination


@inner
def _members(net: Compact, form: int, out: np.ndarray) -> int:
    """Write the neurons of a form into out and return their number."""
    count = 0
    for j in range(net.offsets[net.plus[form]], net.offsets[net.plus[form] + 1]):
        out[count] = j
        count += 1
    if net.minus[form] >= 0:
        for j in range(net.offsets[net.minus[form]], net.offsets[net.minus[form] + 1]):
            out[count] = j
            count += 1
    return count


@inner
def factor_one(
    gram: np.ndarray,
    beta: np.ndarray,
    a: float,
    features: int,
    net: Compact,
    combination: np.ndarray,
    form: int,
    slot: int,
    member: np.ndarray,
) -> None:
    """Fill the factors of a form at its slot, and combination (S, M, M) float64 with its Z; member has room for N."""
    size = _members(net, form, member)
    positive = net.offsets[net.plus[form] + 1] - net.offsets[net.plus[form]]
    own, signs = np.empty((size, size)), np.empty(size)
    for i in range(size):
        signs[i] = beta[member[i]] if i < positive else -beta[member[i]]
        for j in range(size):
            own[i, j] = gram[member[i], member[j]]
    rank = min(features, size)
    net.rank[slot] = rank
    if rank == 0:
        return
    eigenvalues, lift, z = _factor_form(own, signs, a, rank)
    for i in range(rank):
        net.eigenvalues[slot, i] = eigenvalues[i]
        for j in range(size):
            net.lift[slot, j, i], net.project[slot, i, j] = lift[j, i], lift[j, i]
            combination[slot, j, i] = z[j, i]


@entry
def factor(
    gram: np.ndarray,
    beta: np.ndarray,
    a: float,
    features: int,
    net: Compact,
    combination: np.ndarray,
    part: int,
    parts: int,
) -> None:
    """Fill the factors of every ``parts``-th form, its curvatures, and combination."""
    member = np.empty(len(gram), np.int64)
    for form in range(part, len(net.plus), parts):
        factor_one(gram, beta, a, features, net, combination, form, form, member)
        if net.rank[form] > 0:
            lowest, highest = net.eigenvalues[form, 0], net.eigenvalues[form, net.rank[form] - 1]
            net.curvature[0, form], net.curvature[1, form] = min(0.0, lowest), min(0.0, -highest)


@entry
def bend_functions(gram: np.ndarray, beta: np.ndarray, a: float, features: int, net: Compact) -> None:
    """Fill ``net.curvature`` with bounds from the functions of every form: of f - g, f's less g's."""
    low, high = np.zeros(len(net.base)), np.zeros(len(net.base))
    for f in range(len(net.base)):
        begin, end = net.offsets[f], net.offsets[f + 1]
        rank = min(features, end - begin)
        if rank > 0:
            own = np.ascontiguousarray(gram[begin:end, begin:end])
            eigenvalues, _, _ = _factor_form(own, beta[begin:end], a, rank)
            low[f], high[f] = min(0.0, eigenvalues[0]), max(0.0, eigenvalues[rank - 1])
    for form in range(len(net.plus)):
        plus, minus = net.plus[form], net.minus[form]
        net.curvature[0, form] = low[plus] - (high[minus] if minus >= 0 else 0.0)
        net.curvature[1, form] = (low[minus] if minus >= 0 else 0.0) - high[plus]


@inner
def combine_one(
    net: Compact,
    combination: np.ndarray,
    sums: Sums,
    form: int,
    slot: int,
    member: np.ndarray,
    row: np.ndarray,
    out: np.ndarray,
) -> None:
    """Add Z (in_basis + spread P' 2 a beta) of a form to out (N, N): row j combines the neurons that move neuron j."""
    size, rank = _members(net, form, member), net.rank[slot]
    positives = net.offsets[net.plus[form] + 1] - net.offsets[net.plus[form]]
    z, in_basis, spread = combination[slot], sums.in_basis[slot], sums.spread[slot]
    for l in range(rank):
        if spread[l] != 0.0:
            for j in range(size):
                twice = net.twice[member[j]] if j < positives else -net.twice[member[j]]
                in_basis[l, j] += spread[l] * twice * net.lift[slot, j, l]
            spread[l] = 0.0
    for i in range(size):
        for j in range(size):
            row[j] = 0.0
        for l in range(rank):
            share = z[i, l]
            for j in range(size):
                row[j] += share * in_basis[l, j]
        for j in range(size):
            out[member[j], member[i]] += row[j]


@entry
def combine(net: Compact, combination: np.ndarray, sums: Sums, out: np.ndarray) -> None:
    """:func:`combine_one` of all forms."""
    member, row = np.empty(len(out), np.int64), np.empty(len(out))
    for form in range(len(net.plus)):
        combine_one(net, combination, sums, form, form, member, row, out)
