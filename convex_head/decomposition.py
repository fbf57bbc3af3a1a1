"""Neural decomposition: from the matrices of the convex program to the neurons of a network, and back.

The convex set of one sign and one function is

    S = { Z = [Z1 z2; z2' z4] in R^{(d+1) x (d+1)} : Z positive semidefinite, tr Z1 = z4 }
      = { sum_j alpha_j [u_j; 1][u_j; 1]' : alpha_j >= 0, |u_j| = 1 }.

The second line is the S-lemma's rank-one splitting (Sturm and Zhang 2003, with G = diag(I, -1), so that
tr Z1 = z4 reads <G, Z> = 0; Bartan and Pilanci, arXiv 2101.02429): factor Z = sum_i p_i p_i' with rank(Z)
terms and turn pairs of terms of opposite sign of p'Gp, which leaves their sum alone, until p_i'Gp_i = 0 for
every i. Then p_i = (v; t) has |v| = |t|, and is the neuron u = v/t of weight t^2. So rank(Z) neurons are
enough, and rank(Z) + rank(Z') per function is the width m* of the whole network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from convex_head.errors import DecompositionError
from convex_head.problems.base import Network


def decompose(Z: Tensor, tol: float = 1e-11) -> tuple[Tensor, Tensor]:
    """Split Z in S into at most rank(Z) unit neurons, Z = sum_j weights[j] [u_j; 1][u_j; 1]'.

    Args:
        Z: (d+1, d+1) real matrix with blocks Z1, z2, z4, d >= 1; its symmetric part is meant.
        tol: relative to the largest eigenvalue, how far Z may be from symmetric, PSD and tr Z1 = z4;
            eigenvalues below it count as zero. The reconstruction is accurate to (d+1) tol at worst, and
            to rounding where Z is in S to rounding.

    Returns:
        directions (k, d) with unit rows and weights (k,) >= 0, k <= rank(Z), float64, on the device of Z.

    Raises:
        DecompositionError: Z has the wrong shape, is not finite, or is not in S.
    """
    matrix = _check_matrix(Z)
    scale = float(matrix.abs().max())
    asymmetry = float((matrix - matrix.T).abs().max())
    if asymmetry > tol * scale:
        raise DecompositionError(
            f"Z must be symmetric; entries differ by {asymmetry:.3g}; pass (Z + Z.T) / 2 if that is meant"
        )
    eigenvalues, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    largest = float(eigenvalues.abs().max())
    if float(eigenvalues[0]) < -tol * largest:
        raise DecompositionError(
            f"Z must be positive semidefinite; its smallest eigenvalue is {float(eigenvalues[0]):.3g} "
            f"(largest {largest:.3g}); pass solver output through project() first"
        )
    mismatch = float(matrix.diagonal()[:-1].sum() - matrix[-1, -1])
    if abs(mismatch) > tol * largest:
        raise DecompositionError(
            f"Z must have tr Z1 = z4; tr Z1 - z4 is {mismatch:.3g} (largest eigenvalue {largest:.3g}); "
            "pass solver output through project() first"
        )
    kept = eigenvalues > tol * largest
    factor = (vectors[:, kept] * eigenvalues[kept].sqrt()).T
    directions, weights = _split(factor)
    return directions.to(Z.device), weights.to(Z.device)


def project(Z: Tensor, tol: float = 1e-9) -> Tensor:
    """Move a matrix that is in S only to solver precision into S.

    Eigenvalues of the symmetric part below ``tol`` times the largest become zero. Then the trace condition is
    met exactly by the congruence diag(s I, 1/s) Z diag(s I, 1/s) with s = (z4 / tr Z1)^(1/4): it keeps Z PSD,
    its rank and its linear part z2, and moves tr Z1 and z4 to their geometric mean. A matrix without Z1 or
    without z4 holds no neuron (z2 vanishes with either) and becomes zero.

    Args:
        Z: (d+1, d+1) real matrix, d >= 1.
        tol: relative rank tolerance; the accuracy of the solver that Z comes from.

    Returns:
        (d+1, d+1) float64 matrix in S, on the device of Z.

    Raises:
        DecompositionError: Z has the wrong shape or is not finite.
    """
    matrix = _check_matrix(Z)
    eigenvalues, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = eigenvalues > max(0.0, tol * float(eigenvalues[-1]))
    clipped = (vectors[:, kept] * eigenvalues[kept]) @ vectors[:, kept].T
    trace, corner = float(clipped.diagonal()[:-1].sum()), float(clipped[-1, -1])
    if trace <= 0.0 or corner <= 0.0:
        return torch.zeros_like(matrix).to(Z.device)
    scale = torch.full((len(matrix),), (corner / trace) ** 0.25, dtype=torch.float64)
    scale[-1] = 1.0 / scale[-1]
    return (scale[:, None] * clipped * scale).to(Z.device)


def network_from_moments(positive: Sequence[Tensor], negative: Sequence[Tensor], tol: float = 1e-9) -> Network:
    """The network whose function c has D_c = positive[c] - negative[c], each matrix projected on S first.

    Args:
        positive, negative: for every function c a (d+1, d+1) matrix in S, to the precision of the solver.
        tol: relative rank tolerance of the projection; a larger one gives a narrower network.

    Returns:
        Network in float64 with sum_c rank Z_c + rank Z'_c neurons.

    Raises:
        DecompositionError: the lists differ in length or are empty, or the matrices differ in shape.
    """
    if len(positive) != len(negative) or len(positive) == 0:
        raise DecompositionError(
            "every function needs one positive and one negative matrix; "
            f"found {len(positive)} and {len(negative)}; pass two lists of the same length"
        )
    shapes = {tuple(matrix.shape) for matrix in (*positive, *negative)}
    if len(shapes) != 1:
        raise DecompositionError(f"all matrices must have one shape (d+1, d+1); found {sorted(shapes)}")
    pieces: list[tuple[Tensor, Tensor, int]] = []
    for c, pair in enumerate(zip(positive, negative, strict=True)):
        for sign, matrix in zip((1.0, -1.0), pair, strict=True):
            directions, weights = decompose(project(matrix, tol))
            pieces.append((directions, sign * weights, c))
    return _assemble(pieces)


def moments(network: Network, num_functions: int) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices Z_c and Z'_c of a network: the inverse of :func:`network_from_moments`.

    Args:
        network: neurons of functions 0..num_functions-1.
        num_functions: how many functions there are (a function without neurons has zero matrices).

    Returns:
        (positive, negative), two lists of num_functions float64 matrices (d+1, d+1).

    Raises:
        DecompositionError: a neuron belongs to a function outside 0..num_functions-1.
    """
    if network.size and not 0 <= int(network.function.min()) <= int(network.function.max()) < num_functions:
        found = sorted(set(network.function.tolist()))
        raise DecompositionError(
            f"neurons must belong to functions 0..{num_functions - 1}; found {found}; raise num_functions"
        )
    factors = _lifted(network)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for c in range(num_functions):
        for side, sign in zip(sides, (1, -1), strict=True):
            factor = factors[(network.function == c) & (network.weights.sign() == sign)]
            side.append(factor.T @ factor)
    return sides


