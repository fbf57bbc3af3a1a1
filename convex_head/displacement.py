"""The ellipsoid that features reach under a pixel threat: a whitening matrix behind which it is about a ball.

With z the standardised features of an image x, a direction v drawn at random for every image, and images x' one step
of the threat's length along the gradient of v'z,

    S = E[d d'] + shrink tr(S)/p I,   d = z(x') - z(x),     z W,   W = s S^(-1/2)

where s makes the reach 1: the mean of w'W'd over unit vectors w drawn at random, for x' that ascend w'W'z in three
steps. S has as many numbers as features squared, so it takes directions in proportion to their number. Behind W
displacements have the same covariance in all directions, and a ball of radius 1 goes as far as the threat moves
features in a direction that it aims at, on average: single directions differ, by a factor of two on trained networks,
where they differ by far more without W. In front of it the ball is an ellipsoid, longer where images move the features
more. Directions are drawn at random because they have to be those of a head that does not exist yet: what attacks on
the network's own head move says little about where another head could be attacked. Neither labels nor a head are
needed. The matrix is part of the head (``ConvexRobustHead(whitening=...)``), whose certificates stay exact.

Attacks on a head that was *fitted in this ellipsoid* are another matter: the next head, fitted nearly where it was,
will be attacked much as it is. Their displacements a, with a weight w of a tenth,

    S = (1 - w) E[d d'] + w E[a a']

make the ellipsoid longer where such a head can be attacked, and keep the proportions of the rest. With a larger weight
S forgets where a head could go that avoids these attacks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convex_head.baselines.pgd import maximise
from convex_head.errors import InputError
from convex_head.features import extract_features
from convex_head.shards import Whole
from convex_head.standardisation import mean_and_scale
from convex_head.threat import ThreatModel

_SHRINK = 0.1
# Directions, each with an image, for S: so many, and for every feature. One step of eps along each: more steps, or
# directions drawn behind W, gave heads that were no better, fewer draws worse ones.
_LEAST_DRAWS, _DRAWS_OF_A_FEATURE = 2000, 16
# Directions behind W for the reach, and steps of eps/2 along each.
_REACH_DRAWS, _REACH_STEPS = 1000, 3
# Weight of attacked displacements in S: a fifth was as good or worse, two fifths were worse than none at radius 2.
_ATTACKED = 0.1
# A reach below this is rounding.
_LEAST = 1e-6
_ROWS = 4096
_ROUND = "standardise='scale' takes the round ball, which needs no gradients."


def attacked_images(
    model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, batch: int = 256, *, steps: int = 10
) -> Tensor:
    """Images (n, ...) after ascent on max_{k != y} f_k - f_y of ``model``; steps of eps/4, fewer than four of eps/2."""
    found, device = [], _device(model, images)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    size = threat.eps / (4 if steps >= 4 else min(steps, 2))
    for part, y in zip(images.split(batch), labels.to(device).split(batch), strict=True):
        x = part.to(device, dtype)

        def margin(logits: Tensor, y: Tensor = y) -> Tensor:
            own = logits.gather(1, y[:, None])
            return (logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True) - own).sum()

        moved = maximise(model, x, threat, margin, start=x, steps=steps, step_size=size)
        found.append(moved.to(part))
    return torch.cat(found)


def whitening(
    backbone: nn.Module,
    images: Tensor,
    features: Tensor,
    threat: ThreatModel,
    *,
    seed: int = 0,
    batch: int = 256,
    standardize: bool = True,
) -> Tensor:
    """The matrix W of the module's docstring, (p, p), float64: for heads on these features.

    Args:
        backbone: images to features, flattened to (n, p).
        images: (n, ...); 16 of them are moved for every feature, at least 2,000, some of them several times.
        features: (n, p), those of the images.
        threat: Linf or L2, in pixels.
        seed: of the images and directions.
        batch: images in one pass.
        standardize: the head scales features to deviation 1 first, as is its default.

    Raises:
        InputError: the threat moves no feature or is another one, or the backbone has no gradients.
    """
    sample = MovedImages(backbone, images, features, threat, seed=seed, batch=batch, standardize=standardize)
    return sample.whitening(sample.ascended()[1])


class MovedImages:
    """Images that a threat moves, and the matrix that follows from displacements of their features.

    Args:
        backbone, images, features, threat, seed, batch, standardize: as in :func:`whitening`.

    Attributes:
        rows: (N,) the images that are moved; where they are too few, several times each.
        mean, scale: (p,) of all features, as a head has them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        images: Tensor,
        features: Tensor,
        threat: ThreatModel,
        *,
        seed: int = 0,
        batch: int = 256,
        standardize: bool = True,
    ):
        if threat.norm not in ("Linf", "L2"):
            raise InputError(f"the threat must be Linf or L2; found {threat.norm}. {_ROUND}")
        self._backbone, self._threat, self._batch = backbone, threat, batch
        self._images, self._all = images, features
        self._generator = torch.Generator().manual_seed(seed)
        draws, n = max(_LEAST_DRAWS, _DRAWS_OF_A_FEATURE * features.shape[1]), len(images)
        shuffled = [torch.randperm(n, generator=self._generator) for _ in range(-(-draws // n))]
        self.rows = torch.cat(shuffled)[:draws]
        self.mean, self.scale = mean_and_scale(features, torch.float64, Whole(), none=not standardize)

    @property
    def images(self) -> Tensor:
        """(N, ...) those that are moved."""
        return self._images[self.rows.to(self._images.device)]

    def shift(self, images: Tensor, rows: Tensor | None = None) -> Tensor:
        """Displacements (N, p), standardised, of the features after the images at ``rows`` were moved to these."""
        moved = extract_features(self._backbone, images, batch_size=self._batch).to(self.scale.device)
        clean = self._all[(self.rows if rows is None else rows).to(self._all.device)]
        return (moved.double() - clean.double().to(moved.device)) / self.scale

    def ascended(
        self, matrix: Tensor | None = None, *, steps: int = 1, draws: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images that ascend random unit directions behind ``matrix``, one each.

        Args:
            matrix: (p, p), None for the identity.
            steps: of the ascent; of eps where it is one, else of eps/2.
            draws: how many of the images; None for all.

        Returns:
            How far each moved its features along its direction (N,), and displacements (N, p), standardised.
        """
        along, shifts, width = [], [], len(self.scale)
        for block in self.rows[:draws].split(_ROWS):
            # Drawn without regard to the batch, which is of speed and memory alone.
            drawn = torch.randn(len(block), width, generator=self._generator, dtype=torch.float64)
            for rows, directions in zip(block.split(self._batch), drawn.split(self._batch), strict=True):
                directions = (directions / directions.norm(dim=1, keepdim=True)).to(self.scale.device)
                behind = directions if matrix is None else directions @ matrix.mT
                shift = self.shift(self._moved(rows, behind / self.scale, steps), rows)
                along.append((behind * shift).sum(1))
                shifts.append(shift.to(self._all.dtype))
        return torch.cat(along), torch.cat(shifts)

    def _moved(self, rows: Tensor, directions: Tensor, steps: int) -> Tensor:
        """Images at these rows that ascend directions (B, p) of the features."""
        backbone, threat = self._backbone, self._threat
        images = self._images[rows.to(self._images.device)]
        dtype = next((p.dtype for p in backbone.parameters() if p.is_floating_point()), images.dtype)
        x = images.to(_device(backbone, images), dtype)
        along = directions.to(x)

        def progress(features: Tensor) -> Tensor:
            return (features.flatten(1) * along).sum()

        size = threat.eps / min(steps, 2)
        try:
            moved = maximise(backbone, x, threat, progress, start=x, steps=steps, step_size=size)
        except RuntimeError as problem:
            if "does not require grad" not in str(problem):
                raise
            raise InputError(f"the backbone must be differentiable in its images; it is not. {_ROUND}") from None
        return moved.to(images)

    def whitening(self, shift: Tensor | None, attacked: Sequence[Tensor] = ()) -> Tensor:
        """W (p, p) of reach 1 that gives displacements one covariance; every call draws directions for its reach.

        Args:
            shift: (M, p) displacements d of the module's docstring, standardised; None makes W a multiple of I.
            attacked: displacements a (N, p) of attacks on heads, equally many of each in E[a a']; none for w = 0.
        """
        width, device = len(self.scale), self.scale.device
        root = torch.eye(width, dtype=torch.float64, device=device)
        if shift is not None:
            covariance = _second_moment(shift)
            if attacked:
                found = sum(map(_second_moment, attacked[1:]), _second_moment(attacked[0])) / len(attacked)
                covariance = (1 - _ATTACKED) * covariance + _ATTACKED * found
            if not float(covariance.trace()) > _LEAST**2:
                raise InputError(
                    f"images within {self._threat} must move the features; found displacements of "
                    f"{float(covariance.trace()) ** 0.5:.2g} deviations. Are the backbone's gradients zero? {_ROUND}"
                )
            values, vectors = torch.linalg.eigh(covariance + _SHRINK * covariance.trace() / width * root)
            root = (vectors * values.rsqrt()) @ vectors.mT
        reach = float(self.ascended(root, steps=_REACH_STEPS, draws=_REACH_DRAWS)[0].mean())
        if not reach > _LEAST:
            raise InputError(f"images that ascend a feature must raise it; found a change of {reach:.2g}. {_ROUND}")
        return root / reach


def _second_moment(shift: Tensor) -> Tensor:
    """E[d d'] of displacements (M, p), float64."""
    moment = torch.zeros(shift.shape[1], shift.shape[1], dtype=torch.float64, device=shift.device)
    for part in shift.split(_ROWS):
        moment += part.double().mT @ part.double() / len(shift)
    return moment


def _device(model: nn.Module, images: Tensor) -> torch.device:
    return next((p.device for p in model.parameters()), images.device)
