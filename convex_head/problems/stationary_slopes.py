"""Slopes of a dual point changed so that given neurons are stationary in the dual constraint.

At an optimum the neurons of the network are worth reg each in the dual constraint, and no neuron nearby more. So for
a neuron u of function c and sign sigma, over the points x_i of margins that contain f_c with sign_i,

    r_u(s) = 2 reg u - sigma sum_i s_i sign_i [(2a u'x_i + b) x_i + (b u'x_i + 2c) u] = 0;

half of u'r_u is reg minus the value of u. It is linear in s, and

    minimise  1/2 sum_u |r_u(s)|^2 + rho/2 |s - s_0|^2   over the slopes on a face of S

is solved by conjugate gradients in products with the points alone: no worst case is solved, and it costs what ten or so
passes do. On that face slopes that S leaves no room stay, and where S bounds the sum of an example's slopes, sums at
their limit stay there: at the optimum those of an example with a loss do, and the bound lives on them.

Far from an optimum that holds too much: where the slopes of a function's own examples outweigh those of its rivals,
changes of equal sums mend little. There all slopes may grow and shrink, and a further term -lambda sum_i s_i holds
their sum up: from slopes at which all neurons are worth reg it alone would take them a tenth above. A bound above reg
scales all slopes down, so that a common factor changes nothing, but slopes that cost little grow at the expense of the
others.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from convex_head.problems.dual_rows import DualRows, RowLayout
from convex_head.shards import Whole

# Conjugate gradients: so many steps, until the gradient on the face has fallen to this share; rho beside the curvature
# along equal changes of all free slopes.
_STEPS, _TOL, _PULL = 25, 1e-3, 1e-2
# Slopes that reach their limit up to this share do.
_FULL = 1e-3
# Far from an optimum neurons worth reg would be worth so much more.
_ABOVE = 0.1


def stationary_slopes(
    rows: DualRows,
    neurons: Tensor,
    signs: Tensor,
    *,
    joint: bool,
    cap: float,
    coefficients: tuple[float, float, float],
    reg: float,
    shard: Whole,
    is_far: bool = False,
) -> Tensor:
    """(N,) slopes in S, of rows whose slopes are positive.

    Args:
        rows: margins with a slope, and their worst-case points.
        neurons, signs: (F, M, d) unit vectors and (F, M) signs of each function, 0 for none; a sign of another size
            is a weight, of r_u in the sum of squares.
        joint: the loss is a maximum over the classes.
        cap: most that S leaves a slope, or with ``joint`` the slopes of an example together.
        coefficients, reg, shard: of the problem.
        is_far: the network is far from an optimum; sums of slopes are free, as the module describes.
    """
    dtype = rows.points.dtype
    neurons, signs = neurons.to(dtype), signs.to(dtype)
    system = _Stationarity(RowLayout(rows, len(neurons)), neurons, signs, coefficients, shard)
    residual = 2 * reg * signs.abs().unsqueeze(-1) * neurons - system.apply(rows.slope)
    face = _Face(rows, cap, joint, is_far)
    downhill = system.transpose(residual)
    if is_far:
        mass = rows.slope.double().sum().view(1)
        shard.sum(mass)
        downhill = downhill + float(4 * _ABOVE * reg**2 * signs.double().square().sum() / mass.clamp_min(1e-300))
    return face.into_set(rows.slope + _least_squares(system, downhill, face, shard))


def has_room(rows: DualRows, cap: float, examples: int) -> Tensor:
    """(examples,) whether one of the slopes of an example is below what S leaves it."""
    room = torch.zeros(examples, dtype=torch.bool, device=rows.example.device)
    room[rows.example[rows.slope < (1 - _FULL) * cap]] = True
    return room


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
        self._coefficients = coefficients
        self._layout, self._neurons, self._signs, self._shard = layout, neurons, signs, shard
        self._projections = [points @ own.T for points, own in zip(layout.points, neurons, strict=True)]

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of every function points (L, d), and along the points and along the neurons what a slope adds (L, M)."""
        a, b, c = self._coefficients
        for points, projection, sign in zip(self._layout.points, self._projections, self._signs, strict=True):
            yield points, sign * (2 * a * projection + b), sign * (b * projection + 2 * c)

    def apply(self, slopes: Tensor) -> Tensor:
        """(N,) -> (F, M, d), summed over the processes."""
        out = torch.empty_like(self._neurons)
        for f, ((points, along, own), weight) in enumerate(
            zip(self._parts(), self._layout.spread(slopes), strict=True)
        ):
            weight = weight.unsqueeze(-1)
            out[f] = (along * weight).T @ points
            out[f] += (own * weight).sum(0).unsqueeze(-1) * self._neurons[f]
        self._shard.sum(out)
        return out

    def transpose(self, y: Tensor) -> Tensor:
        """(F, M, d) -> (N,)."""
        turned = (self._neurons * y).sum(-1)
        parts = zip(self._parts(), y, turned, strict=True)
        return self._layout.collect([(along * (points @ v.T)).sum(1) + own @ o for (points, along, own), v, o in parts])


class _Face:
    """S, divided by n as slopes are, and changes of slopes on the face of it that the module describes, or on all."""

    def __init__(self, rows: DualRows, cap: float, joint: bool, is_far: bool):
        self._cap, self._example, self._joint = cap, rows.example, joint
        self._examples = int(rows.example.max()) + 1 if len(rows.example) else 0
        self._held: Tensor | None = None
        if is_far:
            self.free = torch.ones_like(rows.slope)
            return
        room = has_room(rows, cap, self._examples)[rows.example] if joint else rows.slope < (1 - _FULL) * cap
        self.free = room.to(rows.slope.dtype)
        if joint:
            full = self._by_example(rows.slope) >= (1 - _FULL) * cap
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
        if not self._joint:
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
