"""The ellipsoid in which attacks move features: a linear map that makes it a ball, in front of a head.

With z = (phi(x) - mean) / std and d = z(x') - z(x) for images x' that an attack found,

    S = E[d d'] + shrink tr(S)/p I,     map(z) = s S^(-1/2) z,     s^2 = p / tr(S^(-1))

so that the squared gain is 1 on average over directions. A ball of radius r behind the map is an ellipsoid in
front of it, longer where attacks move the features more. The map is affine, so that every certificate stays exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convex_head.baselines.pgd import maximise
from convex_head.features import extract_features
from convex_head.threat import ThreatModel

_SHRINK = 0.1
_STEPS = 10


def attacked_images(model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, batch: int = 256) -> Tensor:
    """Images (n, ...) after ascent on max_{k != y} f_k - f_y of ``model``, ten steps of eps/4."""
    found, device = [], next((p.device for p in model.parameters()), images.device)
    for part, y in zip(images.split(batch), labels.to(device).split(batch), strict=True):
        x = part.to(device)

        def margin(logits: Tensor, y: Tensor = y) -> Tensor:
            own = logits.gather(1, y[:, None])
            return (logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True) - own).sum()

        moved = maximise(model, x, threat, margin, start=x, steps=_STEPS, step_size=threat.eps / 4)
        found.append(moved.to(images.device))
    return torch.cat(found)


def displacement_map(
    model: nn.Module, backbone: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel
) -> nn.Linear:
    """The map of the module's docstring, standardisation included; features (n, p) to (n, p).

    Args:
        model: images to logits; what is attacked.
        backbone: images to features (n, p).
        images, labels: (n, ...) and (n,); a few thousand are enough.
        threat: Linf or L2, in pixels.
    """
    clean = extract_features(backbone, images).double()
    moved = extract_features(backbone, attacked_images(model, images, labels, threat)).double()
    mean, std = clean.mean(0), clean.std(0)
    std = torch.where(std > 1e-12 * clean.abs().amax(0), std, 1.0)
    shift = (moved - clean) / std
    covariance = shift.mT @ shift / len(shift)
    width = len(std)
    covariance += _SHRINK * covariance.trace() / width * torch.eye(width, dtype=torch.float64, device=std.device)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.mT * (width / values.reciprocal().sum()).sqrt()
    weight = root / std
    linear = nn.Linear(width, width, device=std.device)
    linear.weight.data.copy_(weight)
    linear.bias.data.copy_(-weight @ mean)
    return linear.requires_grad_(False)
