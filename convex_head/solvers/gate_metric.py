"""Approximate inverse Hessian of a smoothed problem on fixed gates, for L-BFGS in u with v_g = |u_g| u_g.

One dense block for the vectors of each function, or where those are many one for each vector. In v a block is

    sum_i c_if z_i z_i' + constraints,    z_i the stacked +-d_ip xt_i of the function's vectors

with c_if the slope of the smoothed loss's slopes at the point, and for each vector sum_i (slack / n mu) q_i q_i' over
the constraints at which its smoothed hinge is curved, q_i = (2 d_ip - 1) xt_i - r v / |v|_*, and the curvature of the
norm. Left out: coupling of functions, curvature of the margins' norms, gates that flip. In u it is J'(.)J + reg I with
J = |u| I + u u' / |u|.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convex_head.problems.gates import Centre

_LARGEST = 1_500
_ELEMENTS = 8_000_000


def block_metric(part: Any, u: Tensor, mu: float, narrow: float, point: Centre) -> Callable[[Tensor], Tensor]:
    """Function that applies the approximate inverse to a tensor like u.

    Args:
        part: a problem restricted to the groups of u.
        u: (A, d+1).
        mu, narrow: smoothing widths.
        point: slopes (n, K) and shares (n, A) at u.
    """
    count, width = len(part.gates), u.shape[1]
    pattern, function = part.groups[:, 0] % count, part.groups[:, 1]
    sign = torch.where(part.groups[:, 0] < count, 1.0, -1.0).to(part.x)
    curvature = part.loss_curvature(point.slopes, mu)
    blocks: list[tuple[Tensor, Tensor]] = []
    for f in range(part.num_functions):
        members = (function == f).nonzero().squeeze(1)
        pieces = [members] if len(members) * width <= _LARGEST else list(members.split(1))
        for piece in pieces:
            if len(piece) == 0:
                continue
            rows = (curvature[:, f] > 0).nonzero().squeeze(1)
            hessian = u.new_zeros(len(piece) * width, len(piece) * width)
            on = (curvature[rows, f] / part.n).sqrt()[:, None] * part.on[rows][:, pattern[piece]] * sign[piece]
            for some in torch.arange(len(rows), device=u.device).split(max(1, _ELEMENTS // len(hessian))):
                z = (on[some][:, :, None] * part.x[rows[some]][:, None, :]).flatten(1)
                hessian += (z.mT @ z).double()
            for place, group in enumerate(piece.tolist()):
                inner = slice(place * width, (place + 1) * width)
                if point.shares is not None:
                    hessian[inner, inner] += part.constraint_curvature(group, u[group], mu, narrow, point.shares)
            jacobian = _jacobian(u[piece])
            size = len(piece)
            hessian = hessian.view(size, width, size, width)
            hessian = torch.einsum("aij,ajbk,bkl->aibl", jacobian, hessian, jacobian).reshape(size * width, -1)
            hessian.diagonal().add_(part.reg)
            blocks.append((piece, torch.cholesky_inverse(torch.linalg.cholesky(hessian))))

    def apply(gradient: Tensor) -> Tensor:
        out = torch.empty_like(gradient)
        for piece, inverse in blocks:
            out[piece] = (inverse @ gradient[piece].flatten()).view(len(piece), width)
        return out

    return apply


def shared_metric(
    part: Any, u: Tensor, mu: float, point: Centre, spectrum: tuple[Tensor, Tensor]
) -> Callable[[Tensor], Tensor]:
    """The same for gates that can flip, where nearly all vectors are in use: blocks that share their eigenvectors.

    A block is c |u|^2 X'X / n + 2 reg I, with c the mean curvature of the loss where the gate is on or can flip.

    Args:
        part, u, mu, point: as for :func:`block_metric`.
        spectrum: eigenvalues and eigenvectors of X'X / n.
    """
    pattern, function = part.groups[:, 0] % len(part.gates), part.groups[:, 1]
    share = (part.on + part.flip).double().mean(0)[pattern]
    curvature = part.loss_curvature(point.slopes, mu).double().mean(0)[function]
    values, basis = spectrum
    weights = 1 / ((share * curvature * u.square().sum(-1))[:, None] * values + 2 * part.reg)
    return lambda gradient: ((gradient @ basis) * weights) @ basis.mT


def _jacobian(u: Tensor) -> Tensor:
    """(A, d+1, d+1) of v = |u| u."""
    size = u.norm(dim=-1)[:, None, None]
    eye = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    return size * eye + u[:, :, None] * u[:, None, :] / size.clamp_min(1e-300)
