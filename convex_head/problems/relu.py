"""Robust training of a ReLU network over sampled sign patterns.

With theta_p = v_p - v'_p in problems/gates.py, the ReLU network

    f_c(x) = sum_p (v_pc'xt)_+ - (v'_pc'xt)_+

is the convex model, in the whole ball around every example, where the cone constraints hold:

    (2 d_ip - 1) xt_i'v_pc >= r |v_pc|_*     and the same for v'

for then no neuron changes its sign in the ball, f is linear there, and w_ik is the exact worst case on the training
set. Neuron v has the weights v / sqrt|v| and the readout +-sqrt|v|; reg |v| is then reg (|weights|^2 + readout^2) / 2.
``slack`` is the weight of the violations z_ig = (r |v_g|_* - (2 d_ip - 1) xt_i'v_g)_+:

    penalty = (slack / n) sum_i sum_g z_ig          slack = inf: the constraints are hard

With many more examples than features some example lies within r of every gate's hyperplane, and hard constraints leave
v_p = 0 for every sampled pattern; the pattern that is always on always remains, as a linear function.

The lower bound of problems/gates.py holds with multipliers in [0, slack / n] of the constraints.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from convex_head.problems.gates import Centre, GateNetwork, GateProblem

FEASIBLE = 1e-5


class ReluProblem(GateProblem):
    """The convex ReLU problem.

    Args:
        features, labels, gates, settings: as for :class:`~convex_head.problems.gates.GateProblem`.
        slack: weight of violated cone constraints; inf for hard constraints.
    """

    signs = 2

    def __init__(self, features: Tensor, labels: Tensor, gates: Tensor, *, slack: float, **settings: Any):
        super().__init__(features, labels, gates, **settings)
        self.slack = float(slack)
        self.sides = 2 * self.on - 1

    def theta(self, vectors: Tensor) -> Tensor:
        half = vectors.shape[0] // 2
        return vectors[:half] - vectors[half:]

    def violations(self, network: GateNetwork) -> tuple[Tensor, float]:
        """Sum of the violations of every example (n,), and the largest of all; margin units."""
        vectors = network.vectors.to(self.dtype)
        parts = [self._violations(vectors, chunk) for chunk in self._chunks]
        return torch.cat([p.flatten(1).sum(1) for p in parts]).double(), max(float(p.max()) for p in parts)

    def _violations(self, vectors: Tensor, chunk: slice) -> Tensor:
        return (self._norms(vectors, 0.0)[0] - self._slacks(vectors, chunk)).clamp_min(0)

    def _slacks(self, vectors: Tensor, chunk: slice) -> Tensor:
        """(B, G, F) of (2 d_ip - 1) xt_i'v_g."""
        groups, functions, width = vectors.shape
        score = (self.x[chunk] @ vectors.reshape(-1, width).mT).view(-1, 2, groups // 2, functions)
        return (score * self.sides[chunk][:, None, :, None]).flatten(1, 2)

    def penalty(self, network: GateNetwork) -> float:
        total, largest = self.violations(network)
        if self.slack == math.inf:
            return 0.0 if largest <= FEASIBLE else math.inf
        return self.slack * float(total.mean())

    def centre(self) -> Centre:
        return Centre(super().centre().slopes, self.x.new_zeros(self.n, *self.shape[:2]))

    def _penalty(
        self, vectors: Tensor, chunk: slice, mu: float, narrow: float, centre: Centre
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert centre.shares is not None
        score, last = self._slacks(vectors, chunk), centre.shares[chunk]
        exact, smooth = self._norms(vectors, narrow)
        weight = self.slack
        short = smooth - score
        share = (short.detach() / mu + last).clamp(0, 1)
        value = weight * (share * short).sum() - 0.5 * weight * mu * (share - last).square().sum()
        return weight * (exact - score).detach().clamp_min(0).sum(), value, share

    def network_values(self, network: GateNetwork) -> Tensor:
        """(n, F) values of the ReLU network, float64: those of the convex model where no constraint is violated."""
        vectors = network.vectors.double()
        half = vectors.shape[0] // 2
        out = [torch.einsum("nd,gfd->ngf", self.x[chunk].double(), vectors).clamp_min(0) for chunk in self._chunks]
        return torch.cat([part[:, :half].sum(1) - part[:, half:].sum(1) for part in out])
