"""Sums a dual point up: weighted worst-case points of margin forms into moments (problems/polynomial.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from convex_head.adversary.margins import Forms
from convex_head.problems.dual import DualPoint


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
        self.point = DualPoint(mass, torch.zeros(num_functions, d + 1, d + 1, dtype=torch.float64, device=device))

    def add(self, form: int, sign: float, weights: Tensor, x: Tensor) -> None:
        """Points x (N, d) of margins sign * form, weighted (N,)."""
        a, b, c = self._coefficients
        d = self._d
        total = float(weights.double().sum())
        moment = torch.empty(d + 1, d + 1, dtype=torch.float64, device=x.device)
        moment[:d, :d] = a * (x.mT @ (weights.unsqueeze(1) * x)).double()
        moment[:d, d] = moment[d, :d] = 0.5 * b * (weights @ x).double()
        moment[d, d] = c * total
        self._spread(form, sign, moment)
        self.point.mass[0 if self._pairwise else int(self._forms.plus[form])] += total

    def add_spread(self, form: int, sign: float, second: Tensor) -> None:
        """Weighted covariances (d, d) of points about those that :meth:`add` has taken, as blurring makes them."""
        moment = torch.zeros_like(self.point.moments[0])
        moment[: self._d, : self._d] = self._coefficients[0] * second
        self._spread(form, sign, moment)

    def _spread(self, form: int, sign: float, moment: Tensor) -> None:
        self.point.moments[int(self._forms.plus[form])] += sign * moment
        if self._forms.minus is not None:
            self.point.moments[int(self._forms.minus[form])] -= sign * moment
