"""Repairs of several processes, which two threads stand for: the same slopes are free, and the bounds are the same."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from repair_cases import near_an_optimum, of_a_random_network
from torch import Tensor

from convex_head.problems import dual_rows, repair
from convex_head.problems.losses import get_loss
from convex_head.shards import Whole


class _Half(Whole):
    """One of two threads that stand for processes."""

    size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, held: dict[int, Any]):
        self.rank, self._barrier, self._held = rank, barrier, held

    def _all(self, value: Any) -> list[Any]:
        self._held[self.rank] = value
        self._barrier.wait(timeout=60)
        values = [self._held[rank] for rank in range(self.size)]
        self._barrier.wait(timeout=60)
        return values

    def sum(self, *tensors: Tensor) -> None:
        parts = self._all([tensor.clone() for tensor in tensors])
        for i, tensor in enumerate(tensors):
            tensor.copy_(parts[0][i] + parts[1][i])

    def max(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self._all(tensor.clone())).amax(0))

    def first_of(self, value: Any) -> Any:
        return self._all(value)[0]


@pytest.mark.parametrize(("free", "cut"), [(500, 30), (20, 30), (7, 30), (7, 2)])
@pytest.mark.parametrize("joint", [True, False])
def test_two_processes_free_the_slopes_that_one_does(
    monkeypatch: pytest.MonkeyPatch, free: int, cut: int, joint: bool
) -> None:
    """Rows of 40 examples, one to four each, in two parts; no part of an example is free."""
    monkeypatch.setattr(repair, "_FREE", free)
    generator = torch.Generator().manual_seed(0)
    example = torch.arange(40).repeat_interleave(torch.arange(40) % 4 + 1)
    count = len(example)
    functions = torch.stack([torch.arange(count) % 3, (torch.arange(count) + 1) % 3], dim=1)
    slope = torch.rand(count, generator=generator, dtype=torch.float64) / 40
    points = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    rows = dual_rows.DualRows(points, example, functions, torch.ones(count).double(), slope)
    number = torch.randperm(40, generator=generator)

    def chosen(part: dual_rows.DualRows, number: Tensor, shard: Whole) -> tuple[Any, Any, Any]:
        found, is_free = repair._gathered(part, repair._order(part, number, 1 / 40), joint, shard)
        setting = repair._Setting(3, joint, 1 / 40, (0.09, 0.5, 0.47), 0.02, shard)
        return found, is_free, setting.point(part.some(~is_free))

    alone = chosen(rows, number, Whole())
    assert int(alone[1].sum()) == len(alone[0].slope) <= free and (free < 20 or len(alone[0].slope) > 10)
    for e in range(40):
        assert len(set(alone[1][example == e].tolist())) == 1
    groups = torch.bincount(alone[0].group)
    if joint:
        sizes = torch.bincount(example)[torch.unique(example[alone[1]])]
        assert sorted(groups.tolist()) == sorted(sizes.tolist())
    else:
        assert groups.tolist() == [1] * len(alone[0].slope)
    parts = [rows.example < cut, rows.example >= cut]
    barrier, held = threading.Barrier(2), {}  # type: ignore[var-annotated]
    with ThreadPoolExecutor(2) as pool:
        jobs = []
        for rank, (part, first) in enumerate(zip(parts, (0, cut), strict=True)):
            some = dual_rows.DualRows(
                points[part], example[part] - first, functions[part], rows.sign[part], slope[part]
            )
            own = number[:cut] if rank == 0 else number[cut:]
            jobs.append(pool.submit(chosen, some, own, _Half(rank, barrier, held)))
        found = [job.result() for job in jobs]
    for rank in range(2):
        torch.testing.assert_close(found[rank][0].points, alone[0].points)
        torch.testing.assert_close(found[rank][0].slope, alone[0].slope)
        assert torch.equal(found[rank][1], alone[1][parts[rank]])
        torch.testing.assert_close(found[rank][2].moments, alone[2].moments)
        torch.testing.assert_close(found[rank][2].mass, alone[2].mass)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("loss", ["crammer_singer", "multi_margin"])
def test_two_processes_repair_as_one_does(monkeypatch: pytest.MonkeyPatch, loss: str, far: bool) -> None:
    """Least squares over both parts, then the slopes of some examples of both by the interior-point method."""
    monkeypatch.setattr(repair, "_FREE", 12)
    _, packed, report, answer = (of_a_random_network if far else near_an_optimum)(loss)
    rows = report.rows
    assert rows is not None
    settings: dict[str, Any] = {"loss": get_loss(loss), "num_classes": 3, "coefficients": (0.09, 0.5, 0.47)}
    settings |= {"reg": 0.02, "n": 24, "primal": (10 if far else 1) * report.primal, "tol": 1e-4, "late": False}
    alone = repair.repaired(rows, packed, answer, number=torch.arange(24), shard=Whole(), **settings)
    assert alone.dual > answer.dual
    barrier, held = threading.Barrier(2), {}  # type: ignore[var-annotated]
    with ThreadPoolExecutor(2) as pool:
        jobs = []
        for rank, (first, last) in enumerate(((0, 10), (10, 24))):
            part = rows.some((rows.example >= first) & (rows.example < last))
            part = dataclasses.replace(part, example=part.example - first)
            more = {"number": torch.arange(first, last), "shard": _Half(rank, barrier, held)}
            jobs.append(pool.submit(repair.repaired, part, packed, answer, **more, **settings))
        for job in jobs:
            assert job.result().dual == pytest.approx(alone.dual, rel=1e-6 if far else 1e-9)
