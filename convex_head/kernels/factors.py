"""Compiled: the factors of all forms of a network, as in adversary/margins.py, without padding of functions.

Where the neurons of a form are independent, a Cholesky factor of their products stands for their eigendecomposition.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convex_head.kernels.compiled import Compact, entry, inner

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
    eigenvalues, y = np.linalg.eigh(hessian)
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
    """Fill the factors of every ``parts``-th form, and combination (T, M, M) float64 with their Z."""
    member = np.empty(len(gram), np.int64)
    for form in range(part, len(net.plus), parts):
        size = _members(net, form, member)
        positive = net.offsets[net.plus[form] + 1] - net.offsets[net.plus[form]]
        own, signs = np.empty((size, size)), np.empty(size)
        for i in range(size):
            signs[i] = beta[member[i]] if i < positive else -beta[member[i]]
            for j in range(size):
                own[i, j] = gram[member[i], member[j]]
        rank = min(features, size)
        net.rank[form] = rank
        if rank == 0:
            continue
        eigenvalues, lift, z = _factor_form(own, signs, a, rank)
        net.curvature[0, form], net.curvature[1, form] = min(0.0, eigenvalues[0]), min(0.0, -eigenvalues[rank - 1])
        for i in range(rank):
            net.eigenvalues[form, i] = eigenvalues[i]
            for j in range(size):
                net.lift[form, j, i], net.project[form, i, j] = lift[j, i], lift[j, i]
                combination[form, j, i] = z[j, i]


@entry
def combine(net: Compact, combination: np.ndarray, in_basis: np.ndarray, out: np.ndarray) -> None:
    """Add Z in_basis of every form to out (N, N): row j has the combination of neurons that moves neuron j."""
    member, row = np.empty(len(out), np.int64), np.empty(len(out))
    for form in range(len(net.plus)):
        size, rank = _members(net, form, member), net.rank[form]
        z, sums = combination[form], in_basis[form]
        for i in range(size):
            for j in range(size):
                row[j] = 0.0
            for l in range(rank):
                share = z[i, l]
                for j in range(size):
                    row[j] += share * sums[l, j]
            for j in range(size):
                out[member[j], member[i]] += row[j]
