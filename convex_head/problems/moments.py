"""Sums a dual point up: weighted worst-case points of margin forms into moments (problems/polynomial.py)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from convex_head.adversary.margins import Forms
from convex_head.adversary.scan import Step
from convex_head.problems.dual import DualPoint
from convex_head.problems.dual_rows import RowCollector
from convex_head.rows import Chunk

# Numbers of worst-case points made at once, and held before they are summed up: products of many rows are cheaper.
_DENSE, _GPU_DENSE = 1 << 23, 1 << 28
_HELD, _GPU_HELD = 1 << 22, 1 << 27
# Rows of a product in the dtype of the points; its results are summed up in float64.
_ROWS = 1 << 12

# Forms, signed weights and points, (N,), (N,) and (N, d).
_Part = tuple[Tensor, Tensor, Tensor]


def moment_of(weight: Tensor, points: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """Sum of weight M(x) over points x (N, d), weights (N,): (d + 1, d + 1), float64."""
    a, b, c = coefficients
    d = points.shape[1]
    moment = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=points.device)
    for w, x in zip(weight.split(_ROWS), points.split(_ROWS), strict=True):
        moment[:d, :d] += a * (x.mT @ (w.unsqueeze(1) * x)).double()
        moment[:d, d] += 0.5 * b * (w @ x).double()
    moment[d, :d] = moment[:d, d]
    moment[d, d] = c * weight.double().sum()
    return moment


class MomentSums:
    """Moments A_c and mass of what has been added, from zero.

    Args:
        forms: the margin forms.
        pairwise: margins couple the functions, so that their mass is one number.
        num_functions: F.
        d: number of features.
        coefficients: (a, b, c) of the activation.
    """

    def __init__(
        self, forms: Forms, *, pairwise: bool, num_functions: int, d: int, coefficients: tuple[float, float, float]
    ):
        self._forms, self._pairwise, self._d, self._coefficients = forms, pairwise, d, coefficients
        device = forms.plus.device
        mass = torch.zeros(1 if pairwise else num_functions, dtype=torch.float64, device=device)
        self._point = DualPoint(mass, torch.zeros(num_functions, d + 1, d + 1, dtype=torch.float64, device=device))
        self._most = _HELD if device.type == "cpu" else _GPU_HELD
        self._points: list[_Part] = []
        self._spread: list[_Part] = []
        self._numbers = 0

    @property
    def point(self) -> DualPoint:
        """All that has been added."""
        self._sum_up()
        return self._point

    def add(self, forms: Tensor, signs: Tensor, weights: Tensor, x: Tensor) -> None:
        """Points x (N, d) of margins signs * forms, all (N,), with weights (N,)."""
        mass = weights.double()
        if self._pairwise:
            self._point.mass.add_(mass.sum())
        else:
            self._point.mass.index_add_(0, self._forms.plus[forms], mass)
        self._hold(self._points, (forms, signs * weights, x))

    def add_spread(self, forms: Tensor, signs: Tensor, weights: Tensor, x: Tensor) -> None:
        """Weighted x x' (N, d) about the points that :meth:`add` takes: the covariances that blurring makes."""
        self._hold(self._spread, (forms, signs * weights, x))

    def _hold(self, parts: list[_Part], part: _Part) -> None:
        if self._numbers and self._numbers + part[2].numel() > self._most:
            self._sum_up()
        parts.append(part)
        self._numbers += part[2].numel()

    def _sum_up(self) -> None:
        d, moments = self._d, self._point.moments
        for targets, weight, points in self._taken(self._points):
            moment = moment_of(weight, points, self._coefficients)
            for function, sign in targets:
                moments[function].add_(moment, alpha=sign)
        for targets, weight, points in self._taken(self._spread):
            moment = moment_of(weight, points, self._coefficients)
            for function, sign in targets:
                moments[function, :d, :d].add_(moment[:d, :d], alpha=sign)
        self._numbers = 0

    def _taken(self, parts: list[_Part]) -> Iterator[tuple[list[tuple[int, float]], Tensor, Tensor]]:
        """What is held, sorted; nothing is held any more."""
        if parts:
            forms, weights, x = parts[0] if len(parts) == 1 else (torch.cat(part) for part in zip(*parts, strict=True))
            parts.clear()
            yield from self._sorted(forms, weights, x)

    def _sorted(
        self, forms: Tensor, weights: Tensor, x: Tensor
    ) -> Iterator[tuple[list[tuple[int, float]], Tensor, Tensor]]:
        """What goes into the same moments together: (function, sign) of those, weights and points.

        By form where these are few, so that a point of f_p - f_q is squared once; else by function.
        """
        ends = self._forms.ends()
        by_function = self._forms.are_many()
        if by_function:
            keys = torch.cat([end[forms] for end in ends])
            weights = torch.cat([weights, -weights][: len(ends)])
        else:
            keys = forms
        order = torch.argsort(keys, stable=True)
        counts = torch.bincount(keys)
        present = counts.nonzero().squeeze(1)
        sizes = counts[present].tolist()
        places = (order % len(x)).split(sizes)
        for key, place, weight in zip(present.tolist(), places, weights[order].split(sizes), strict=True):
            if by_function:
                yield [(key, 1.0)], weight, x[place]
            else:
                yield [(int(end[key]), sign) for end, sign in zip(ends, (1.0, -1.0), strict=False)], weight, x[place]


def add_step(
    sums: MomentSums,
    forms: Forms,
    chunk: Chunk,
    step: Step,
    weights: Tensor,
    collector: RowCollector | None,
) -> None:
    """Add one group's worst cases, weighted (G, B), to the sums of a dual point, and where it is kept each of them."""
    group, bases = step.group_pass.group, step.group_pass.basis()
    most = _DENSE if chunk.x.device.type == "cpu" else _GPU_DENSE
    blocks = max(1, most // max(1, weights.shape[1] * chunk.x.shape[1]))
    for start in range(0, len(weights), blocks):
        part = slice(start, start + blocks)
        g, place = weights[part].nonzero(as_tuple=True)
        if len(g) == 0:
            continue
        indices, signs = group.forms[part], group.signs[part].to(weights.dtype)
        rows, weight = group.rows[part][g, place], weights[part][g, place]
        worst = chunk.x[rows] + (step.ehat[part] @ bases[part].mT)[g, place]
        sums.add(indices[g], signs[g], weight, worst)
        if collector is not None:
            ends = torch.stack([end[indices[g]] for end in forms.ends()], dim=1)
            collector.add(worst, rows + chunk.rows.start, ends, signs[g], weight)
        if step.spread is not None:
            total = (weights[part].unsqueeze(1) @ step.spread[part]).squeeze(1)
            which = torch.arange(total.numel(), device=total.device) // total.shape[1]
            sums.add_spread(indices[which], signs[which], total.view(-1), bases[part].mT.reshape(-1, chunk.x.shape[1]))
