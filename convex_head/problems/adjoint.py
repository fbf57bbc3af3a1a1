"""Gradients of weighted sums of worst-case margins in the neurons, gathered chunk by chunk.

By Danskin's theorem the derivative of a minimum is that of its form at the minimiser: no worst case is differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convex_head.adversary.margins import Spectra
from convex_head.adversary.scan import Step


class Adjoint:
    """Gradient of sum_ik omega_ik w_ik in the packed vectors (F, m, d) of one network.

    Args:
        spectra: factors of the network.
    """

    def __init__(self, spectra: Spectra):
        vectors = spectra.packed.vectors
        functions, m, _ = vectors.shape
        self._spectra = spectra
        self._at_examples = torch.zeros_like(vectors, dtype=spectra.dtype)
        self._on_steps = vectors.new_zeros(functions, functions, m, m, dtype=torch.float64)
        self._on_self = torch.zeros_like(vectors[..., 0], dtype=spectra.dtype)

    def add(self, x: Tensor, steps: Sequence[Step], omega: Tensor) -> None:
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
        """What processes add up: gradients at the examples (F, m, d), through the steps, in combinations of neurons
        (F, F, m, m), and through |v_j|, in units of v_j (F, m)."""
        return self._at_examples, self._on_steps, self._on_self

    def gradient(self) -> Tensor:
        """(F, m, d), float64."""
        vectors = self._spectra.packed.vectors.double()
        functions, m, d = vectors.shape
        mixed = self._on_steps.transpose(1, 2).reshape(functions * m, functions * m)
        on_steps = (mixed @ vectors.view(functions * m, d)).view_as(vectors)
        return self._at_examples.double() + on_steps + self._on_self.double().unsqueeze(-1) * vectors
