"""The best slopes on given worst-case points, by an interior-point method: the sharpest bound that the points prove.

A bound holds for any slopes in S and any points in the balls (problems/polynomial.py). With the points held, the best
slopes s solve a semidefinite program: its constraint that no neuron u of function c is worth more than reg,
+-[u;1]'A_c(s)[u;1] <= reg for |u| = 1, holds exactly if for some t

    diag(t, .., t, reg - t) -+ A_c(s)  is positive semidefinite                               (the S-lemma).

Newton's method maximises over the slopes and two t a function

    sum s + nu ( sum over functions and signs log det(diag(t, .., t, reg - t) -+ A_c(s)) + logs of the room S leaves ),

nu falling with what may still be gained. The share of a point x in A_c is a zz' + (c - b^2/4a) ee' with z = (x, b/2a)
and e the last unit vector, so that a Hessian over slopes is made of products z'P z of two points, squared.

So that it costs the same for any data, some slopes are free and all others keep their proportions: their moments make
one matrix with one factor. And matrices are those of neurons in a subspace, a few dozen rows instead of d + 1; then
sum s is a bound only for these neurons, and problems/repair.py asks the exact oracle.

Source: Y. Nesterov and A. Nemirovskii, "Interior-Point Polynomial Algorithms in Convex Programming" (1994); S. Benson,
Y. Ye and X. Zhang, SIAM J. Optim. 10 (2000), for nu from the gap and for matrices of rank one; C. Helmberg and
F. Rendl, SIAM J. Optim. 10 (2000), for the subspace.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_head.problems.dual import DualPoint

_STEPS = 40
# No step is longer than so many roots of the number of barriers in the norm of the Hessian, if a nu allows that; after
# slow ones the search starts anew with shorter ones. 1 / nu is not below that share of the wanted.
_LONG, _SHORT, _TINY = 2.0, 0.5, 1e-3
# nu is the gap over this many times the number of barriers.
_GREED = 4.0
# The start: slopes not below the first share of what S leaves them, sums and matrices within the second share of
# their limits, each t by the third share of reg above what is needed.
_LEAST, _INSIDE, _ROOM = 0.02, 0.95, 0.02
# A step is shortened by this factor while it gains more, and the second share of what its slope promises at least; not
# below the third.
_SHORTER, _DECREASE, _SHORTEST = 0.6, 1e-4, 1e-6
# It is over where so little of the limit is left to gain, or after so many steps near the path of optima (shorter than
# the third in the norm of the Hessian) that each gained less than the fourth share of what is wanted.
_CLOSE, _SLOW_STEPS, _NEAR_PATH, _SLOW = 1e-3, 4, 5.0, 0.1


@dataclass(frozen=True)
class FreeRows:
    """Margins whose slopes are free, one a row.

    Attributes:
        points: (M, d) worst-case points, float64.
        functions: (M, 2) p and q of the form f_p - f_q.
        sign: (M,) of the form in the margin.
        slope: (M,) to start from.
        group: (M,) slopes of one group, numbered from 0, sum up to at most what S leaves.
    """

    points: Tensor
    functions: Tensor
    sign: Tensor
    slope: Tensor
    group: Tensor


@dataclass(frozen=True)
class _Iterate:
    """Free slopes and, last, the factor of the others, x (M + 1,); multipliers t (F, 2); factors (F, 2, D, D)."""

    x: Tensor
    t: Tensor
    slack: Tensor
    factor: Tensor
    barrier: float


class SlopeProgram:
    """The program of the module's docstring.

    Args:
        rows: margins whose slopes are free.
        rest: dual point of all others at their slopes, all functions scaled together.
        basis: (F, 2, d, k) orthonormal columns: the neurons of each function and sign that the constraint is kept for.
        cap: what S leaves a group.
        coefficients: (a, b, c) of the activation, a > 0.
        reg: of the problem.
    """

    def __init__(
        self,
        rows: FreeRows,
        rest: DualPoint,
        basis: Tensor,
        *,
        cap: float,
        coefficients: tuple[float, float, float],
        reg: float,
    ):
        a, b, c = coefficients
        functions, _, d, k = basis.shape
        self._a, self._corner, self._cap, self._reg = a, c - b**2 / (4 * a), cap, reg
        self._group, self._groups = rows.group, int(rows.group.max()) + 1
        self._rest, self._mass = rest.moments, float(rest.mass.sum())
        self._wide = basis.new_zeros(functions, 2, d + 1, k + 1)
        self._wide[:, :, :d, :k], self._wide[:, :, d, k] = basis, 1.0
        self._narrow_rest = self._narrowed(rest.moments)
        lifted = torch.cat([rows.points, rows.points.new_full((len(rows.points), 1), b / (2 * a))], dim=1)
        ends = torch.stack([rows.sign, -rows.sign], dim=1)
        self._points, self._narrow_points, self._index, self._signs = [], [], [], []
        for f in range(functions):
            index, end = (rows.functions == f).nonzero(as_tuple=True)
            self._index.append(index)
            self._signs.append(ends[index, end])
            self._points.append(lifted[index])
            self._narrow_points.append(lifted[index] @ self._wide[f])
        # What t adds to a matrix is t times this diagonal; it enters the matrices of the two signs as -+ A_c.
        self._unit = basis.new_ones(k + 1)
        self._unit[-1] = -1.0
        self._half = basis.new_tensor([-1.0, 1.0])
        self._barriers = 2 * functions * (k + 1) + len(rows.group) + self._groups + 2

    def maximise(self, x: Tensor, aim: float, limit: float, persist: bool = False, until: float = math.inf) -> Tensor:
        """Free slopes and the factor of the others, (M + 1,), in S, that no neuron of the subspace contradicts.

        Args:
            x: where to start from, in S.
            aim: a sum of slopes that is good enough.
            limit: an upper bound of all sums that the constraint on every neuron allows.
            persist: go on where no sum reaches the aim; else the search ends as soon as this shows.
            until: no step begins after ``time.perf_counter`` is there.
        """
        now, slow, longest = self._start(x), 0, _LONG
        if now is None:
            return x
        for _ in range(_STEPS):
            total = self._total(now.x)
            if (
                time.perf_counter() > until
                or total >= aim
                or (limit < aim and not persist)
                or limit - total <= _CLOSE * limit
            ):
                break
            if slow == _SLOW_STEPS and longest == _LONG:
                now, slow, longest = self._start(now.x) or now, 0, _SHORT
                total = self._total(now.x)
            elif slow == _SLOW_STEPS and not persist:
                break
            found = self._newton(now, (limit - total) / (_GREED * self._barriers), longest)
            if found is None:
                break
            step, length, nu = found
            if length < 1:
                excess = (length + math.sqrt(self._barriers)) * length / (1 - length)
                limit = min(limit, total + nu * (self._barriers + excess))
            further = self._search(now, step, nu, length)
            if further is None:
                break
            now = further
            is_slow = length < _NEAR_PATH and self._total(now.x) - total < _SLOW * (aim - total)
            slow = slow + 1 if is_slow else 0
        return now.x

    def point(self, x: Tensor) -> DualPoint:
        """The dual point of free slopes and the factor of the others."""
        moments = x[-1] * self._rest
        for f, points in enumerate(self._points):
            moments[f] += self._moment(points, x[self._index[f]] * self._signs[f])
        return DualPoint((x[:-1].sum() + x[-1] * self._mass).view(1), moments)

    def _moment(self, points: Tensor, weight: Tensor) -> Tensor:
        """Of lifted points (.., L, D) with weights (L,): (.., D, D)."""
        moment = self._a * (points.mT @ (weight.unsqueeze(1) * points))
        moment[..., -1, -1] += self._corner * weight.sum()
        return moment

    def _narrowed(self, moments: Tensor) -> Tensor:
        return self._wide.mT @ moments.unsqueeze(1) @ self._wide

    def _total(self, x: Tensor) -> float:
        return float(x[:-1].sum() + x[-1] * self._mass)

    def _sums(self, slopes: Tensor) -> Tensor:
        return slopes.new_zeros(self._groups).index_add_(0, self._group, slopes)

    def _start(self, x: Tensor) -> _Iterate | None:
        """Near the given slopes, inside of all limits; None where numbers are too small for that."""
        slopes = x[:-1].clamp_min(_LEAST * self._cap)
        slopes = slopes * (_INSIDE * self._cap / self._sums(slopes).clamp_min(_INSIDE * self._cap))[self._group]
        x = torch.cat([slopes, x[-1:].clamp_max(_INSIDE)])
        matrices = -self._half.view(2, 1, 1) * self._narrowed(self.point(x).moments)
        linear = matrices[..., :-1, -1].norm(dim=-1)
        t = torch.linalg.eigvalsh(matrices[..., :-1, :-1])[..., -1].clamp_min(0) + linear
        peak = float((t + linear + matrices[..., -1, -1]).amax())
        share = _INSIDE * self._reg / max(peak, _INSIDE * self._reg)
        return self._at(share * x, share * t + _ROOM * self._reg)

    def _at(self, x: Tensor, t: Tensor) -> _Iterate | None:
        """The iterate at these slopes and multipliers; None outside of the limits."""
        slack = torch.cat([self._cap - self._sums(x[:-1]), 1 - x[-1:]])
        if not bool((x > 0).all() & (slack > 0).all()):
            return None
        matrices = x[-1] * self._narrow_rest
        for f, points in enumerate(self._narrow_points):
            matrices[f] += self._moment(points, x[self._index[f]] * self._signs[f])
        diagonal = t.unsqueeze(-1) * self._unit
        diagonal[..., -1] += self._reg
        matrices = self._half.view(2, 1, 1) * matrices + torch.diag_embed(diagonal)
        factor, failed = torch.linalg.cholesky_ex(matrices)
        if bool(failed.any()):
            return None
        logs = 2 * torch.diagonal(factor, dim1=-2, dim2=-1).log().sum() + x.log().sum() + slack.log().sum()
        return _Iterate(x, t, slack, factor, float(logs))

    def _newton(self, now: _Iterate, nu: float, longest: float = _LONG) -> tuple[Tensor, float, float] | None:
        """Newton's step (M + 1 + 2F,), its length in the norm of the Hessian, and the nu that it is for.

        That is the given one, or the next larger one for which the step is not too long, or nearly the least long: of
        iterates that a small nu takes close to a limit far from the path of optima many steps lead back.
        None where rounding is in the way.
        """
        n = len(now.x) - 1
        gradient = now.x.new_zeros(n + 1 + now.t.numel())
        hessian = now.x.new_zeros(len(gradient), len(gradient))
        room = now.slack.reciprocal()
        gradient[:n] = -room[self._group]
        gradient[n] = -room[-1]
        gradient[: n + 1] += now.x.reciprocal()
        hessian[:n, :n] = (self._group.unsqueeze(1) == self._group) * room.square()[self._group]
        hessian[n, n] = room[-1].square()
        hessian.diagonal()[: n + 1] += now.x.square().reciprocal()
        inverses = torch.cholesky_inverse(now.factor)
        for f, (points, index, signs) in enumerate(zip(self._narrow_points, self._index, self._signs, strict=True)):
            inverse, rest, halves = inverses[f], self._narrow_rest[f], self._half
            turned = (inverse * self._unit) @ inverse
            across = inverse @ rest @ inverse
            # Traces of P M_r with P these inverses and M_r the share of a slope, and of P M_r P M_s.
            values = points @ inverse @ points.mT
            along, last = points @ inverse[:, :, -1:], inverse[:, -1:, -1:]
            square = (self._a * self._corner) * along.square()
            products = self._a**2 * values.square() + square + square.mT + (self._corner * last).square()
            hessian[index.unsqueeze(1), index] += products.sum(0) * torch.outer(signs, signs)
            own = self._a * values.diagonal(dim1=-2, dim2=-1) + self._corner * last.squeeze(-1)
            gradient[:n].index_add_(0, index, signs * (halves @ own))
            gradient[n] += halves @ (inverse * rest).sum((-2, -1))
            hessian[n, n] += (across * rest).sum()
            hessian[n, :n].index_add_(0, index, signs * self._shares(points, across).sum(0))
            place = slice(n + 1 + 2 * f, n + 3 + 2 * f)
            gradient[place] = inverse.diagonal(dim1=-2, dim2=-1) @ self._unit
            hessian[place, place] = torch.diag(turned.diagonal(dim1=-2, dim2=-1) @ self._unit)
            hessian[place, n] = halves * (turned * rest).sum((-2, -1))
            hessian[place, :n].index_add_(1, index, halves.unsqueeze(1) * signs * self._shares(points, turned))
        lower = hessian.tril()
        factor, failed = torch.linalg.cholesky_ex(lower + lower.tril(-1).mT)
        if bool(failed):
            return None
        total = torch.zeros_like(gradient)
        total[:n], total[n] = 1.0, self._mass
        both = torch.stack([gradient, total], dim=1)
        steps = torch.cholesky_solve(both, factor)
        (centring, mixed), (_, aiming) = (both.mT @ steps).tolist()
        weight, most = 1 / nu, longest**2 * self._barriers
        if centring + 2 * mixed * weight + aiming * weight**2 > most:
            spare = mixed**2 - aiming * (centring - most)
            weight = max(-mixed + math.sqrt(max(0.0, spare)), _TINY * aiming * weight) / aiming
        square = centring + 2 * mixed * weight + aiming * weight**2
        return steps[:, 0] + weight * steps[:, 1], math.sqrt(max(0.0, square)), 1 / weight

    def _shares(self, points: Tensor, matrices: Tensor) -> Tensor:
        """tr(M_r B), (2, L), of lifted points (2, L, D) and symmetric matrices B (2, D, D)."""
        return self._a * ((points @ matrices) * points).sum(-1) + self._corner * matrices[:, -1:, -1]

    def _search(self, now: _Iterate, step: Tensor, nu: float, decrement: float) -> _Iterate | None:
        """As far along the step as it gains most; None where it gains nothing.

        Further is another step that ends near a limit, and takes many to come away from there.
        """
        slopes, multipliers = step[: len(now.x)], step[len(now.x) :].view_as(now.t)
        before, length = self._total(now.x) / nu + now.barrier, 1.0
        best, most = None, 0.0
        while length > _SHORTEST:
            found = self._at(now.x + length * slopes, now.t + length * multipliers)
            gain = -math.inf if found is None else self._total(found.x) / nu + found.barrier - before
            if gain >= max(most, _DECREASE * length * decrement**2):
                best, most = found, gain
            elif best is not None:
                break
            length *= _SHORTER
        return best
