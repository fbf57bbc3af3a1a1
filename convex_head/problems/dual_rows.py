"""Worst cases of margins with a slope, held in memory: what a dual point is made of.

A dual point (problems/dual.py) is a sum over them; where they fit in memory, problems/repair.py changes their slopes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from convex_head.shards import Whole

# Numbers of all points, each once a function that it counts for; a point counts as so many numbers at least, because
# problems/stationary_slopes.py holds one for every neuron of a function.
_LIMIT, _LEAST = 1 << 26, 64


@dataclass(frozen=True)
class DualRows:
    """The margins with a slope, one a row.

    Attributes:
        points: (N, d) worst-case points.
        example: (N,) which of the examples held here.
        functions: (N, 2) p and q of the form f_p - f_q.
        sign: (N,) of the form in the margin.
        slope: (N,) s_i / n.
    """

    points: Tensor
    example: Tensor
    functions: Tensor
    sign: Tensor
    slope: Tensor

    def some(self, which: Tensor) -> DualRows:
        """Those of a mask (N,)."""
        return DualRows(*(getattr(self, field.name)[which] for field in fields(self)))

    def at(self, slope: Tensor) -> DualRows:
        """The same with other slopes (N,), without margins whose slope is then not positive."""
        return replace(self, slope=slope.to(self.slope.dtype)).some(slope > 0)


class RowCollector:
    """Gathers :class:`DualRows` in a pass, as long as they can be held."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, ...]] = []
        self._numbers = 0

    def add(self, points: Tensor, example: Tensor, functions: Tensor, sign: Tensor, slope: Tensor) -> None:
        """Rows of :class:`DualRows`."""
        self._numbers += len(points) * max(_LEAST, points.shape[1]) * functions.shape[1]
        if self._numbers > _LIMIT:
            self._parts = []
            return
        self._parts.append((points, example, functions, sign, slope))

    def rows(self, shard: Whole) -> DualRows | None:
        """All of them; None where they are none or too many in any process."""
        if shard.any(self._numbers == 0 or self._numbers > _LIMIT):
            return None
        return DualRows(*(torch.cat(parts) for parts in zip(*self._parts, strict=True)))


class RowLayout:
    """Rows once more for each function that they count for, those of a function together: lists of (L_f, ...)."""

    def __init__(self, rows: DualRows, functions: int):
        function = rows.functions.T.reshape(-1)
        order = torch.argsort(function, stable=True)
        self.row = order % len(rows.slope)
        self.sign = torch.cat([rows.sign, -rows.sign])[order]
        self._sizes = torch.bincount(function, minlength=functions).tolist()
        self.points = rows.points[self.row].split(self._sizes)
        self._count = len(rows.slope)

    def spread(self, values: Tensor) -> tuple[Tensor, ...]:
        """(N,) -> (L_f,) of every function, with the sign of the margin."""
        return (values[self.row] * self.sign).split(self._sizes)

    def collect(self, values: list[Tensor]) -> Tensor:
        """(L_f,) of every function -> (N,), the transpose of :meth:`spread`."""
        out = values[0].new_zeros(self._count)
        return out.index_add_(0, self.row, torch.cat(values) * self.sign)
