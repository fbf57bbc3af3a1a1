"""Correction pairs of L-BFGS that outlive a change of the neurons.

From one outer iteration to the next the function that L-BFGS minimises changes little: the smoothing narrows, a few
neurons come and go, a sample of the data grows. So its correction pairs are kept, a row a neuron; the rows of dropped
neurons go, new neurons have rows of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork
from convex_head.problems.base import Network
from convex_head.solvers.lbfgs import MEMORY, Corrections

# Numbers held at most; where a network is larger, every search starts without memory.
_LIMIT = 1 << 27


class CurvatureMemory:
    """Correction pairs for a network of M neurons: ``steps`` and ``changes``, each a list of (M, d)."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.changes: list[Tensor] = []

    @staticmethod
    def of(tensors: dict[str, Tensor], network: Network) -> CurvatureMemory:
        """The memory that :meth:`tensors` described."""
        memory = CurvatureMemory()
        if "steps" in tensors:
            memory.steps = list(tensors["steps"].to(network.directions.device))
            memory.changes = list(tensors["changes"].to(network.directions.device))
        return memory

    @staticmethod
    def holds(neurons: int, d: int) -> bool:
        """Whether pairs of a network of this size are kept."""
        return 2 * MEMORY * neurons * d <= _LIMIT

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {"steps": torch.stack(self.steps), "changes": torch.stack(self.changes)} if self.steps else {}

    def packed(self, packed: PackedNetwork, network: Network, dtype: torch.dtype) -> Corrections:
        """The pairs in the layout of a packed network, in this dtype."""
        pairs = Corrections(dtype=dtype)
        if not self.steps:
            return pairs
        order = torch.argsort(network.function, stable=True)
        place = torch.empty_like(order)
        counts = torch.bincount(network.function, minlength=len(packed.signs))
        first = (counts.cumsum(0) - counts)[network.function[order]]
        place[order] = torch.arange(len(order), device=order.device) - first
        for step, change in zip(self.steps, self.changes, strict=True):
            wide = [torch.zeros_like(packed.vectors, dtype=dtype) for _ in range(2)]
            for tensor, rows in zip(wide, (step, change), strict=True):
                tensor[network.function, place] = rows.to(tensor.dtype)
            pairs.append(*wide)
        return pairs

    def store(self, pairs: Corrections, alive: Tensor, keep: Tensor) -> None:
        """Take pairs over: rows of the slots ``alive`` (F, m), of which ``keep`` stay in the network."""
        self.steps, self.changes = [], []
        for step, change in pairs:
            if not self.holds(int(keep.sum()), step.shape[-1]):
                return
            self.steps.append(step[alive][keep])
            self.changes.append(change[alive][keep])

    def grow(self, count: int) -> None:
        """Rows of zeros for ``count`` neurons added at the end."""
        for held in (self.steps, self.changes):
            for i, rows in enumerate(held):
                held[i] = torch.cat([rows, rows.new_zeros(count, rows.shape[1])])
