"""The units of a head: mean and scale of features, from memory, a file or several processes, and a whitening."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convex_head.errors import FeatureRangeError, SettingError
from convex_head.rows import give_back
from convex_head.shards import Whole

_ROWS = 65536


class Standardised(nn.Module):
    """A module on features x in units of its own: z = (x - mean) / scale, times ``whitening`` where there is one."""

    mean: Tensor
    scale: Tensor
    whitening: Tensor | None

    def _register_units(self, width: int, whitening: Tensor | None) -> None:
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("whitening", None if whitening is None else _checked(whitening, width))

    def in_units(self, differences: Tensor) -> Tensor:
        """Differences of features (n, d) in the module's units, in their dtype."""
        z = differences / self.scale.to(differences.dtype)
        return z if self.whitening is None else z @ self.whitening.to(z.dtype)

    def standardised(self, features: Tensor) -> Tensor:
        """Features (n, d) in the module's units, float64."""
        return self.in_units(features.double() - self.mean.double())

    def from_units(self, z: Tensor) -> Tensor:
        """Features (n, d) of z, float64."""
        if self.whitening is not None:
            z = torch.linalg.solve(self.whitening.double(), z, left=False)
        return self.mean.double() + self.scale.double() * z

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.whitening is None and prefix + "whitening" in state_dict:
            self.whitening = state_dict[prefix + "whitening"].to(self.mean)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _checked(whitening: Tensor, width: int) -> Tensor:
    if not isinstance(whitening, Tensor) or whitening.shape != (width, width):
        found = tuple(whitening.shape) if isinstance(whitening, Tensor) else type(whitening).__name__
        raise SettingError(f"whitening must be a tensor of shape ({width}, {width}); found {found}.")
    values = torch.linalg.svdvals(whitening.double())
    if not bool(values.isfinite().all()) or not bool(values[-1] > 1e-6 * values[0]):
        raise SettingError(
            f"whitening must be finite and invertible; found singular values from {float(values[-1]):.2g} to "
            f"{float(values[0]):.2g}. displacement.whitening makes one."
        )
    return whitening.detach().to(torch.get_default_dtype(), copy=True)


def mean_and_scale(
    x: Tensor, dtype: torch.dtype, shard: Whole, source: Any = None, none: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every column in ``dtype``; a constant column has scale 1.

    Args:
        x: (n, d) features held by this process.
        dtype: of the head.
        shard: the other processes' part.
        source: the mapped file behind x, whose pages are given back after each chunk.
        none: no standardisation: zeros and ones.

    Raises:
        FeatureRangeError: they overflow or vanish in ``dtype``.
    """
    if none:
        return x.new_zeros(x.shape[1], dtype=dtype), x.new_ones(x.shape[1], dtype=dtype)
    mean, deviation, size = _moments(x, shard, source)
    constant = deviation <= 1e-12 * size.clamp_min(1e-300)
    mean, scale = mean.to(dtype), torch.where(constant, 1.0, deviation).to(dtype)
    if not bool((mean.isfinite() & scale.isfinite() & (scale > 0)).all()):
        raise FeatureRangeError(
            f"the features' means and deviations must be finite and positive in the head's {dtype}; found features "
            f"of size {float(size.max()):.3g}. Rescale the features, or use head.double()."
        )
    return mean, scale


def _moments(x: Tensor, shard: Whole, source: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation (biased) and largest size of every column, (d,) float64, in two passes."""
    total = shard.total(x.shape[0])
    mean = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    size, square = torch.zeros_like(mean), torch.zeros_like(mean)
    for part in x.split(_ROWS):
        wide = part.double()
        mean += wide.sum(0)
        size = torch.maximum(size, wide.abs().amax(0))
        give_back(source)
    shard.sum(mean)
    shard.max(size)
    mean /= total
    for part in x.split(_ROWS):
        square += (part.double() - mean).square().sum(0)
        give_back(source)
    shard.sum(square)
    return mean, (square / total).sqrt(), size
