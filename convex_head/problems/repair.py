"""Repair of a dual point: the best slopes on worst-case points that are known already.

Near the optimum of the smoothed problem every slope is (1 - w) / mu, so that small errors of a network become large
ones of the moments A_c, and the bound, which is scaled down by the worst neuron on the sphere, is far worse than the
network. Worst-case points may stay as they are: the bound holds for any slopes in S and any points in the balls
(problems/polynomial.py). So slopes are solved for anew, no worst case is. First they move by least squares, all at once
(problems/stationary_slopes.py): that is cheap and rough. Where it does not suffice, and functions are neither many nor
large, the best slopes follow by an interior-point method (problems/interior_point.py).

There some hundreds of slopes are free, those of whole examples picked at random among the ones that S leaves room, and
the others keep their proportions: there are far fewer neurons to satisfy than that. The neurons are first those of the
network and the leading eigenvectors of A_c. The exact oracle bounds what the slopes prove; the worst neurons that it
finds are added, and the next round goes on from there, as long as what they allow reaches what is aimed at. Margins of
one function alone are not repaired: their bounds are good as they are.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork
from convex_head.problems.dual import DualPoint, OracleAnswer, oracle
from convex_head.problems.dual_rows import DualRows, RowLayout
from convex_head.problems.interior_point import FreeRows, SlopeProgram
from convex_head.problems.losses import MarginLoss
from convex_head.problems.moments import moment_of
from convex_head.problems.stationary_slopes import has_room, stationary_slopes
from convex_head.shards import Whole

# Rounds of the interior-point method, and where it is asked to go on, because the time is out. It is used for the first
# number of functions, and up to the second where an eigendecomposition of all takes no more than so many operations:
# beyond, its rounds are dear and find little that least squares do not.
_ROUNDS, _LATE_ROUNDS, _FEW, _MANY, _DEAR = 5, 2, 32, 128, 32 * 512**3
# How often slopes move by least squares: before the interior-point method, without it, and where the time is out.
# They stop after one that raises the bound by less than a share of what is aimed at.
_MOVES, _MOVES_ALONE, _LATE_MOVES, _WORTH = 1, 2, 5, 0.01
# A bound below this share of the objective, before any move, is far from the optimum.
_FAR = 0.25
# Free slopes, of all processes; examples are shuffled by products with an odd number.
_FREE, _ODD = 500, 2654435761
# Leading eigenvectors of each function and sign, and of all together about.
_LEADING, _ALL_LEADING = 64, 1 << 14
# Of a bound for some neurons a share of tol is lost to the others. Where it falls short of the aim by more than the
# second share, that is given up.
_BEYOND, _SHORT = 0.2, 0.1
# Neurons of less norm than this share of the largest do not count, those new among them; the oracle's do from this
# share of reg on.
_SMALL, _NEAR = 0.1, 0.98


@dataclass(frozen=True)
class _Setting:
    """Of the problem: functions, whether the loss couples the margins of an example, what S leaves, and so on.

    Attributes:
        until: where ``time.perf_counter`` stands when the time is out.
    """

    functions: int
    joint: bool
    cap: float
    coefficients: tuple[float, float, float]
    reg: float
    shard: Whole
    until: float = math.inf

    def is_over(self, seconds: float = 0.0) -> bool:
        """Whether the time is out so many seconds from now, in any process."""
        return self.shard.any(time.perf_counter() + seconds > self.until)

    def point(self, rows: DualRows) -> DualPoint:
        """Mass and moments of some margins of all processes."""
        layout = RowLayout(rows, self.functions)
        parts = zip(layout.spread(rows.slope), layout.points, strict=True)
        moments = torch.stack([moment_of(weight, x, self.coefficients) for weight, x in parts])
        mass = rows.slope.double().sum().view(1)
        self.shard.sum(mass, moments)
        return DualPoint(mass, moments)


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
    shard: Whole,
    late: bool = False,
    until: float = math.inf,
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
        late: the time is out; go on where that is out of reach.
        until: no move after the first begins that would not end before ``time.perf_counter`` is there, and no round of
            the interior-point method after it is.
    """
    setting = _Setting(len(packed.signs), loss.joint, loss.share(num_classes) / n, coefficients, reg, shard, until)
    size = setting.functions * packed.vectors.shape[-1] ** 3
    is_cheap = setting.functions <= (_MANY if size <= _DEAR else _FEW)
    aim = (1 - tol) * primal
    if answer.dual >= aim:
        return answer
    moves = _LATE_MOVES if late else _MOVES if is_cheap else _MOVES_ALONE
    rows, best = _moved(rows, packed, answer, setting, moves=moves, aim=aim, is_far=answer.dual < _FAR * primal)
    if is_cheap and best.dual < aim and not setting.is_over():
        best = _solved(rows, packed, best, number, primal, tol, late, setting)
    return dataclasses.replace(answer, dual=best.dual)


