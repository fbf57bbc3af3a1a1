"""The inner maximisation of adversarial training: projected gradient ascent in pixels.

    x_{t+1} = P_{B(x, eps) and [0,1]} ( x_t + step * direction(grad) )

with the sign of the gradient for Linf and the normalised gradient for L2 (Madry et al. 2018, arXiv
1706.06083). A tool for training and for choosing radii on validation data; evaluation uses the attack
libraries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..threat import ThreatModel
from .modes import evaluation_mode


def random_start(images: Tensor, threat: ThreatModel) -> Tensor:
    """A uniform random point of each image's ball, clipped to [0, 1]; shape of ``images``."""
    if threat.norm == "Linf":
        noise = torch.empty_like(images).uniform_(-threat.eps, threat.eps)
    else:
        noise = torch.randn_like(images)
        fraction = torch.rand(len(images), device=images.device, dtype=images.dtype) ** (1 / images[0].numel())
        noise = noise * _per_image(threat.eps * fraction / _norms(noise), images)
    return (images + noise).clamp(0, 1)


def maximise(
    model: nn.Module,
    images: Tensor,
    threat: ThreatModel,
    objective: Callable[[Tensor], Tensor],
    *,
    start: Tensor,
    steps: int,
    step_size: float,
) -> Tensor:
    """Ascend ``objective(logits)`` (a scalar) from ``start``; returns images in the balls and in [0, 1].

    The model is in evaluation mode meanwhile, no parameter receives a gradient. The norm is Linf or L2.
    """
    points = threat.project(images, start.detach())
    with evaluation_mode(model), torch.enable_grad():
        for _ in range(steps):
            points.requires_grad_(True)
            (gradient,) = torch.autograd.grad(objective(model(points)), points)
            if threat.norm == "Linf":
                direction = gradient.sign()
            else:
                direction = gradient * _per_image(1 / _norms(gradient), images)
            points = threat.project(images, points.detach() + step_size * direction)
    return points.detach()


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).clamp_min(1e-12)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *[1] * (images.ndim - 1))


def pgd_accuracy(
    model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, *, steps: int = 10
) -> tuple[float, float]:
    """Clean accuracy, and accuracy on the points of a short deterministic PGD run; both in [0, 1].

    It ascends the margin max_{k != y} f_k - f_y: a cross-entropy that saturates, as it does on heads trained
    with a hinge, flatters them. For choices on validation data only: it starts at the images, takes steps of
    eps/4 and reports no flags. Images and labels are moved to the model.
    """
    device = next((parameter.device for parameter in model.parameters()), images.device)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    images, labels = images.to(device, dtype), labels.to(device)

    def margin(logits: Tensor) -> Tensor:
        own = logits.gather(1, labels[:, None])
        return (logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True) - own).sum()

    found = maximise(
        model,
        images,
        threat,
        margin,
        start=images,
        steps=steps,
        step_size=threat.eps / 4,
    )
    with torch.no_grad(), evaluation_mode(model):
        clean = model(images).argmax(1) == labels
        robust = clean & (model(found).argmax(1) == labels)
    return clean.double().mean().item(), robust.double().mean().item()
