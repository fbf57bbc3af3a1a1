"""Rows of features for a pass over the data: chunk by chunk, from memory or from a file larger than memory.

A chunk is standardised in float64 and handed over in the dtype of the bulk computation. Rows held in memory are
standardised once and sorted by label, so that examples of a label lie together. Streamed rows stay where they are, in
the order of the file: a thread reads and standardises the next chunks while the present one is worked on, and the
pages that were read are given back, so that memory is set by the chunk and not by the data (but for labels, and for
multipliers, where they are few enough to be held: problems/multipliers.py).
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_AHEAD = 2
_SCATTERED = 64


@dataclass(frozen=True)
class Chunk:
    """Rows worked on together.

    Attributes:
        rows: their place in the order of :class:`Rows`.
        x: (B, d) standardised features.
        labels: (B,).
    """

    rows: slice
    x: Tensor
    labels: Tensor


class Rows:
    """(n, d) features and labels.

    Args:
        features: (n, d) tensor, or a numpy array or memmap; read as float64.
        labels: (n,) int64 on the device of the computation.
        mean, scale: (d,) standardisation (x - mean) / scale; None for none.
        whitening: (d, d) what standardised rows are multiplied by; None for nothing.
        dtype: dtype of the chunks.
        chunk_rows: rows of a chunk.
        stream: leave the features where they are and read them in every pass.
    """

    def __init__(
        self,
        features: Tensor | np.ndarray,
        labels: Tensor,
        *,
        mean: Tensor | None = None,
        scale: Tensor | None = None,
        whitening: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        chunk_rows: int = 8192,
        stream: bool = False,
    ):
        self.n, self.d = int(features.shape[0]), int(features.shape[1])
        self.dtype, self.device, self.chunk_rows, self.stream = dtype, labels.device, chunk_rows, stream
        self._mean = None if mean is None else mean.to(self.device).double()
        self._scale = None if scale is None else scale.to(self.device).double()
        self._whitening = None if whitening is None else whitening.to(self.device).double()
        self._source: Tensor | np.ndarray = features
        self.order = torch.arange(self.n, device=self.device) if stream else torch.argsort(labels, stable=True)
        self.labels = labels[self.order]
        #: Of a sample: where its rows are among those it was drawn from, in its own order.
        self.drawn: Tensor | None = None
        self._digest: tuple[float, float] | None = None
        self._held: Tensor | None = None
        if not stream:
            held = torch.empty(self.n, self.d, dtype=dtype, device=self.device)
            for rows in self._slices():
                held[rows] = self._read(self.order[rows])
            self.digest()
            self._held = held
            self._source = held

    def _slices(self) -> list[slice]:
        return [slice(s, min(s + self.chunk_rows, self.n)) for s in range(0, self.n, self.chunk_rows)]

    def _read(self, index: Tensor | slice, dtype: torch.dtype | None = None) -> Tensor:
        """Standardised rows of the source, in a dtype or that of the chunks."""
        if isinstance(self._source, Tensor):
            raw = self._source[index]
        elif isinstance(index, slice):
            raw = torch.from_numpy(np.array(self._source[index]))
            give_back(self._source)
        else:
            # A page fault maps far more than a row, so scattered rows are read a few at a time.
            raw = torch.empty(len(index), self.d, dtype=torch.from_numpy(self._source[:0].copy()).dtype)
            for start in range(0, len(index), _SCATTERED):
                part = index[start : start + _SCATTERED]
                raw[start : start + len(part)] = torch.from_numpy(self._source[part.cpu().numpy()])
                give_back(self._source)
        wide = raw.to(self.device).double()
        if self._mean is not None and self._scale is not None:
            wide = (wide - self._mean) / self._scale
        if self._whitening is not None:
            wide = wide @ self._whitening
        return wide.to(dtype or self.dtype)

    def __iter__(self) -> Iterator[Chunk]:
        if self._held is not None:
            for rows in self._slices():
                yield Chunk(rows, self._held[rows], self.labels[rows])
            return
        slices = self._slices()
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting: deque[Future[Tensor]] = deque(pool.submit(self._read, rows) for rows in slices[:_AHEAD])
            for position, rows in enumerate(slices):
                x = waiting.popleft().result()
                if position + _AHEAD < len(slices):
                    waiting.append(pool.submit(self._read, slices[position + _AHEAD]))
                yield Chunk(rows, x, self.labels[rows])

    def all(self) -> Tensor:
        """(n, d) standardised features in the order of :attr:`order`, float64."""
        return torch.cat([chunk.x.double() for chunk in self])

    def digest(self) -> tuple[float, float]:
        """Two sums that change with the labels and with the features of some rows, whatever the dtype of the chunks."""
        if self._digest is not None:
            return self._digest
        weight = torch.cos(torch.arange(self.n, dtype=torch.float64, device=self.device))
        some = torch.arange(0, self.n, max(1, self.n // 1000), device=self.device)
        column = torch.cos(torch.arange(self.d, dtype=torch.float64, device=self.device))
        features = weight[some] @ (self._read(self.order[some], torch.float64) @ column)
        self._digest = float(weight @ self.labels.double()), float(features)
        return self._digest

    def sample(self, count: int, seed: int, first: int = 0, total: int | None = None) -> Rows:
        """``count`` rows drawn at random, in memory, of ``total`` rows of which these are number ``first`` onwards.

        Ranks that hold shards of the same data draw the same rows, each its own part. Only those held here come back.
        """
        total = self.n if total is None else total
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values
        mine = drawn[(drawn >= first) & (drawn < first + self.n)] - first
        place = mine.to(self.device)
        if self._held is not None:
            inverse = torch.empty_like(self.order)
            inverse[self.order] = torch.arange(self.n, device=self.device)
            place = inverse[place]
            x = self._held[place]
        else:
            x = self._read(place)
        found = Rows(x, self.labels[place], dtype=self.dtype, chunk_rows=self.chunk_rows)
        found.drawn = place[found.order]
        return found


def is_mapped(features: Any) -> bool:
    """The features are a file mapped into memory (numpy.memmap)."""
    return isinstance(features, np.memmap)


def give_back(array: Any) -> None:
    """Let the system take the pages of a mapped file back; others stay as they are."""
    mapped = getattr(array, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        with contextlib.suppress(OSError, ValueError):
            mapped.madvise(mmap.MADV_DONTNEED)
