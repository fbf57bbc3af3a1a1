"""Robust margin losses: hard value, smoothed value and its slopes.

Every loss here is the support function of a small convex set S applied to the hinge arguments z_k = 1 - w_k,
where w_k are the K worst-case margins of one example:

    loss(w) = max_{s in S} sum_k s_k (1 - w_k)

    binary, one_vs_rest, multi_margin    S = [0, 1/q]^K       (1/q) sum_k (1 - w_k)_+
    crammer_singer                       S = {s >= 0, sum s <= 1}    max_k (1 - w_k)_+

with q = 1 (binary) or the number of classes. Any s in S gives a lower bound, which is what the dual of
``problems/polynomial.py`` needs. Smoothing subtracts (mu/2)|s|^2 (scaled to the set) inside the maximum, so that
loss - mu/2 <= smoothed <= loss and the gradient is the projection of z/mu onto S (Y. Nesterov, "Smooth minimization
of non-smooth functions", Math. Program. 103 (2005)).

Why crammer_singer and multi_margin are exact in the ball: (1 - t)_+ is non-increasing in t, hence
max_e (1 - m_k(e))_+ = (1 - min_e m_k(e))_+ for each margin m_k = f_y - f_k, and maxima over e and over k commute, so
max_e max_k (1 - m_k(e))_+ = max_k (1 - w_k)_+. The robust multi-margin sum lets every k have its own worst e.

Sources: K. Crammer and Y. Singer, JMLR 2 (2001); ``torch.nn.MultiMarginLoss``; arXiv 2405.14033 (one_vs_rest).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_head.errors import UnknownLossError


@dataclass(frozen=True)
class MarginLoss:
    """A loss of K worst-case margins an example.

    Attributes:
        name: public name.
        pairwise: margins are f_y - f_k (k != y) if True, y_c f_c otherwise.
        joint: S is a simplex (maximum over k) if True, a box (sum over k) otherwise.
    """

    name: str
    pairwise: bool
    joint: bool

    def share(self, num_classes: int) -> float:
        """1/q, the largest slope a single margin can have."""
        return 1.0 if self.joint or num_classes == 2 else 1.0 / num_classes

    def window(self, mu: float) -> float:
        """How far above the smallest margin of its example a margin can lie and still have a slope at width mu."""
        return mu if self.joint else math.inf

    def near(self, margins: Tensor, width: float) -> Tensor:
        """(n, k), k <= K: of each example at least the margins within width of its smallest, which alone have a slope.

        All of them where the loss is a sum over k, or a margin is no number, which the loss then shows.
        """
        if not self.joint or not bool(margins.isfinite().all()):
            return margins
        count = int((margins <= margins.amin(-1, keepdim=True) + width).sum(-1).amax())
        return margins if 2 * count > margins.shape[-1] else margins.topk(count, largest=False, sorted=False).values

    def value(self, margins: Tensor, num_classes: int) -> Tensor:
        """Loss of each example; margins (n, K) -> (n,)."""
        z = (1 - margins).clamp_min(0)
        return z.amax(-1) if self.joint else z.sum(-1) * self.share(num_classes)

    def smoothed(self, margins: Tensor, num_classes: int, mu: float) -> tuple[Tensor, Tensor]:
        """Smoothed loss (n,) and its slopes s (n, K), -d loss / d margin, a point of S for each example."""
        z = 1 - margins
        if self.joint:
            # Differences to the smallest margin are exact where many tie and 1 - margin would be rounded and summed up.
            pivot = margins.amin(-1, keepdim=True)
            s = project_simplex((pivot - margins) / mu, (1 - pivot) / mu)
            return (s * z).sum(-1) - 0.5 * mu * s.square().sum(-1), s
        share = self.share(num_classes)
        s = (z / mu).clamp(0, 1)
        return share * ((s * z).sum(-1) - 0.5 * mu * s.square().sum(-1)), share * s

    def clipped(self, slopes: Tensor, num_classes: int) -> Tensor:
        """Any numbers (n, K) scaled or cut down to points of S."""
        share, slopes = self.share(num_classes), slopes.clamp_min(0)
        if not self.joint or num_classes == 2:
            return slopes.clamp_max(share)
        return slopes * (share / slopes.sum(1, keepdim=True).clamp_min(share))

    def free(self, slopes: Tensor, num_classes: int) -> Tensor:
        """(n, K) True where a slope of :meth:`smoothed` moves with its margin: where S leaves it room."""
        if self.joint:
            positive = slopes > 0
            return positive & ~((positive.sum(-1, keepdim=True) == 1) & (slopes.amax(-1, keepdim=True) >= 1))
        return (slopes > 0) & (slopes < self.share(num_classes))


def project_simplex(y: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """Euclidean projection of each row of y + shift onto {s >= 0, sum s <= 1}; (n, K), shift (n, 1) -> (n, K).

    No row sums up to more than 1, but for the rounding of its division: a bound needs a point of the set.
    """
    least = -torch.as_tensor(shift, dtype=y.dtype, device=y.device)
    ordered = y.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    support = (ordered * count > excess).sum(-1, keepdim=True).clamp_min(1)
    level = torch.maximum(excess.gather(-1, support - 1) / support, least)
    s = (y - level).clamp_min(0)
    return s / s.sum(-1, keepdim=True, dtype=torch.float64).clamp_min(1).to(y.dtype)


LOSSES: dict[str, MarginLoss] = {
    "crammer_singer": MarginLoss("crammer_singer", pairwise=True, joint=True),
    "multi_margin": MarginLoss("multi_margin", pairwise=True, joint=False),
    "one_vs_rest": MarginLoss("one_vs_rest", pairwise=False, joint=False),
}


def get_loss(name: str) -> MarginLoss:
    """Look a loss up by name.

    Raises:
        UnknownLossError: the name is not one of the losses here.
    """
    if name not in LOSSES:
        raise UnknownLossError(f"loss must be one of {', '.join(LOSSES)}; found {name!r}. Pick one of these names.")
    return LOSSES[name]
