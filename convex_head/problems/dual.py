"""Lower bounds of the training problem: dual points, and the exact oracle for the best neuron on the sphere.

For moments A_c and mass of a dual point (problems/polynomial.py), max over |u| = 1 of +-[u;1]'A_c[u;1] is one
eigendecomposition and one scalar equation a function and sign. Its Lagrangian value bounds the maximum from above, so
that the bound of the optimum which follows is rigorous up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork
from convex_head.adversary.trust_region import minimise_over_sphere
from convex_head.problems.dual_rows import DualRows

# Neurons offered beside the best one.
_MORE = 7


@dataclass(frozen=True)
class DualPoint:
    """Slopes and worst-case points summed up: ``mass`` (F or 1,) and moments A (F, d+1, d+1), float64."""

    mass: Tensor
    moments: Tensor

    def bound(self, packed: PackedNetwork) -> float:
        """Lower bound of the network's own mean loss: mass - sum_c <A_c, D_c>."""
        lifted = torch.cat([packed.vectors, packed.nu.unsqueeze(-1)], dim=-1).double()
        values = ((lifted @ self.moments) * lifted).sum(-1)
        return float(self.mass.sum() - (packed.signs * values).sum())


@dataclass(frozen=True)
class DualReport:
    """A dual point and the primal side of its gap.

    Attributes:
        point: the dual point.
        primal: hard objective at the best scaling of the output weights (margins are linear in it).
        scale: that scaling.
        smoothing: mean loss less the point's bound of it, the share of the gap that a narrower smoothing would close:
            slopes are not those of the loss, and with blur points are not quite the worst.
        rows: the worst cases behind the point, for problems/repair.py; None where they are
            too many to hold or of no use.
        slopes: (n, K) of the margins, in [0, 1], of the rows held here; None where they are too many.
    """

    point: DualPoint
    primal: float
    scale: float
    smoothing: float
    rows: DualRows | None = None
    slopes: Tensor | None = None


@dataclass(frozen=True)
class OracleAnswer:
    """Best neurons of each function and sign.

    Attributes:
        bounds: (F, 2) upper bounds of max_u [u;1]'A[u;1] and of max_u -[u;1]'A[u;1].
        directions: (F, 2, k, d) the maximiser, and further eigenvectors of the quadratic part, by value.
        values: (F, 2, k) what they attain; the first is ``bounds``.
        dual: lower bound of the optimum of (P) that follows.
    """

    bounds: Tensor
    directions: Tensor
    values: Tensor
    dual: float


def oracle(point: DualPoint, reg: float) -> OracleAnswer:
    """Best neuron of every function and sign, and the lower bound at regularisation ``reg``.

    A single entry of ``point.mass`` stands for margins that couple the functions: then all are scaled together.
    """
    d = point.moments.shape[-1] - 1
    q = point.moments[:, :d, :d]
    eigenvalues, vectors = torch.linalg.eigh(0.5 * (q + q.mT))
    linear = 2 * (point.moments[:, :d, d].unsqueeze(1) @ vectors)
    constant = point.moments[:, d, d]
    bounds, directions, values = [], [], []
    for sign in (1.0, -1.0):
        # max of sign*(u'Qu + q'u + c) = -min of (-sign)(...) in the eigenbasis, where the Hessian is 2Q.
        best = minimise_over_sphere(-sign * 2 * eigenvalues, -sign * linear)
        bounds.append(sign * constant - best.value.squeeze(1))
        u = (best.minimiser @ vectors.mT).squeeze(1)
        others, attained = _eigenvectors(sign * eigenvalues, sign * linear.squeeze(1), vectors)
        directions.append(torch.cat([(u / u.norm(dim=-1, keepdim=True)).unsqueeze(1), others], dim=1))
        values.append(torch.cat([bounds[-1].unsqueeze(1), attained + sign * constant.unsqueeze(1)], dim=1))
    bound = torch.stack(bounds, dim=1)
    peak = bound.amax(1)
    coupled = len(point.mass) < len(peak)
    scale = (reg / (peak.amax() if coupled else peak).clamp_min(reg)).clamp_max(1.0)
    dual = float((scale * point.mass).sum())
    return OracleAnswer(bound, torch.stack(directions, dim=1), torch.stack(values, dim=1), dual)


def _eigenvectors(eigenvalues: Tensor, linear: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors (F, k, d), signed by the linear term, of largest u'Qu + q'u, and these values (F, k).

    The one nearest to the maximiser over the sphere is left out.
    """
    values = eigenvalues + linear.abs()
    count = min(_MORE + 1, values.shape[1])
    values, index = values.topk(count, dim=1)
    chosen = vectors.gather(2, index.unsqueeze(1).expand(-1, vectors.shape[1], -1))
    signs = torch.where(linear.gather(1, index) < 0, -1.0, 1.0)
    return (chosen * signs.unsqueeze(1)).mT[:, 1:], values[:, 1:]
