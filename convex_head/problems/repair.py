"""Repair of a dual point: the best slopes on worst-case points that are known already.

Near the optimum of the smoothed problem every slope is (1 - w) / mu, so that small errors of a network become large
ones of the moments A_c, and the bound, which is scaled down by the worst neuron on the sphere, is far worse than the
network. Worst-case points may stay as they are: the bound holds for any slopes in S and any points in the balls
(problems/polynomial.py). So slopes are solved for anew (problems/interior_point.py), no worst case is.

Some hundreds of slopes are free, those of whole examples picked at random among the ones that S leaves room, and the
others keep their proportions: there are far fewer neurons to satisfy than that. The neurons are first those of the
network and the leading eigenvectors of A_c. The exact oracle bounds what the slopes prove; the worst neurons that it
finds are added, and the next round goes on from there. Margins of one function alone are not repaired: their bounds
are good as they are.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork
from convex_head.problems.dual import DualPoint, OracleAnswer, oracle
from convex_head.problems.dual_rows import DualRows, RowLayout
from convex_head.problems.interior_point import FreeRows, SlopeProgram
from convex_head.problems.losses import MarginLoss
from convex_head.problems.moments import moment_of
from convex_head.shards import Whole

# Rounds; fewer where it is asked to go on, because the time is out, and of more functions than the third number, whose
# rounds are dear; of more than the fourth none, unless it is asked to go on.
_ROUNDS, _FEW_ROUNDS, _MANY, _TOO_MANY = 5, 2, 32, 128
# Free slopes, of all processes; examples are shuffled by products with an odd number.
_FREE, _ODD = 500, 2654435761
# Leading eigenvectors of each function and sign, and of all together about.
_LEADING, _ALL_LEADING = 64, 1 << 14
# Of a bound for some neurons a share of tol is lost to the others.
_BEYOND = 0.2
# Slopes of an example that reach their limit up to this share do.
_FULL = 1e-3
# Neurons of less norm than this share of the largest do not count; those of the oracle do from this share of reg on.
_SMALL, _NEAR = 1e-3, 0.98


def repaired(
    rows: DualRows,
    packed: PackedNetwork,
    answer: OracleAnswer,
    *,
    loss: MarginLoss,
    num_classes: int,
    coefficients: tuple[float, float, float],
    reg: float,
    n: int,
    number: Tensor,
    primal: float,
    tol: float,
    persist: bool,
    shard: Whole,
) -> OracleAnswer:
    """``answer`` with the best bound that repaired slopes prove, its own if they prove nothing more.

    Args:
        rows: margins with a slope, and their worst-case points.
        packed: the network that they belong to.
        answer: the oracle's at the slopes of ``rows``.
        loss, num_classes, coefficients, reg, shard: of the problem.
        n: examples of all processes.
        number: (n here,) of each example held here among those of all processes.
        primal: the lowest objective known; no bound is higher.
        tol: a bound within this share of it is good enough.
        persist: go on where that is out of reach.
    """
    cap, aim = loss.share(num_classes) / n, (1 - tol) * primal
    functions, d = len(packed.signs), packed.vectors.shape[-1]
    if functions > _TOO_MANY and not persist:
        return answer
    leading = min(_LEADING, max(1, _ALL_LEADING // (2 * functions)))
    free, is_free = _gathered(rows, _order(rows, number, cap), loss.joint, shard)
    if len(free.slope) == 0:
        return answer
    rest = _dual_point(rows, ~is_free, functions, coefficients, shard)
    kept = _neurons(packed)
    is_narrow = kept.shape[-1] + leading < d
    if is_narrow:
        whole = _dual_point(rows, torch.ones_like(is_free), functions, coefficients, shard)
        kept = torch.cat([kept, _leading(whole.moments[:, :d, :d], leading)], dim=-1)
    x = torch.cat([free.slope, free.slope.new_ones(1)])
    best = answer
    for _ in range(_ROUNDS if functions <= _MANY and not persist else _FEW_ROUNDS):
        is_narrow = is_narrow and kept.shape[-1] < d
        basis = torch.linalg.qr(kept).Q if is_narrow else torch.eye(d).to(kept).expand(functions, 2, d, d)
        program = SlopeProgram(free, rest, basis, cap=cap, coefficients=coefficients, reg=reg)
        x = program.maximise(x, aim + (_BEYOND * (primal - aim) if is_narrow else 0.0), primal, persist)
        # Of several processes all go on from the same numbers.
        x = x.new_tensor(shard.first_of(x.tolist()))
        found = oracle(program.point(x), reg)
        best = max(best, found, key=lambda answer: answer.dual)
        if best.dual >= aim or not is_narrow:
            break
        near = (found.values > _NEAR * reg).to(x).unsqueeze(-1)
        kept = torch.cat([kept, (found.directions * near).mT], dim=-1)
        x = x * min(1.0, reg / float(found.bounds.amax()))
    return dataclasses.replace(answer, dual=best.dual)


def _order(rows: DualRows, number: Tensor, cap: float) -> Tensor:
    """(N,) whose slopes are free first: a shuffle of the examples, those ahead where S leaves a slope room to move.

    It depends on the number (n,) of an example among those of all processes alone; rows of an example are equal. Those
    of more margins than may be free are behind as well.
    """
    has_room = torch.zeros(len(number), dtype=torch.bool, device=number.device)
    has_room[rows.example[rows.slope < (1 - _FULL) * cap]] = True
    has_room &= torch.bincount(rows.example, minlength=len(number)) <= _FREE
    shuffled = (number * _ODD) % (1 << 32) + (1 << 32) * (~has_room).long()
    return shuffled[rows.example]


def _first(order: Tensor) -> tuple[Tensor, float]:
    """Places of the first rows, as many whole examples as may be free, and the order of the first example left out."""
    places = torch.argsort(order, stable=True)
    if len(order) <= _FREE:
        return places, math.inf
    out = float(order[places[_FREE]])
    return places[order[places] < out], out


def _gathered(rows: DualRows, order: Tensor, joint: bool, shard: Whole) -> tuple[FreeRows, Tensor]:
    """The margins of all processes whose slopes are free, and which of the rows here these are (N,)."""
    mine, out = _first(order)
    columns = [order.unsqueeze(1), rows.sign.unsqueeze(1), rows.slope.unsqueeze(1), rows.functions, rows.points]
    table = torch.cat([column[mine].double() for column in columns], dim=1)
    tables = table.new_zeros(shard.size, _FREE, table.shape[1])
    tables[shard.rank, : len(table)] = table
    least = table.new_tensor([-out])
    shard.sum(tables)
    shard.max(least)
    table = tables[(tables[:, :, 1] != 0) & (tables[:, :, 0] < -least)]
    table = table[_first(table[:, 0])[0]]
    group = torch.unique(table[:, 0], return_inverse=True)[1] if joint else torch.arange(len(table)).to(mine)
    free = FreeRows(table[:, 5:], table[:, 3:5].long(), table[:, 1], table[:, 2], group)
    return free, torch.isin(order.double(), table[:, 0])


def _dual_point(
    rows: DualRows, which: Tensor, functions: int, coefficients: tuple[float, float, float], shard: Whole
) -> DualPoint:
    """Mass and moments of some margins of all processes."""
    some = DualRows(*(getattr(rows, field.name)[which] for field in dataclasses.fields(rows)))
    layout = RowLayout(some, functions)
    parts = zip(layout.spread(some.slope), layout.points, strict=True)
    moments = torch.stack([moment_of(weight, x, coefficients) for weight, x in parts])
    mass = some.slope.double().sum().view(1)
    shard.sum(mass, moments)
    return DualPoint(mass, moments)


def _neurons(packed: PackedNetwork) -> Tensor:
    """Directions of the network's neurons by function and sign, (F, 2, d, m), float64, and zeros."""
    norm = packed.nu
    counts = norm > _SMALL * norm.amax()
    unit = packed.vectors / norm.clamp_min(torch.finfo(norm.dtype).tiny).unsqueeze(-1)
    halves = [unit * (counts & (sign * packed.signs > 0)).to(unit).unsqueeze(-1) for sign in (1, -1)]
    return torch.stack(halves, dim=1).mT.double()


def _leading(quadratic: Tensor, count: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues of Q and of -Q, (F, d, d) -> (F, 2, d, k)."""
    vectors = torch.linalg.eigh(0.5 * (quadratic + quadratic.mT)).eigenvectors
    return torch.stack([vectors[..., -count:], vectors[..., :count]], dim=1)
