"""Exact distance from a point to the zero set of a quadratic.

    minimise |e|^2   subject to   h0 + g'e + 1/2 sum_j lambda_j e_j^2 <= 0                        (D)

has one quadratic constraint, so strong duality holds (S-lemma). With the multiplier 1/mu the minimiser is
e = -g / (lambda + mu), mu >= max(0, -lambda_min), and for every such mu

    rho(mu)^2 = (2 h0 - sum_j g_j^2 / (lambda_j + mu)) / mu

is a lower bound of the squared distance, stationary and tight at the solution, hard case included (there it
absorbs the multiple of the lowest eigenvector). As in the trust-region module we work in
delta = mu + lambda_min. The constraint value h(mu) = h0 - 1/2 sum g^2/(lambda+mu) - mu/2 |e|^2 increases with mu;
its root is found by Newton's method in the radius (dh/d|e| = -mu |e|), which is exact for linear margins,
combined with the secular step that reaches that radius, safeguarded by a bracket.

Source: I. Polik and T. Terlaky, "A survey of the S-lemma", SIAM Review 49 (2007).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_ITER = 100


def distance_to_zero(eigenvalues: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """Smallest |e| with value + gradient'e + 1/2 sum eigenvalues e^2 <= 0.

    Eigenvalues and gradient coordinates below the rounding error of their batch are taken as zero: a boundary that
    only rounding makes reachable is reported as unreachable.

    Args:
        eigenvalues: (..., k) curvature; directions outside the k coordinates are flat.
        gradient: (..., B, k) in the eigenbasis.
        value: (..., B) h0, the quadratic at e = 0.

    Returns:
        (..., B) distances; 0 where value <= 0, inf where the quadratic is positive everywhere.
    """
    if gradient.shape[-1] == 0:
        return torch.where(value <= 0, 0.0, torch.inf).to(value.dtype)
    eigenvalues, gradient = _snap(eigenvalues), _snap(gradient)
    lowest = eigenvalues.amin(-1).unsqueeze(-1)
    gaps = (eigenvalues - lowest).unsqueeze(-2)
    low = lowest.clamp_min(0).expand(value.shape).contiguous()
    # At the end of the admissible multipliers lie the hard case and the boundaries that are never reached.
    s1, s2, _ = _sums(gaps, gradient, low)
    mu = low - lowest
    unreachable = (mu <= 0) & (value - 0.5 * s1 > 0)
    squared = torch.where((mu > 0) & s1.isfinite(), (2 * value - s1) / mu.clamp_min(_tiny(value)), 0.0)
    done = unreachable | (value <= 0) | ((mu > 0) & (value - 0.5 * (s1 + mu * s2) >= 0))
    delta, high = _start(gaps, gradient, value, lowest, low)
    tol = torch.finfo(value.dtype).eps ** 0.5
    for _ in range(_MAX_ITER):
        if bool(done.all()):
            break
        mu = (delta - lowest).clamp_min(_tiny(value))
        s1, s2, s3 = _sums(gaps, gradient, delta)
        h = value - 0.5 * (s1 + mu * s2)
        squared = torch.where(done, squared, torch.maximum(squared, (2 * value - s1) / mu))
        step = h / (mu * s2)
        done = done | (step.abs() <= tol) | (high - low <= tol**2 * high)
        low = torch.where(h < 0, delta, low)
        high = torch.where(h < 0, high, delta)
        newton = delta - s2 / s3 * step / (1 + step)
        inside = (newton > low) & (newton < high)
        delta = torch.where(done, delta, torch.where(inside, newton, 0.5 * (low + high)))
    distance = squared.clamp_min(0).sqrt()
    distance = torch.where(unreachable, torch.inf, distance)
    return torch.where(value <= 0, torch.zeros_like(distance), distance)


def lower_bound(lowest: Tensor, slope: Tensor, value: Tensor) -> Tensor:
    """Distance to the zero of value - slope rho + min(lowest, 0) rho^2 / 2: never above the exact distance.

    Args:
        lowest: smallest eigenvalue of the Hessian.
        slope: |gradient|.
        value: the quadratic at e = 0, assumed >= 0. All three broadcast.
    """
    value = value.clamp_min(0)
    return 2 * value / (slope + (slope.square() - 2 * value * lowest.clamp_max(0)).sqrt()).clamp_min(_tiny(value))


def _start(gaps: Tensor, gradient: Tensor, value: Tensor, lowest: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """A first delta near the root and an upper end of its bracket, from the cheap bound of the distance."""
    norm = gradient.norm(dim=-1)
    rho = lower_bound(lowest, norm, value).clamp_min(_tiny(value))
    high = (norm / rho).clamp_min(_tiny(value)) + low
    start = (gradient.abs() / rho.unsqueeze(-1) - gaps).amax(-1)
    start = torch.maximum(start, norm / rho - gaps.amax(-1))
    return torch.maximum(torch.minimum(start, high), low), high


def _sums(gaps: Tensor, gradient: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum_j g_j^2 / (gap_j + delta)^p for p = 1, 2, 3."""
    inverse = (gaps + delta.unsqueeze(-1)).clamp_min_(_tiny(gradient)).reciprocal_()
    scaled = gradient * inverse
    s1 = (gradient * scaled).sum(-1)
    square = scaled.square_()
    s2 = square.sum(-1)
    return s1, s2, square.mul_(inverse).sum(-1)


def _snap(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True)
    return torch.where(x.abs() <= 8 * x.shape[-1] * torch.finfo(x.dtype).eps * scale, 0.0, x)


def _tiny(x: Tensor) -> float:
    return float(torch.finfo(x.dtype).tiny ** 0.5)
