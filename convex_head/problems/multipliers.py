"""Smoothing of a margin loss that is centred on multipliers: the method of multipliers.

A loss of problems/losses.py is a maximum over slopes s of a set S. Its smoothing of width mu takes mu/2 |s|^2 off, and
that keeps a gap open which only a narrower width closes; narrow widths make a hard problem. Taking mu/2 |s - c|^2 off
instead, with c the slopes of the last minimum, leaves a gap that vanishes as c settles, at any width (but for what blur
adds, adversary/trust_region.py):

    max_s <s, 1 - w> - mu/2 |s - c|^2  =  max_s <s, 1 - (w - mu c)> - mu/2 |s|^2  -  mu/2 |c|^2

so all that changes are margins, lowered by mu c, and a constant. For losses that are a sum over margins of weight q
each, s and c stand for slopes over q.

Source: R. T. Rockafellar, Augmented Lagrangians and applications of the proximal point algorithm, Math. of OR 1 (1976).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_head.shards import Whole

# Problems with more margins than this are smoothed without a centre, which takes a number for each.
_MOST = 1 << 24
_SAME = 1e-4


@dataclass(frozen=True)
class Multipliers:
    """Where a solve ended on its dual side, so that another one on the same examples can go on from there.

    Attributes:
        slopes: (n, K) of the margins of the examples held here, in the order of the problem, in [0, 1].
        width: of the smoothing that they belong to.
        data: digest of these examples in this order.
    """

    slopes: Tensor
    width: float
    data: tuple[float, float]

    def belong(self, shape: tuple[int, int], data: tuple[float, float]) -> bool:
        """Whether they are multipliers of margins of this shape, on data with this digest up to single precision."""
        return tuple(self.slopes.shape) == shape and all(
            math.isclose(own, other, rel_tol=_SAME, abs_tol=_SAME) for own, other in zip(self.data, data, strict=True)
        )


def fits(examples: int, margins: int) -> bool:
    """Whether so many multipliers are held."""
    return examples * margins <= _MOST


def lowered(margins: Tensor, centre: Tensor | None, rows: slice, mu: float) -> Tensor:
    """Margins (rows, K) less mu c."""
    return margins if centre is None else margins - mu * centre[rows]


def constant(centre: Tensor | None, share: float, mu: float) -> float:
    """Sum over the examples of what the centre takes off: q mu/2 |c|^2."""
    return 0.0 if centre is None else 0.5 * share * mu * float(centre.square().sum(dtype=torch.float64))


def reach(centre: Tensor | None, mu: float) -> float:
    """How much further above others a margin can lie and have a slope, because it may be lowered."""
    return 0.0 if centre is None else mu


def gathered(slopes: Tensor, order: Tensor, shard: Whole, examples: int) -> Tensor:
    """Multipliers (examples, K) in the given order from those of every process's own rows."""
    found = slopes.new_zeros(examples, slopes.shape[1])
    found[shard.first + order] = slopes
    shard.sum(found)
    return found
