"""Projected steepest descent inside a threat set, shared by our own attacks and by the sanity checks.

    x <- P_threat( x + step * d ),   d = argmin { <g, d> : |d| <= 1 }

with d = -sign(g) in Linf, -g/|g|_2 in L2, and in L1 -sign(g)/k on the k coordinates of largest |g|, k a tenth
of all (the exact minimiser moves one pixel a step, which a budget of tens of steps cannot use).
The best iterate counts, so that a longer run is never worse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convex_head.threat import ThreatModel

_L1_SHARE = 0.1
_MOMENTUM = 0.75


def steepest_descent(gradient: Tensor, norm: str) -> Tensor:
    """(n, ...) unit direction of steepest descent in ``norm``."""
    if norm == "Linf":
        return -gradient.sign()
    flat = gradient.flatten(1)
    if norm == "L2":
        length = flat.norm(dim=1, keepdim=True).clamp_min(1e-30)
        return -(flat / length).view_as(gradient)
    count = max(1, int(_L1_SHARE * flat.shape[1]))
    threshold = flat.abs().topk(count, dim=1).values[:, -1:]
    kept = flat.sign() * (flat.abs() >= threshold)
    return -(kept / kept.abs().sum(dim=1, keepdim=True).clamp_min(1.0)).view_as(gradient)


def random_start(images: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
    """(n, ...) points spread over the threat set; the generator is on the CPU, so that devices agree."""
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32).to(images)
    if threat.norm == "Linf":
        noise = threat.eps * (2 * torch.rand(images.shape, generator=generator).to(images) - 1)
    else:
        noise = -threat.eps * steepest_descent(noise, threat.norm)
    return threat.project(images, images + noise)


def descend(
    objective: Callable[[Tensor], Tensor],
    images: Tensor,
    start: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    first_step: float = 2.0,
    last_step: float = 0.05,
    stop_below: float = -torch.inf,
) -> tuple[Tensor, Tensor]:
    """Minimise ``objective`` inside the threat set around ``images``, an example at a time.

    Args:
        objective: (n, ...) points to (n,) values, differentiable.
        images: (n, ...) centres.
        start: (n, ...) first iterates, inside the threat set.
        steps: gradient steps; their lengths fall geometrically.
        first_step, last_step: lengths in units of eps.
        stop_below: end early once every value is below it.

    Returns:
        (n, ...) best points and their (n,) values.
    """
    x, velocity = start.detach(), torch.zeros_like(start)
    best, best_value = x.clone(), torch.full((len(x),), torch.inf, device=x.device)
    for step in range(steps + 1):
        point = x.clone().requires_grad_()
        with torch.enable_grad():
            value = objective(point)
            gradient = torch.autograd.grad(value.sum(), point)[0]
        better = value.detach() < best_value
        best_value = torch.where(better, value.detach(), best_value)
        best[better] = x[better]
        if step == steps or bool((best_value < stop_below).all()):
            break
        length = first_step * (last_step / first_step) ** (step / max(1, steps - 1))
        direction = steepest_descent(torch.nan_to_num(gradient), threat.norm)
        velocity = _MOMENTUM * velocity + (1 - _MOMENTUM) * direction if step else direction
        x = threat.project(images, x + length * threat.eps * velocity).detach()
    return best, best_value
