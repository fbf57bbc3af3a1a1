"""The smoothed loss and its gradient in the neurons, gathered chunk by chunk with torch, on any device.

By Danskin's theorem the derivative of a minimum is that of its form at the minimiser: no worst case is differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork
from convex_head.adversary.scan import SATISFIED, MarginScan, Step
from convex_head.problems.losses import MarginLoss
from convex_head.problems.multipliers import constant, lowered, reach


class Adjoint:
    """Smoothed and hard loss summed over all rows, and the gradient of the smoothed mean in the vectors (F, m, d).

    Args:
        scan: rows, classes and activation.
        packed: the network.
        loss: of the margins.
        radius, mu, blur: of the smoothed problem.
        examples: n of the mean, over all shards.
        centre: (rows, K) multipliers that the smoothing is centred on (problems/multipliers.py), or None.

    Attributes:
        losses: (2,) smoothed and hard loss, sums over the rows; with a centre the second has no meaning.
    """

    def __init__(
        self,
        scan: MarginScan,
        packed: PackedNetwork,
        loss: MarginLoss,
        *,
        radius: float,
        mu: float,
        blur: float,
        examples: int,
        centre: Tensor | None = None,
    ):
        self._scan, self._loss, self._centre = scan, loss, centre
        self._radius, self._mu, self._blur, self._examples = radius, mu, blur, examples
        self._spectra = spectra = scan.spectra(packed)
        vectors = packed.vectors
        functions, m, _ = vectors.shape
        self.losses = vectors.new_zeros(2, dtype=torch.float64)
        self._at_examples = torch.zeros_like(vectors, dtype=spectra.dtype)
        self._on_steps = vectors.new_zeros(functions, functions, m, m, dtype=torch.float64)
        self._on_self = torch.zeros_like(vectors[..., 0], dtype=spectra.dtype)

    def run(self) -> None:
        """Pass over all rows."""
        scan, loss, mu, centre = self._scan, self._loss, self._mu, self._centre
        further = reach(centre, mu)
        limits = (SATISFIED + further, self._blur, loss.window(mu) + further)
        self.losses[0] -= constant(centre, loss.share(scan.num_classes), mu)
        for chunk, _, margins, steps in scan.passes(self._spectra, self._radius, *limits):
            value, slopes = loss.smoothed(lowered(margins, centre, chunk.rows, mu), scan.num_classes, mu)
            hard = loss.value(margins, scan.num_classes)
            self.losses += torch.stack([value.double().sum(), hard.double().sum()])
            self._add(chunk.x, steps, slopes / -self._examples)

    def _add(self, x: Tensor, steps: Sequence[Step], omega: Tensor) -> None:
        """One chunk: features (rows, d), its worst cases and the weights (rows, K) of its margins."""
        functions, m, _ = self._at_examples.shape
        coefficients = torch.zeros(len(x), functions, m, dtype=x.dtype, device=x.device)
        for step in steps:
            group_pass = step.group_pass
            forms = self._spectra.forms.take(group_pass.group.forms)
            coefficient, in_basis, on_self = group_pass.backward(step, group_pass.load(omega))
            group_pass.scatter(coefficient, coefficients)
            forms.scatter_pairs(group_pass.combine(in_basis).mT, self._on_steps)
            forms.scatter(on_self, self._on_self)
        width = functions * m
        self._at_examples.view(width, -1).addmm_(coefficients.view(-1, width).mT, x)

    def parts(self) -> tuple[Tensor, ...]:
        """What processes add up, in place: the losses, gradients at the examples (F, m, d), through the steps, in
        combinations of neurons (F, F, m, m), and through |v_j|, in units of v_j (F, m)."""
        return self.losses, self._at_examples, self._on_steps, self._on_self

    def gradient(self) -> Tensor:
        """(F, m, d), float64."""
        vectors = self._spectra.packed.vectors.double()
        functions, m, d = vectors.shape
        mixed = self._on_steps.transpose(1, 2).reshape(functions * m, functions * m)
        on_steps = (mixed @ vectors.view(functions * m, d)).view_as(vectors)
        return self._at_examples.double() + on_steps + self._on_self.double().unsqueeze(-1) * vectors