def _moved(
    rows: DualRows,
    packed: PackedNetwork,
    answer: OracleAnswer,
    setting: _Setting,
    *,
    moves: int,
    aim: float,
    is_far: bool,
) -> tuple[DualRows, OracleAnswer]:
    """Rows with slopes of least squares for the network's neurons and the oracle's from near reg on; the best bound.

    Far from the optimum functions count in proportion to what their best neuron is worth, those above the median.
    """
    neurons, signs = _unit(packed), _counted(packed)
    best, found, moved, began = answer, answer, rows, time.perf_counter()
    for done in range(moves):
        if done and setting.is_over((time.perf_counter() - began) / done):
            break
        sign = torch.tensor([1.0, -1.0]).to(found.values)[:, None]
        signs = torch.cat([signs, (sign * (found.values > _NEAR * setting.reg)).flatten(1)], dim=1)
        neurons = torch.cat([neurons, found.directions.flatten(1, 2)], dim=1)
        peak = found.bounds.amax(1, keepdim=True)
        weight = (peak / peak.median().clamp_min(setting.reg)).clamp_min(1.0) if is_far else 1.0
        slope = stationary_slopes(
            moved,
            *_compact(neurons, signs * weight),
            joint=setting.joint,
            cap=setting.cap,
            coefficients=setting.coefficients,
            reg=setting.reg,
            shard=setting.shard,
            is_far=is_far,
        )
        moved = moved.at(slope)
        found = oracle(setting.point(moved), setting.reg)
        gain = found.dual - best.dual
        if gain > 0:
            rows, best = moved, found
        if gain < _WORTH * aim or best.dual >= aim:
            break
    return rows, best


def _solved(
    rows: DualRows,
    packed: PackedNetwork,
    best: OracleAnswer,
    number: Tensor,
    primal: float,
    tol: float,
    late: bool,
    setting: _Setting,
) -> OracleAnswer:
    """The best bound of rounds of the interior-point method, or ``best``."""
    functions, d, aim = setting.functions, packed.vectors.shape[-1], (1 - tol) * primal
    free, is_free = _gathered(rows, _order(rows, number, setting.cap), setting.joint, setting.shard)
    if len(free.slope) == 0:
        return best
    rest = setting.point(rows.some(~is_free))
    counted = _counted(packed)
    halves = [_unit(packed) * (counts * counted > 0).unsqueeze(-1) for counts in (1, -1)]
    kept = torch.stack(halves, dim=1).mT.double()
    leading = min(_LEADING, max(1, _ALL_LEADING // (2 * functions)))
    is_narrow = kept.shape[-1] + leading < d
    if is_narrow:
        kept = torch.cat([kept, _leading(setting.point(rows).moments[:, :d, :d], leading)], dim=-1)
    x = torch.cat([free.slope, free.slope.new_ones(1)])
    for _ in range(_LATE_ROUNDS if late else _ROUNDS):
        is_narrow = is_narrow and kept.shape[-1] < d
        basis = torch.linalg.qr(kept).Q if is_narrow else torch.eye(d).to(kept).expand(functions, 2, d, d)
        program = SlopeProgram(free, rest, basis, cap=setting.cap, coefficients=setting.coefficients, reg=setting.reg)
        wanted = aim + (_BEYOND * (primal - aim) if is_narrow else 0.0)
        x = program.maximise(x, wanted, primal, persist=late, until=setting.until)
        # Of several processes all go on from the same numbers.
        x = x.new_tensor(setting.shard.first_of(x.tolist()))
        point = program.point(x)
        found = oracle(point, setting.reg)
        best = max(best, found, key=lambda answer: answer.dual)
        # The sum found is about the most that these neurons allow, and more of them allow less.
        is_in_reach = late or float(point.mass.sum()) >= aim - _SHORT * (primal - aim)
        if best.dual >= aim or not is_narrow or not is_in_reach or setting.is_over():
            break
        near = (found.values > _NEAR * setting.reg).to(x).unsqueeze(-1)
        kept = torch.cat([kept, (found.directions * near).mT], dim=-1)
        x = x * min(1.0, setting.reg / float(found.bounds.amax()))
    return best


def _order(rows: DualRows, number: Tensor, cap: float) -> Tensor:
    """(N,) whose slopes are free first: a shuffle of the examples, those ahead where S leaves a slope room to move.

    It depends on the number (n,) of an example among those of all processes alone; rows of an example are equal. Those
    of more margins than may be free are behind as well.
    """
    ahead = has_room(rows, cap, len(number)) & (torch.bincount(rows.example, minlength=len(number)) <= _FREE)
    shuffled = (number * _ODD) % (1 << 32) + (1 << 32) * (~ahead).long()
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


def _unit(packed: PackedNetwork) -> Tensor:
    """Directions of the network's neurons (F, m, d), float64."""
    norm = packed.nu
    return (packed.vectors / norm.clamp_min(torch.finfo(norm.dtype).tiny).unsqueeze(-1)).double()


def _counted(packed: PackedNetwork) -> Tensor:
    """Signs (F, m) of the network's neurons, float64, 0 where they are too small to count."""
    return packed.signs.double() * (packed.nu > _SMALL * packed.nu.amax())


def _compact(neurons: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Neurons (F, M, d) with a sign (F, M) first in each function, and no more columns than one function needs."""
    order = torch.argsort((signs == 0).to(torch.int8), dim=1, stable=True)
    order = order[:, : max(1, int((signs != 0).sum(1).max()))]
    return neurons.gather(1, order.unsqueeze(-1).expand(-1, -1, neurons.shape[-1])), signs.gather(1, order)


def _leading(quadratic: Tensor, count: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues of Q and of -Q, (F, d, d) -> (F, 2, d, k)."""
    vectors = torch.linalg.eigh(0.5 * (quadratic + quadratic.mT)).eigenvectors
    return torch.stack([vectors[..., -count:], vectors[..., :count]], dim=1)