def compress(network: Network, tol: float = 1e-11) -> Network:
    """The same functions with the same norm, on at most rank Z_c + rank Z'_c neurons per function c.

    Args:
        network: any network; neurons of one function and sign that are linearly independent stay as they are.
        tol: relative rank tolerance on the eigenvalues of Z_c.

    Returns:
        Network of :func:`optimal_width` neurons, sorted by function, in the argument's dtype and device.
    """
    factors = _lifted(network)
    pieces = [(network.directions[:0], network.weights[:0], 0)]
    for c, sign, members in _groups(network):
        directions, weights = network.directions[members], network.weights[members]
        reduced = _reduce(factors[members], tol)
        if len(reduced) < len(weights):
            directions, weights = _split(reduced)
            weights = sign * weights
        pieces.append((directions, weights, c))
    return _assemble(pieces, like=network)


def optimal_width(network: Network, tol: float = 1e-11) -> int:
    """m* = sum_c rank Z_c + rank Z'_c: how many neurons this point of the convex program needs."""
    factors = _lifted(network)
    return sum(len(_reduce(factors[members], tol)) for _, _, members in _groups(network))


def _check_matrix(Z: Tensor) -> Tensor:
    """Z in float64 on the CPU: the splitting is a sequence of many small steps."""
    if Z.ndim != 2 or Z.shape[0] != Z.shape[1] or Z.shape[0] < 2:
        raise DecompositionError(f"Z must be (d+1, d+1) with d >= 1; found shape {tuple(Z.shape)}")
    if Z.is_complex():
        raise DecompositionError(f"Z must be real; found {Z.dtype}; pass its real part if that is meant")
    matrix = Z.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        count = int((~torch.isfinite(matrix)).sum())
        raise DecompositionError(f"Z must be finite; found {count} entries that are NaN or infinite; check the solver")
    return matrix


