"""Lower bounds of the training problem: dual points, and the exact oracle for the best neuron on the sphere.

For moments A_c and mass of a dual point (problems/polynomial.py), max over |u| = 1 of +-[u;1]'A_c[u;1] is one
eigendecomposition and one scalar equation a function and sign. Its Lagrangian value bounds the maximum from above, so
that the bound of the optimum which follows is rigorous up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convex_head.adversary.trust_region import minimise_over_sphere


@dataclass(frozen=True)
class DualPoint:
    """Slopes and worst-case points summed up: ``mass`` (F or 1,) and moments A (F, d+1, d+1), float64."""

    mass: Tensor
    moments: Tensor


@dataclass(frozen=True)
class DualReport:
    """A dual point and the primal side of its gap.

    Attributes:
        point: the dual point.
        primal: hard objective at the best scaling of the output weights (margins are linear in it).
        scale: that scaling.
        smoothing: mean of loss - <s, 1 - w>, the share of the gap that a narrower smoothing would close.
    """

    point: DualPoint
    primal: float
    scale: float
    smoothing: float


@dataclass(frozen=True)
class OracleAnswer:
    """Best neurons of each function and sign.

    Attributes:
        bounds: (F, 2) upper bounds of max_u [u;1]'A[u;1] and of max_u -[u;1]'A[u;1].
        directions: (F, 2, d) the maximisers.
        dual: lower bound of the optimum of (P) that follows.
    """

    bounds: Tensor
    directions: Tensor
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
    bounds, directions = [], []
    for sign in (1.0, -1.0):
        # max of sign*(u'Qu + q'u + c) = -min of (-sign)(...) in the eigenbasis, where the Hessian is 2Q.
        best = minimise_over_sphere(-sign * 2 * eigenvalues, -sign * linear)
        bounds.append(sign * constant - best.value.squeeze(1))
        u = (best.minimiser @ vectors.mT).squeeze(1)
        directions.append(u / u.norm(dim=-1, keepdim=True))
    bound = torch.stack(bounds, dim=1)
    peak = bound.amax(1)
    coupled = len(point.mass) < len(peak)
    scale = (reg / (peak.amax() if coupled else peak).clamp_min(reg)).clamp_max(1.0)
    return OracleAnswer(bound, torch.stack(directions, dim=1), float((scale * point.mass).sum()))
