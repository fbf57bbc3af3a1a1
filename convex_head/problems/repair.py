"""Repair of a dual point: slopes changed a little, so that the network's own neurons meet the dual constraint.

Near the optimum of the smoothed problem every slope is (1 - w) / mu, so that small errors of a network become large
ones of the moments A_c, and the bound, which is scaled down by the worst neuron on the sphere, is far worse than the
network. Worst-case points may stay as they are: the bound holds for any slopes in S and any points in the balls
(problems/polynomial.py). So the slopes are solved for anew. Stationarity of a neuron u of function c and sign sigma is

    r_u(s) = 2 reg u - sigma sum_i s_i sign_i [(2a u'x_i + b) x_i + (b u'x_i + 2c) u] = 0,

over the points x_i of margins f_p - f_q that contain f_c; half of u'r_u is reg minus the value of u in the dual
constraint. It is linear in s, and

    minimise  1/2 sum_u |r_u(s)|^2 + rho/2 |s - s_0|^2   over the slopes on a face of S

is solved by conjugate gradients in products with the points alone: no worst case is solved. On that face slopes that
the smoothed problem leaves no room stay, and those at a limit of their own that would pass it; slopes of an example
that sum up to their limit go on doing so: at the optimum those of an example with a loss do, and the bound lives on
their sum. The slopes are then put back into S and the exact oracle bounds what they prove. The neurons u are those of
the network and the oracle's best; a further round takes the worst neurons that the round before has left. Margins of
one function alone are not repaired: their bounds are good as they are, and a repair costs more than it saves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork
from convex_head.problems.dual import DualPoint, OracleAnswer, oracle
from convex_head.problems.dual_rows import DualRows, RowLayout
from convex_head.problems.losses import MarginLoss
from convex_head.problems.moments import moment_of
from convex_head.shards import Whole

_ROUNDS = 8
# The last round is one after which gains that go on falling as they did, this many times over, do not reach the aim;
# after the first, as if they fell by this factor.
_HOPE, _FALL = 2.0, 0.5
_STEPS = 25
_TOL = 1e-3
_PULL = 1e-2
# Slopes of an example that reach their limit up to this share do.
_FULL = 1e-4
# Neurons of less weight than this share of the largest are no constraint; those of the oracle count from here on.
_SMALL = 1e-2
_NEAR = 0.98


class _Stationarity:
    """The linear map s -> sum of slopes in r_u and its transpose, for neurons (F, M, d) and their signs (F, M)."""

    def __init__(
        self,
        layout: RowLayout,
        neurons: Tensor,
        signs: Tensor,
        coefficients: tuple[float, float, float],
        shard: Whole,
    ):
        a, b, c = coefficients
        self._layout, self._neurons, self._shard = layout, neurons, shard
        self._along_point, self._along_self = [], []
        for points, own, sign in zip(layout.points, neurons, signs, strict=True):
            projection = points @ own.T
            self._along_point.append(sign * (2 * a * projection + b))
            self._along_self.append(sign * (b * projection + 2 * c))

    def apply(self, slopes: Tensor) -> Tensor:
        """(N,) -> (F, M, d), summed over the processes."""
        out = torch.empty_like(self._neurons)
        for f, weight in enumerate(self._layout.spread(slopes)):
            weight = weight.unsqueeze(-1)
            out[f] = (self._along_point[f] * weight).T @ self._layout.points[f]
            out[f] += (self._along_self[f] * weight).sum(0).unsqueeze(-1) * self._neurons[f]
        self._shard.sum(out)
        return out

    def transpose(self, y: Tensor) -> Tensor:
        """(F, M, d) -> (N,)."""
        own = (self._neurons * y).sum(-1)
        parts = zip(self._along_point, self._along_self, self._layout.points, y, own, strict=True)
        return self._layout.collect([(p * (points @ v.T)).sum(1) + q @ o for p, q, points, v, o in parts])


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
    aim: float,
    shard: Whole,
    persist: bool = False,
) -> OracleAnswer:
    """The best bound that repaired slopes prove, ``answer`` if they prove nothing more.

    Args:
        rows: margins with a slope, and their worst-case points.
        packed: the network that they belong to.
        answer: the oracle's at the slopes of ``rows``.
        loss, num_classes, coefficients, reg, shard: of the problem.
        n: examples of all processes.
        aim: a bound that is good enough.
        persist: a second round follows whatever the first has gained.
    """
    dtype = rows.points.dtype
    layout = RowLayout(rows, len(packed.signs))
    cap = loss.share(num_classes) / n
    norm = packed.nu
    weight = (norm.square() > _SMALL * norm.square().amax()).to(dtype) * packed.signs.to(dtype)
    unit = packed.vectors / norm.clamp_min(torch.finfo(norm.dtype).tiny).unsqueeze(-1)
    neurons, signs, slope, best = unit.to(dtype), weight, rows.slope, answer
    found, gain = answer, math.inf
    for _ in range(_ROUNDS):
        more, more_signs = _near(found, reg, dtype)
        neurons, signs = _compact(torch.cat([neurons, more], dim=1), torch.cat([signs, more_signs], dim=1))
        system = _Stationarity(layout, neurons, signs, coefficients, shard)
        residual = 2 * reg * signs.abs().unsqueeze(-1) * neurons - system.apply(slope)
        downhill = system.transpose(residual)
        face = _Face(rows, slope, downhill, cap, loss.joint)
        slope = face.into_set(slope + _least_squares(system, downhill, face, shard))
        found = oracle(_dual_point(layout, slope, coefficients, shard), reg)
        before, gain, best = gain, found.dual - best.dual, max(best, found, key=lambda answer: answer.dual)
        if math.isinf(before) and not persist:
            before = gain / _FALL
        if best.dual >= aim or _HOPE * _further(gain, before) < aim - best.dual:
            break
    return best


def _further(gain: float, before: float) -> float:
    """What further rounds bring if gains go on falling as the last two did: a geometric series."""
    if max(gain, before) <= 0:
        return 0.0
    return gain**2 / (before - gain) if 0 < gain < before < math.inf else math.inf


def _near(answer: OracleAnswer, reg: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The oracle's neurons (F, 2k, d) and their signs (F, 2k), 0 where they lie well inside the constraint."""
    functions, _, _, d = answer.directions.shape
    sign = torch.tensor([1.0, -1.0], dtype=dtype, device=answer.values.device)[:, None]
    signs = sign * (answer.values > _NEAR * reg).to(dtype)
    return answer.directions.reshape(functions, -1, d).to(dtype), signs.reshape(functions, -1)


