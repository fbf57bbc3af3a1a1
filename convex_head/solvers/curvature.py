"""Correction pairs of L-BFGS that outlive a change of the neurons.

From one outer iteration to the next the function that L-BFGS minimises changes little: the smoothing narrows, a few
neurons come and go, a sample of the data grows. So its correction pairs are kept, a row a neuron; the rows of dropped
neurons go, new neurons have rows of zeros.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork
from convex_head.problems.base import Network
from convex_head.solvers.lbfgs import MEMORY, Pair

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

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {"steps": torch.stack(self.steps), "changes": torch.stack(self.changes)} if self.steps else {}

    def packed(self, packed: PackedNetwork, network: Network) -> deque[Pair]:
        """The pairs in the layout of a packed network."""
        pairs: deque[Pair] = deque(maxlen=MEMORY)
        if not self.steps:
            return pairs
        order = torch.argsort(network.function, stable=True)
        place = torch.empty_like(order)
        counts = torch.bincount(network.function, minlength=len(packed.signs))
        first = (counts.cumsum(0) - counts)[network.function[order]]
        place[order] = torch.arange(len(order), device=order.device) - first
        for step, change in zip(self.steps, self.changes, strict=True):
            wide = [torch.zeros_like(packed.vectors) for _ in range(2)]
            for tensor, rows in zip(wide, (step, change), strict=True):
                tensor[network.function, place] = rows.to(tensor.dtype)
            product = float((wide[0] * wide[1]).sum())
            if product > 1e-12 * float(wide[0].norm() * wide[1].norm()):
                pairs.append((wide[0], wide[1], product))
        return pairs

    def store(self, pairs: deque[Pair], alive: Tensor, keep: Tensor) -> None:
        """Take pairs over: rows of the slots ``alive`` (F, m), of which ``keep`` stay in the network."""
        self.steps, self.changes = [], []
        if 2 * MEMORY * int(keep.sum()) * pairs_width(pairs) > _LIMIT:
            return
        for step, change, _ in pairs:
            self.steps.append(step[alive][keep])
            self.changes.append(change[alive][keep])

    def grow(self, count: int) -> None:
        """Rows of zeros for ``count`` neurons added at the end."""
        for held in (self.steps, self.changes):
            for i, rows in enumerate(held):
                held[i] = torch.cat([rows, rows.new_zeros(count, rows.shape[1])])


def pairs_width(pairs: deque[Pair]) -> int:
    """d of the pairs, 0 without any."""
    return pairs[0][0].shape[-1] if pairs else 0
