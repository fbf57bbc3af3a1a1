"""Robust training of a gated ReLU network: f_c(x) = sum_p 1[g_p'xt >= 0] xt'theta_pc, gates fixed.

A perturbation can flip a gate. ``flips="cover"`` counts that in: S_i are the gates that stay on in the whole ball, U_i
those that can flip, |g_p'xt_i| <= r |g_p|_*, and the margin of problems/gates.py

    w_ik = xt_i' D_ik - r |D_ik|_* + sum_{p in U_i} min(0, xt_i' D_pk - r |D_pk|_*)
    D_ik = sum_{p in S_i} B_ik theta_p

is a lower bound of the true worst case: at every point of the ball the gates in S_i are on, each in U_i is on (and its
part at least its own smallest value) or off (0). It is concave in theta, so training on it stays convex and its margins
are certified. ``flips="ignore"`` is the formula of arXiv 2405.14033: U_i is empty and S_i holds the gates that are on
at x_i itself, which is no bound once a gate flips.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convex_head.problems.gates import GateProblem
from convex_head.problems.smoothing import dual_norm


def can_flip(score: Tensor, gates: Tensor, radius: float | Tensor, ball: str) -> Tensor:
    """(n, P) bool: gate p is zero somewhere in the ball around x_i; score (n, P) is g_p'xt_i."""
    return score.abs() <= radius * dual_norm(gates, ball)


class GatedReluProblem(GateProblem):
    """The gated ReLU problem.

    Args:
        features, labels, gates, settings: as for :class:`~convex_head.problems.gates.GateProblem`.
        flips: "cover" or "ignore".
    """

    def __init__(self, features: Tensor, labels: Tensor, gates: Tensor, *, flips: str, **settings: Any):
        self.flips = flips
        super().__init__(features, labels, gates, **settings)

    def _flips(self, score: Tensor) -> Tensor | None:
        if self.flips == "ignore" or self.radius == 0:
            return None
        return can_flip(score, self.gates, self.radius, self.ball).to(self.dtype)


def covered(problem: GatedReluProblem) -> GatedReluProblem:
    """The same data and gates with the flips counted in: what the margins of an "ignore" problem are worth."""
    return GatedReluProblem(
        problem.x[:, :-1].double(),
        problem.labels,
        problem.gates,
        flips="cover",
        num_classes=problem.num_classes,
        radius=problem.radius,
        reg=problem.reg,
        loss=problem.loss,
        ball=problem.ball,
        dtype=torch.float64,
    )