def _compact(neurons: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Neurons (F, M, d) with a sign (F, M) first in each function, and no more columns than one function needs."""
    order = torch.argsort((signs == 0).to(torch.int8), dim=1, stable=True)
    order = order[:, : max(1, int((signs != 0).sum(1).max()))]
    return neurons.gather(1, order.unsqueeze(-1).expand(-1, -1, neurons.shape[-1])), signs.gather(1, order)


class _Face:
    """S, divided by n as slopes are, and changes of slopes on the face of it that the module describes.

    Args:
        rows: whose slopes they are.
        slope: (N,) slopes now.
        downhill: (N,) where they would go.
        cap: most that S leaves a slope, or with ``joint`` the slopes of an example together.
        joint: the loss is a maximum over the classes.
    """

    def __init__(self, rows: DualRows, slope: Tensor, downhill: Tensor, cap: float, joint: bool):
        self._cap = cap
        self._example, self._examples = rows.example, int(rows.example.max()) + 1
        free = rows.free & ~((slope <= 0) & (downhill < 0))
        if not joint:
            free &= ~((slope >= cap) & (downhill > 0))
        self.free = free.to(slope.dtype)
        self._held: Tensor | None = None
        if joint:
            full = self._by_example(slope) >= (1 - _FULL) * cap
            self._held = full / self._by_example(self.free).clamp_min(1)

    def project(self, change: Tensor) -> Tensor:
        """(N,) changes -> (N,) the nearest ones on the face."""
        change = change * self.free
        if self._held is None:
            return change
        excess = self._by_example(change) * self._held
        return change - excess[self._example] * self.free

    def into_set(self, slope: Tensor) -> Tensor:
        """(N,) slopes put back into S."""
        slope = slope.clamp_min(0)
        if self._held is None:
            return slope.clamp_max(self._cap)
        return slope * (self._cap / self._by_example(slope).clamp_min(self._cap))[self._example]

    def _by_example(self, values: Tensor) -> Tensor:
        return values.new_zeros(self._examples).index_add_(0, self._example, values)


def _least_squares(system: _Stationarity, downhill: Tensor, face: _Face, shard: Whole) -> Tensor:
    """Change of the slopes on the face, by conjugate gradients on the normal equations."""

    def dot(x: Tensor, y: Tensor) -> Tensor:
        total = (x * y).double().sum().view(1)
        shard.sum(total)
        return total

    right, free = face.project(downhill), face.free
    pull = float(_PULL * dot(system.transpose(system.apply(free)), free) / dot(free, free).clamp_min(1))
    change, rest = torch.zeros_like(right), right
    direction, square = right, dot(right, right)
    aim = _TOL**2 * square
    for _ in range(_STEPS):
        if not bool(square > aim):
            break
        image = face.project(system.transpose(system.apply(direction))) + pull * direction
        length = (square / dot(direction, image)).to(right.dtype)
        change, rest = change + length * direction, rest - length * image
        new = dot(rest, rest)
        direction, square = rest + (new / square).to(right.dtype) * direction, new
    return change


def _dual_point(layout: RowLayout, slope: Tensor, coefficients: tuple[float, float, float], shard: Whole) -> DualPoint:
    """Mass and moments of slopes on the points of a layout."""
    parts = zip(layout.spread(slope), layout.points, strict=True)
    moments = torch.stack([moment_of(weight, x, coefficients) for weight, x in parts])
    mass = slope.double().sum().view(1)
    shard.sum(mass, moments)
    return DualPoint(mass, moments)
