"""Sums over processes: each holds a shard of the rows, and what a pass adds up is added up once more over all.

Every process sees the same bits afterwards, so all take the same decisions without a scheduler of our own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from convex_head.errors import ShardError


class Whole:
    """One process that holds all rows."""

    rank, size, first = 0, 1, 0

    def total(self, n: int) -> int:
        """Rows of all processes."""
        return n

    def holding(self, n: int) -> Whole:
        """The same processes where ``n`` rows are held here: some of those that were."""
        return self

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the processes."""

    def max(self, tensor: Tensor) -> None:
        """Replace the tensor by its largest value over the processes."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag

    def first_of(self, value: Any) -> Any:
        """The first process's value, in all."""
        return value


class Shard(Whole):
    """One of several processes of torch.distributed; each holds consecutive rows, in the order of the ranks.

    Args:
        n: rows held here.
        device: of the computation.

    Raises:
        ShardError: torch.distributed is not initialised.
    """

    def __init__(self, n: int, device: torch.device):
        if not dist.is_initialized():
            raise ShardError(
                "a shard needs torch.distributed; found it not initialised. Start with torchrun, or call "
                "torch.distributed.init_process_group first."
            )
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        counts = torch.zeros(self.size, dtype=torch.int64, device=device)
        counts[self.rank] = n
        self._reduce(counts)
        self._total = int(counts.sum())
        self.first = int(counts[: self.rank].sum())

    def total(self, n: int) -> int:
        """Rows of all processes."""
        return self._total

    def holding(self, n: int) -> Whole:
        """The same processes where ``n`` rows are held here: some of those that were. All must call it."""
        return Shard(n, self.device)

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the processes, added up in float64."""
        flat = torch.cat([t.reshape(-1).double() for t in tensors])
        self._reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def max(self, tensor: Tensor) -> None:
        """Replace the tensor by its largest value over the processes."""
        self._reduce(tensor, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        value = torch.tensor([float(flag)], device=self.device)
        self._reduce(value)
        return bool(value > 0)

    def first_of(self, value: Any) -> Any:
        """The first process's value, in all; anything that pickles."""
        values = [value]
        with self._together():
            dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        with self._together():
            dist.all_reduce(tensor, op=operation)

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as fault:
            reason = str(fault).strip().splitlines()[0]
            raise ShardError(
                f"every process must stay until the work ends; rank {self.rank} of {self.size} lost another one "
                f"({reason}). Start the same command again; with a checkpoint or state file it goes on from there."
            ) from fault


@contextmanager
def processes(device: str = "cpu") -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun started; yields (rank, number), (0, 1) where it did not."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield 0, 1
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield dist.get_rank(), size
    finally:
        dist.destroy_process_group()
