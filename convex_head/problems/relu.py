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

from convex_head.problems.gates import Centre, GateNetwork, GateProblem, Penalty
from convex_head.problems.smoothing import BallNorm, dual_norm

FEASIBLE = 1e-5
_ELEMENTS = 4_000_000
_ITERATIONS, _CHECKS, _CLOSE = 200, 10, 1e-3
# Weight of hard constraints in bounds: shares have to end somewhere.
_CAP = 1e6


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

    def _by_vector(self, gradient: Tensor) -> Tensor:
        return torch.cat([gradient, -gradient])

    def violations(self, network: GateNetwork) -> tuple[Tensor, float]:
        """Sum of the violations of every example (n,), and the largest of all; margin units."""
        vectors = network.vectors.to(self.dtype)
        parts = [self._violations(vectors, chunk) for chunk in self._chunks]
        return torch.cat([p.flatten(1).sum(1) for p in parts]).double(), max(float(p.max()) for p in parts)

    def largest_violations(self, network: GateNetwork) -> Tensor:
        """Largest violation of every vector (G, F); margin units."""
        vectors = network.vectors.to(self.dtype)
        return torch.stack([self._violations(vectors, chunk).amax(0) for chunk in self._chunks]).amax(0)

    def _violations(self, vectors: Tensor, chunk: slice) -> Tensor:
        return (self.radius * dual_norm(vectors, self.ball) - self._slacks(vectors, chunk)).clamp_min(0)

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

    def _patterns(self) -> Tensor:
        """(A,) pattern of every group."""
        count = len(self.gates)
        if self.groups is not None:
            return self.groups[:, 0] % count
        return torch.arange(count, device=self.x.device).repeat(2).repeat_interleave(self.num_functions)

    def centre(self) -> Centre:
        return Centre(super().centre().slopes, self.x.new_zeros(self.n, len(self._patterns())))

    def _penalty(self, vectors: Tensor, chunk: slice, mu: float, narrow: float, centre: Centre) -> Penalty:
        assert centre.shares is not None
        x, sides, last = self.x[chunk], self.sides[chunk][:, self._patterns()], centre.shares[chunk].to(self.dtype)
        norm = BallNorm(self.radius, self.ball, narrow)
        size = norm.size(vectors)
        exact, smooth = norm.values(size)
        score = (x @ vectors.mT).mul_(sides)
        hard = self.slack * float((exact - score).clamp_min_(0).sum(dtype=torch.float64))
        share = ((smooth - score).div_(mu).add_(last)).clamp_(0, 1)
        moments, weights = (share * sides).mT @ x, share.sum(0)
        value = (weights * smooth).sum() - (moments * vectors).sum() - 0.5 * mu * (share - last).square_().sum()
        gradient = norm.pull_(vectors.clone(), size, weights) - moments
        return Penalty(hard, self.slack * float(value), self.slack * gradient, share)

    def constraint_curvature(self, group: int, u: Tensor, mu: float, narrow: float, shares: Tensor) -> Tensor:
        """(d+1, d+1) Hessian of one group's smoothed penalty at v = |u| u, with its ``shares`` (n, A)."""
        share, v = shares[:, group], u.norm() * u
        rows = ((share > 0) & (share < 1)).nonzero().squeeze(1)
        size = v[:-1].abs() if self.ball == "linf" else v[:-1].norm()
        width = narrow / max(self.radius * (self.d if self.ball == "linf" else 1), 1e-300)
        pull = self.radius * v[:-1] / size.clamp_min(width)
        q = self.x[rows] * self.sides[rows][:, self._patterns()[group], None]
        q = q - torch.cat([pull, pull.new_zeros(1)])
        hessian = self.slack / (self.n * mu) * (q.mT @ q)
        bend = self.slack / self.n * self.radius * share.sum()
        if self.ball == "linf":
            hessian.diagonal()[:-1].add_(bend * (size < width) / width)
        else:
            hessian.diagonal()[:-1].add_(bend / size.clamp_min(width))
        return hessian.double()

    def support(self, moments: Tensor, limit: float, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """By accelerated projected gradient on the shares a in [0, slack / n] of the constraints, group by group:

        min_a |m + sum_i a_i s_i xt_i - r (sum_i a_i) e|,   |e| <= 1 in the ball's norm, in closed form; s_i = 2 d_i - 1
        """
        patterns, rows = self._patterns(), max(1, _ELEMENTS // self.n)
        size, best = moments.norm(dim=-1), moments.clone()
        todo = (size > limit).nonzero().squeeze(1)
        for part in todo.split(rows):
            start = None if shares is None else shares[:, part]
            best[part] = self._residual(moments[part], patterns[part], limit, start)
        return torch.minimum(size, best.norm(dim=-1)), best

    def _residual(self, moments: Tensor, patterns: Tensor, limit: float, start: Tensor | None) -> Tensor:
        """(A, d+1) shortest residuals found."""
        cap, x = min(self.slack, _CAP) / self.n, self.x.double()
        entries = self.d if self.ball == "linf" else 1
        largest = float(torch.linalg.eigvalsh(x.mT @ x)[-1])
        step = 1 / (math.sqrt(largest) + self.radius * math.sqrt(entries * self.n)) ** 2
        out = moments.clone()
        rows = torch.arange(len(moments), device=x.device)
        sides = self.sides[:, patterns].double()
        a = torch.zeros_like(sides) if start is None else cap * start.double()
        ahead, momentum = a, 1.0
        for iteration in range(_ITERATIONS):
            residual = self._shrink(moments[rows] + (ahead * sides).mT @ x, ahead.sum(0))
            short = self.radius * dual_norm(residual, self.ball) - (x @ residual.mT) * sides
            fresh = (ahead + step * short).clamp(0, cap)
            following = 0.5 * (1 + math.sqrt(1 + 4 * momentum**2))
            ahead = fresh + (momentum - 1) / following * (fresh - a)
            a, momentum = fresh, following
            if iteration % _CHECKS == _CHECKS - 1:
                found = self._shrink(moments[rows] + (a * sides).mT @ x, a.sum(0))
                size = found.norm(dim=-1)
                out[rows] = torch.where((size < out[rows].norm(dim=-1))[:, None], found, out[rows])
                # The value at the unit vector along the residual is a lower bound of what is sought.
                value = (moments[rows] * residual).sum(-1) - cap * short.clamp_min(0).sum(0)
                open_ = (size > limit) & (size - value / residual.norm(dim=-1).clamp_min(1e-300) > _CLOSE * size)
                if not bool(open_.any()):
                    break
                rows, sides, a, ahead = rows[open_], sides[:, open_], a[:, open_], ahead[:, open_]
        return out

    def _shrink(self, moments: Tensor, reach: Tensor) -> Tensor:
        """Residual of (A, d+1) after the best point of the ball times r reach (A,)."""
        head, size = moments[:, :-1], (self.radius * reach)[:, None]
        if self.ball == "linf":
            head = head.sign() * (head.abs() - size).clamp_min(0)
        else:
            head = head * (1 - size / head.norm(dim=-1, keepdim=True).clamp_min(1e-300)).clamp_min(0)
        return torch.cat([head, moments[:, -1:]], dim=-1)

    def network_values(self, network: GateNetwork) -> Tensor:
        """(n, F) values of the ReLU network, float64: those of the convex model where no constraint is violated."""
        vectors = network.vectors.double()
        half = vectors.shape[0] // 2
        out = [torch.einsum("nd,gfd->ngf", self.x[chunk].double(), vectors).clamp_min(0) for chunk in self._chunks]
        return torch.cat([part[:, :half].sum(1) - part[:, half:].sum(1) for part in out])
