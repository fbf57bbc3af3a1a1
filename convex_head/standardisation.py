"""Mean and scale of features, from memory, from a file, or over several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convex_head.errors import FeatureRangeError
from convex_head.rows import give_back
from convex_head.shards import Whole

_ROWS = 65536


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
