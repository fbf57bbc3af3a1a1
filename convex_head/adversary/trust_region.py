"""Global minimisers of quadratics over a ball, for many gradients that share a Hessian.

The trust-region subproblem, in the eigenbasis of its Hessian,

    minimise  g'e + 1/2 sum_j lambda_j e_j^2   subject to  |e| <= r                              (TRS)

has the solution e_j = -g_j / (lambda_j + mu) with mu >= max(0, -lambda_min) and mu (r - |e|) = 0, plus a
multiple of the lowest eigenvector in the *hard case* (g orthogonal to the lowest eigenspace). Its Lagrangian

    L(mu) = -1/2 sum_j g_j^2 / (lambda_j + mu) - mu r^2 / 2

is a lower bound of the minimum for every admissible mu, equal to it at the solution and stationary there, so
it is what we return as the value: safe, and accurate to the square of the error in mu.

The scalar ("secular") equation |e(mu)| = r is solved in delta = mu + lambda_min, which keeps the distance to
the pole exact, by Newton's method on 1/|e| - 1/r started left of the root, from where it converges monotonically
and needs no bracket (J. More and D. Sorensen, "Computing a trust region step", SIAM J. Sci. Stat. Comput. 4 (1983),
sections 3-5; A. Conn, N. Gould, P. Toint, "Trust-Region Methods" (2000), section 7.3).

*Blur.* Where the minimiser is not unique (the hard case, repeated eigenvalues) the minimum has a kink in (g, H), and
training stalls there. It can be smoothed from below: with S a positive semidefinite slack in the second moment,

    min  g'e + 1/2 e'He + 1/2 <H, S> - eps tr S^(1/2)   subject to  |e|^2 + tr S <= r^2

is a minimum of functions linear in (g, H), hence concave. It lies at most eps r sqrt(d) below the minimum of (TRS), and
its solution only replaces g_j^2 by g_j^2 + eps^2 in the sums above: S = diag(eps^2 / (lambda_j + mu)^2) in the
eigenbasis. The pair (e, S) is a mixture of points of the ball, so bounds that it yields stay valid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from convex_head.adversary import ball_triton

_MAX_NEWTON = 60


class BallMinimum(NamedTuple):
    """Solutions of B trust-region subproblems.

    Attributes:
        value: (..., B) Lagrangian value, a lower bound of the minimum, equal to it up to rounding.
        multiplier: (..., B) mu, the multiplier of |e|^2 <= r^2 (times 1/2).
        minimiser: (..., B, k) e, with |e| <= r up to rounding.
        spread: (..., B, k) diagonal of the slack S with blur, |e|^2 + sum spread <= r^2; None without.
    """

    value: Tensor
    multiplier: Tensor
    minimiser: Tensor
    spread: Tensor | None = None


def minimise_over_ball(eigenvalues: Tensor, gradient: Tensor, radius: float) -> BallMinimum:
    """Minimise g'e + 1/2 sum lambda_j e_j^2 over |e| <= radius, for a batch of gradients.

    Directions outside the k coordinates (zero curvature and zero gradient) never lower the minimum, so a
    low-rank Hessian is given by its k eigenvalues alone.

    Args:
        eigenvalues: (..., k) in any order; leading axes broadcast against ``gradient``'s.
        gradient: (..., B, k) gradients in the eigenbasis.
        radius: r >= 0.

    Returns:
        BallMinimum with leading shape (..., B).
    """
    if radius == 0.0 or gradient.shape[-1] == 0:
        zero = gradient.new_zeros(gradient.shape[:-1])
        return BallMinimum(zero, zero.clone(), torch.zeros_like(gradient))
    lowest = eigenvalues.amin(-1)
    gaps = eigenvalues - lowest.unsqueeze(-1)
    floor = lowest.clamp_min(0).unsqueeze(-1)
    delta, scaled = _secular(gaps, gradient, radius, floor)
    multiplier = delta - lowest.unsqueeze(-1)
    value = _lagrangian(gradient, scaled, multiplier, radius)
    indefinite = (lowest < 0).unsqueeze(-1)
    minimiser = _complete(gaps, gradient, scaled.neg_(), radius, indefinite)
    return BallMinimum(value, multiplier.clamp_min(0), minimiser)


def minimise_blurred(eigenvalues: Tensor, gradient: Tensor, radius: float, blur: float, dimension: int) -> BallMinimum:
    """The smoothed problem of the module docstring in ``dimension`` >= k coordinates, of which k are curved.

    Shapes as in :func:`minimise_over_ball`; radius and blur are > 0. The value is at most blur * radius *
    sqrt(dimension) below the minimum over the ball.
    """
    if gradient.is_cuda:
        found = ball_triton.minimise_blurred(eigenvalues, gradient, radius, blur, dimension)
        if found is not None:
            return BallMinimum(*found)
    magnitude = (gradient.square() + blur**2).sqrt_()
    if dimension > gradient.shape[-1]:
        # The flat coordinates act as one.
        flat = blur * (dimension - gradient.shape[-1]) ** 0.5
        magnitude = torch.cat([magnitude, magnitude.new_full((*magnitude.shape[:-1], 1), flat)], dim=-1)
        eigenvalues = torch.cat([eigenvalues, torch.zeros_like(eigenvalues[..., :1])], dim=-1)
    k = gradient.shape[-1]
    lowest = eigenvalues.amin(-1)
    gaps = eigenvalues - lowest.unsqueeze(-1)
    delta, scaled = _secular(gaps, magnitude, radius, lowest.clamp_min(0).unsqueeze(-1))
    multiplier = delta - lowest.unsqueeze(-1)
    value = _lagrangian(magnitude, scaled, multiplier, radius)
    total = scaled.square().sum(-1, keepdim=True)
    shrink = (radius / total.clamp_min(radius**2).sqrt()) * scaled[..., :k] / magnitude[..., :k]
    return BallMinimum(value, multiplier.clamp_min(0), -gradient * shrink, (blur * shrink).square())


def minimise_over_sphere(eigenvalues: Tensor, gradient: Tensor, radius: float = 1.0) -> BallMinimum:
    """The same with the constraint |e| = radius, in the full space (k = d), where mu may be negative.

    Shapes as in :func:`minimise_over_ball`; ``multiplier`` is mu >= -lambda_min of either sign.
    """
    lowest = eigenvalues.amin(-1)
    gaps = eigenvalues - lowest.unsqueeze(-1)
    floor = torch.zeros_like(lowest).unsqueeze(-1)
    delta, scaled = _secular(gaps, gradient, radius, floor)
    multiplier = delta - lowest.unsqueeze(-1)
    value = _lagrangian(gradient, scaled, multiplier, radius)
    always = torch.ones_like(lowest, dtype=torch.bool).unsqueeze(-1)
    minimiser = _complete(gaps, gradient, scaled.neg_(), radius, always)
    return BallMinimum(value, multiplier, minimiser)


def _secular(gaps: Tensor, gradient: Tensor, radius: float, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Largest root delta >= floor of |g / (gaps + delta)| = radius, or floor where there is none.

    Returns delta (..., B) and g / (gaps + delta) (..., B, k).
    """
    tiny = torch.finfo(gradient.dtype).tiny ** 0.5
    gaps = gaps.unsqueeze(-2)
    # Each coordinate alone, and all of them at the largest gap, bound the root from below.
    start = (gradient.abs().div_(radius) - gaps).amax(-1)
    start = torch.maximum(start, gradient.norm(dim=-1) / radius - gaps.amax(-1))
    delta = torch.maximum(start, floor)
    inverse = torch.empty_like(gradient)
    scaled = torch.empty_like(gradient)
    tol = 4 * torch.finfo(gradient.dtype).eps
    for _ in range(_MAX_NEWTON):
        torch.add(gaps, delta.unsqueeze(-1), out=inverse)
        inverse.clamp_min_(tiny).reciprocal_()
        torch.mul(gradient, inverse, out=scaled)
        square = scaled.square()
        norm2 = square.sum(-1)
        slope = square.mul_(inverse).sum(-1)
        step = norm2 / slope.clamp_min(tiny) * (norm2.sqrt() / radius - 1)
        new = torch.maximum(delta + step, delta)
        done = (new - delta) <= tol * new
        if bool(done.all()):
            break
        delta = new
    return delta, scaled


def _lagrangian(gradient: Tensor, scaled: Tensor, multiplier: Tensor, radius: float) -> Tensor:
    return -0.5 * ((gradient * scaled).sum(-1) + multiplier * radius**2)


def _complete(gaps: Tensor, gradient: Tensor, e: Tensor, radius: float, active: Tensor) -> Tensor:
    """Bring e into the ball, and onto the sphere where ``active``, along the lowest eigenvector (hard case)."""
    norm2 = e.square().sum(-1)
    outside = (radius / norm2.clamp_min(radius**2).sqrt()).unsqueeze(-1)
    e.mul_(outside)
    missing = torch.where(active, radius**2 - norm2, torch.zeros_like(norm2))
    hard = missing > 1e-3 * torch.finfo(e.dtype).eps ** 0.5 * radius**2
    if bool(hard.any()):
        index = gaps.argmin(-1)[..., None, None].expand(*e.shape[:-1], 1)
        lowest = e.gather(-1, index)
        side = torch.where(gradient.gather(-1, index) > 0, -1.0, 1.0)
        wanted = side * (missing.unsqueeze(-1) + lowest.square()).clamp_min(0).sqrt()
        e.scatter_(-1, index, torch.where(hard.unsqueeze(-1), wanted, lowest))
    return e
