"""The ellipsoid that features reach under a pixel threat: a linear map that makes it a ball, in front of a head.

With z = (phi(x) - mean) / std, a direction v drawn at random for every image, and images x' in the threat's ball
that ascend v'z,

    S = E[d d'] + shrink tr(S)/p I,   d = z(x') - z(x),     map(z) = s S^(-1/2) z,

where s makes the reach 1: the mean of w'(map(z(x')) - map(z(x))) over unit vectors w drawn at random, for x' that
ascend it. A ball of radius 1 behind the map then goes as far as the threat moves features in a direction that it aims
at; in front of the map it is an ellipsoid, longer where images move the features more. Directions are drawn at random
because they have to be those of a head that does not exist yet: what attacks on the network's own head move says
little about where another head could be attacked. Neither labels nor a head are needed. The map is affine, so that
every certificate stays exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convex_head.baselines.pgd import maximise
from convex_head.errors import InputError
from convex_head.features import extract_features
from convex_head.threat import ThreatModel

_SHRINK = 0.1
_STEPS = 10
# Images, each with a direction, and steps of eps/2 along it.
_DRAWS, _DIRECTED_STEPS = 2000, 3
# A reach below this is rounding.
_LEAST = 1e-6
_ROUND = "standardise='scale' takes the round ball, which needs no gradients."


def attacked_images(model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, batch: int = 256) -> Tensor:
    """Images (n, ...) after ascent on max_{k != y} f_k - f_y of ``model``, ten steps of eps/4."""
    found, device = [], _device(model, images)
    for part, y in zip(images.split(batch), labels.to(device).split(batch), strict=True):
        x = part.to(device)

        def margin(logits: Tensor, y: Tensor = y) -> Tensor:
            own = logits.gather(1, y[:, None])
            return (logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True) - own).sum()

        moved = maximise(model, x, threat, margin, start=x, steps=_STEPS, step_size=threat.eps / 4)
        found.append(moved.to(images.device))
    return torch.cat(found)


def displacement_map(
    backbone: nn.Module, images: Tensor, features: Tensor, threat: ThreatModel, *, seed: int = 0, batch: int = 256
) -> nn.Linear:
    """The map of the module's docstring, standardisation included; features (n, p) to (n, p).

    Args:
        backbone: images to features (n, p).
        images: (n, ...); 2,000 of them are moved.
        features: (n, p), those of the images.
        threat: Linf or L2, in pixels.
        seed: of the images and directions.
        batch: images together.

    Raises:
        InputError: the threat moves no feature, or the backbone has no gradients.
    """
    sample = Sample(backbone, images, features, threat, seed=seed, batch=batch)
    _, shift = sample.moved(torch.eye(len(sample.std), dtype=torch.float64, device=sample.std.device))
    return sample.map(shift)


class Sample:
    """Images that a threat moves, and the map that follows from displacements of their features.

    Args:
        backbone, images, features, threat, seed, batch: as in :func:`displacement_map`.

    Attributes:
        images: (N, ...) those that are moved.
        clean: (N, p) their features, float64.
        mean, std: (p,) of all features; a constant feature has deviation 1.
    """

    def __init__(
        self, backbone: nn.Module, images: Tensor, features: Tensor, threat: ThreatModel, *, seed: int, batch: int
    ):
        self._backbone, self._threat, self._batch = backbone, threat, batch
        self._generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(images), generator=self._generator)[:_DRAWS]
        wide = features.double()
        self.mean, std = wide.mean(0), wide.std(0)
        self.std = torch.where(std > 1e-12 * wide.abs().amax(0), std, 1.0)
        self.images = images[rows.to(images.device)]
        self.clean = self._features(self.images)

    def _features(self, images: Tensor) -> Tensor:
        return extract_features(self._backbone, images, batch_size=self._batch).double().to(self.std.device)

    def shift(self, images: Tensor) -> Tensor:
        """Displacements (N, p) in deviations, of the sample's images after they were moved to ``images``."""
        return (self._features(images) - self.clean) / self.std

    def moved(self, root: Tensor) -> tuple[Tensor, Tensor]:
        """Unit directions (N, p) behind ``root``, and the displacements (N, p) of images that ascend them."""
        directions = torch.randn(self.clean.shape, generator=self._generator, dtype=torch.float64)
        directions = (directions / directions.norm(dim=1, keepdim=True)).to(self.std.device)
        along = directions @ root / self.std
        return directions, self.shift(_ascended(self._backbone, self.images, along, self._threat, self._batch))

    def map(self, shift: Tensor | None) -> nn.Linear:
        """The map that makes displacements (M, p), in deviations, alike in all directions, of reach 1; None: round."""
        width, device = len(self.std), self.std.device
        root = torch.eye(width, dtype=torch.float64, device=device)
        if shift is not None:
            covariance = shift.mT @ shift / len(shift)
            if not float(covariance.trace()) > _LEAST**2:
                raise InputError(
                    f"images within {self._threat} must move the features; found displacements of "
                    f"{float(covariance.trace()) ** 0.5:.2g} deviations. Are the backbone's gradients zero? {_ROUND}"
                )
            covariance += _SHRINK * covariance.trace() / width * root
            values, vectors = torch.linalg.eigh(covariance)
            root = vectors @ torch.diag(values.rsqrt()) @ vectors.mT
        directions, moved = self.moved(root)
        reach = float((directions * (moved @ root)).sum(1).mean())
        if not reach > _LEAST:
            raise InputError(
                f"images that ascend a feature must raise it; found a mean change of {reach:.2g}. {_ROUND}"
            )
        weight = root / (reach * self.std)
        linear = nn.Linear(width, width, device=device)
        linear.weight.data.copy_(weight)
        linear.bias.data.copy_(-weight @ self.mean)
        return linear.requires_grad_(False)


def _ascended(backbone: nn.Module, images: Tensor, directions: Tensor, threat: ThreatModel, batch: int) -> Tensor:
    """Images (N, ...) that ascend directions (N, p) of the features."""
    found, device = [], _device(backbone, images)
    for part, along in zip(images.split(batch), directions.split(batch), strict=True):
        x, along = part.to(device), along.to(device)

        def progress(features: Tensor, along: Tensor = along) -> Tensor:
            return (features.flatten(1) * along.to(features.dtype)).sum()

        try:
            moved = maximise(backbone, x, threat, progress, start=x, steps=_DIRECTED_STEPS, step_size=threat.eps / 2)
        except RuntimeError as problem:
            if "does not require grad" not in str(problem):
                raise
            raise InputError(
                f"the backbone must be differentiable in its images; torch found no graph. {_ROUND}"
            ) from None
        found.append(moved.to(images.device))
    return torch.cat(found)


def _device(model: nn.Module, images: Tensor) -> torch.device:
    return next((p.device for p in model.parameters()), images.device)
