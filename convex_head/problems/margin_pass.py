"""Worst-case margins on fixed gates, and the gradient of their weighted sum, chunk by chunk of the examples.

The formulas are those of problems/gates.py; theta is (P, F, d+1). Pairwise margins have D_iy = 0, so that forms of all
F functions are kept side by side and K margins picked out.
The derivatives are written out: a pass is bound by memory, and an automatic one would keep every intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convex_head.problems.smoothing import BallNorm, smooth_hinge


class MarginPass:
    """One pass at one theta. For every chunk: :meth:`forward`, then :meth:`backward` if the gradient is wanted.

    Args:
        problem: a :class:`~convex_head.problems.gates.GateProblem`.
        theta: (P, F, d+1), in the problem's dtype.
        width: smoothing width of the norms and flips, margin units; 0 for the exact margins.
    """

    def __init__(self, problem: Any, theta: Tensor, width: float):
        self.problem, self.theta = problem, theta
        self.norm = BallNorm(problem.radius, problem.ball, width)
        self._gradient = torch.zeros_like(theta)
        if problem.flip is not None:
            self.flip_width = width / len(theta)
            self.flip_norm = BallNorm(problem.radius, problem.ball, self.flip_width)
            # |theta_py - theta_pk|_* once a pair of functions, not once an example.
            self._pairs = theta[:, :, None] - theta[:, None] if problem.pairwise else theta[:, None]
            sizes = self.flip_norm.size(self._pairs)
            self._hard, self._soft = (t.movedim(1, 0).contiguous() for t in self.flip_norm.values(sizes))
            self._pulls = torch.zeros_like(self._hard)

    def forward(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """Exact and smoothed margins of a chunk, (B, K) each."""
        problem, x = self.problem, self.problem.x[chunk]
        values = (problem.on[chunk] @ self.theta.flatten(1)).unflatten(1, self.theta.shape[1:])
        self._forms = self._form(values, chunk, 1)
        clean = torch.bmm(self._forms, x[:, :, None]).squeeze(-1)
        self._sizes = self.norm.size(self._forms)
        hard, soft = self.norm.values(self._sizes)
        exact, smooth = clean - hard, clean - soft
        if problem.flip is not None:
            lost, softly = self._flips(chunk)
            exact, smooth = exact - lost, smooth - softly
        return self._pick(exact, chunk), self._pick(smooth, chunk)

    def _flips(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """(B, F) what the gates that can flip take away."""
        problem = self.problem
        flip = problem.flip[chunk][:, None, :]
        score = (problem.x[chunk] @ self.theta.flatten(0, 1).mT).unflatten(1, self.theta.shape[:2])
        score = self._form(score, chunk, 2)
        labels = problem.labels[chunk]
        hard, soft = (t[labels] if problem.pairwise else t for t in (self._hard, self._soft))
        lost = torch.bmm(flip, (hard - score).clamp_min_(0)).squeeze(1)
        if self.flip_width == 0:
            return lost, lost
        short = soft - score
        softly = torch.bmm(flip, smooth_hinge(short, self.flip_width)).squeeze(1)
        self._active = short.div_(self.flip_width).clamp_(0, 1)
        return lost, softly

    def _form(self, values: Tensor, chunk: slice, axis: int) -> Tensor:
        """B_i applied to the function axis of (B, ...) values."""
        problem = self.problem
        if not problem.pairwise:
            sign = problem.sign[chunk]
            return values * (sign[:, :, None] if axis == 1 else sign[:, None, :])
        rows, labels = torch.arange(len(values), device=values.device), problem.labels[chunk]
        own = values[rows, labels] if axis == 1 else values[rows, :, labels]
        return own.unsqueeze(axis) - values

    def _adjoint(self, forms: Tensor, chunk: slice, axis: int) -> Tensor:
        """-B_i' applied to (B, ...) forms, in place; at y they are zero where margins are pairwise."""
        problem = self.problem
        if not problem.pairwise:
            sign = problem.sign[chunk]
            return forms.mul_(-sign[:, :, None] if axis == 1 else -sign[:, None, :])
        rows, labels = torch.arange(len(forms), device=forms.device), problem.labels[chunk]
        total = forms.sum(axis)
        if axis == 1:
            forms[rows, labels] = -total
        else:
            forms[rows, :, labels] = -total
        return forms

    def _pick(self, values: Tensor, chunk: slice) -> Tensor:
        """(B, F) to (B, K)."""
        return values.gather(1, self.problem.others[chunk]) if self.problem.pairwise else values

    def backward(self, slopes: Tensor, chunk: slice) -> None:
        """Add the gradient of -sum_ik s_ik w_ik, smoothed, for the chunk of the last :meth:`forward`; slopes (B, K)."""
        problem, x = self.problem, self.problem.x[chunk]
        if problem.pairwise:
            weights = slopes.new_zeros(self._sizes.shape[:2]).scatter_(1, problem.others[chunk], slopes)
        else:
            weights = slopes
        forms = self.norm.pull_(self._forms, self._sizes, weights)
        forms.baddbmm_(weights[:, :, None], x[:, None, :], alpha=-1)
        forms = self._adjoint(forms, chunk, 1)
        self._gradient.flatten(1).addmm_(problem.on[chunk].mT, forms.flatten(1), alpha=-1)
        if problem.flip is not None:
            lost = self._active.mul_(problem.flip[chunk][:, :, None]).mul_(weights[:, None, :])
            if problem.pairwise:
                self._pulls.index_add_(0, problem.labels[chunk], lost)
            else:
                self._pulls[0] += lost.sum(0)
            scores = self._adjoint(lost, chunk, 2)
            self._gradient.flatten(0, 1).addmm_(scores.flatten(1).mT, x)

    def gradient(self) -> Tensor:
        """(P, F, d+1)."""
        if self.problem.flip is None:
            return self._gradient
        pulls = self._pulls.movedim(0, 1)
        pulled = self.flip_norm.pull_(self._pairs.clone(), self.flip_norm.size(self._pairs), pulls)
        if self.problem.pairwise:
            return self._gradient + pulled.sum(2) - pulled.sum(1)
        return self._gradient + pulled.squeeze(1)