def _split(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Neurons of Z = factor' factor with <G, Z> = 0, one for each row of the (k, d+1) factor.

    Every turn settles one row, so k - 1 turns are enough; the last row is settled because <G, Z> = 0.
    """
    scale = float(factor.abs().max()) if factor.numel() else 1.0
    rows = factor / scale
    signature = torch.ones(rows.shape[1], dtype=torch.float64)
    signature[-1] = -1.0
    values = (rows.square() @ signature).tolist()
    above = [i for i, value in enumerate(values) if value > 0]
    below = [i for i, value in enumerate(values) if value < 0]
    while above and below:
        i, j = above[-1], below[-1]
        # Settle the smaller one: the larger keeps its sign and takes the sum.
        if abs(values[i]) > abs(values[j]):
            i, j = j, i
        cross = float((rows[i] * signature) @ rows[j])
        tangent = _root(values[i], cross, values[j])
        norm = math.hypot(1.0, tangent)
        first, second = rows[i].clone(), rows[j].clone()
        rows[i] = (first + tangent * second) / norm
        rows[j] = (second - tangent * first) / norm
        values[j] += values[i]
        (above if values[i] > 0 else below).pop()
        if values[j] == 0.0:
            (above if above and above[-1] == j else below).pop()
    directions, weights = _neurons(rows)
    return directions, scale * scale * weights


def _root(q_first: float, cross: float, q_second: float) -> float:
    """The root t of smaller modulus of q_first + 2 cross t + q_second t^2, where q_first q_second < 0."""
    discriminant = math.sqrt(cross * cross - q_first * q_second)
    return -q_first / (cross + math.copysign(discriminant, cross))


def _neurons(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(directions, weights) of rows (v; t) with |v| = |t| up to rounding, which both share."""
    signs = torch.where(rows[:, -1:] < 0, -1.0, 1.0)
    lengths = rows[:, :-1].norm(dim=1)
    alive = lengths > 0
    directions = (signs * rows[:, :-1])[alive] / lengths[alive, None]
    return directions, rows[alive].square().sum(dim=1) / 2


def _lifted(network: Network) -> Tensor:
    """(M, d+1) float64 rows sqrt|alpha_j| [u_j; 1] on the CPU."""
    directions = network.directions.detach().to("cpu", torch.float64)
    roots = network.weights.detach().to("cpu", torch.float64).abs().sqrt()
    return roots[:, None] * torch.cat([directions, torch.ones_like(roots)[:, None]], dim=1)


def _groups(network: Network) -> list[tuple[int, float, Tensor]]:
    """(function, sign, indices of its neurons) in order; neurons of weight zero belong to none."""
    signs = network.weights.detach().sign()
    found = []
    for c in sorted(set(network.function.tolist())):
        for sign in (1.0, -1.0):
            members = torch.nonzero((network.function == c) & (signs == sign)).flatten().cpu()
            if len(members):
                found.append((c, sign, members))
    return found


def _reduce(factor: Tensor, tol: float) -> Tensor:
    """(rank, d+1) factor of the same Z = factor' factor; singular values are roots of Z's eigenvalues."""
    _, singular, vectors = torch.linalg.svd(factor, full_matrices=False)
    kept = singular.square() > tol * singular[0].square()
    return singular[kept, None] * vectors[kept]


def _assemble(pieces: Sequence[tuple[Tensor, Tensor, int]], like: Network | None = None) -> Network:
    """One network from (directions, weights, function) pieces, in the dtype and on the device of ``like``."""
    target = pieces[0][0] if like is None else like.directions
    functions = [torch.full(weights.shape, c, dtype=torch.int64) for _, weights, c in pieces]
    return Network(
        torch.cat([directions.to(target) for directions, _, _ in pieces]),
        torch.cat([weights.to(target) for _, weights, _ in pieces]),
        torch.cat(functions).to(target.device),
    )
