"""Rows from memory and from a file are the same rows; a problem on them is the same problem."""

from pathlib import Path

import numpy as np
import pytest
import torch

from convex_head import ConvexRobustHead
from convex_head.adversary import margins
from convex_head.errors import SettingError
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.rows import Rows
from convex_head.validation import check_features


def data(n: int = 60, d: int = 6, classes: int = 3) -> tuple[np.ndarray, torch.Tensor]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, n)
    x = rng.normal(size=(n, d)) + 1.5 * np.eye(classes, d)[y]
    return x.astype(np.float32), torch.as_tensor(y)


def mapped(tmp_path: Path, x: np.ndarray) -> np.memmap:
    np.save(tmp_path / "x.npy", x)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("chunk", [7, 64])
def test_streamed_rows_are_the_rows_in_the_order_of_the_file(tmp_path: Path, chunk: int, whitened: bool) -> None:
    x, y = data()
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(2)).double() if whitened else None
    units = {"mean": torch.full((6,), 0.5), "scale": torch.full((6,), 2.0), "whitening": matrix}
    streamed = Rows(mapped(tmp_path, x), y, **units, chunk_rows=chunk, stream=True)
    expected = (torch.as_tensor(x).double() - 0.5) / 2
    expected = expected if matrix is None else expected @ matrix
    torch.testing.assert_close(streamed.all(), expected)
    held = Rows(torch.as_tensor(x), y, **units, chunk_rows=chunk)
    assert streamed.sample(20, 3).digest() == pytest.approx(held.sample(20, 3).digest(), rel=1e-9)
    torch.testing.assert_close(streamed.sample(20, 3).all(), held.sample(20, 3).all())
    torch.testing.assert_close(held.all(), expected[held.order])
    assert (held.labels.diff() >= 0).all()
    for rows in (streamed, held):
        for part in rows:
            assert len(part.x) == len(part.labels) <= chunk
            torch.testing.assert_close(part.labels, y[rows.order[part.rows]])


def test_samples_of_shards_make_up_the_sample_of_the_whole(tmp_path: Path) -> None:
    x, y = data()
    whole = Rows(mapped(tmp_path, x), y, stream=True).sample(20, 3)
    parts = [Rows(torch.as_tensor(x[a:b]), y[a:b]).sample(20, 3, a, 60) for a, b in ((0, 25), (25, 60))]
    assert whole.n == 20 and sum(part.n for part in parts) == 20
    both = torch.cat([part.all() for part in parts])
    torch.testing.assert_close(both.sort(0).values, whole.all().sort(0).values)


def test_a_head_fitted_from_disk_is_the_head_fitted_in_memory(tmp_path: Path) -> None:
    x, y = data()
    disk = ConvexRobustHead(6, 3, reg=0.02).fit(mapped(tmp_path, x), y, tol=1e-3)
    memory = ConvexRobustHead(6, 3, reg=0.02).fit(x, y, tol=1e-3)
    assert disk.result_.converged
    assert disk.result_.primal == pytest.approx(memory.result_.primal, rel=1e-3)
    assert disk.result_.primal >= memory.result_.dual and memory.result_.primal >= disk.result_.dual
    torch.testing.assert_close(disk.mean, memory.mean)


def test_only_the_polynomial_streams(tmp_path: Path) -> None:
    x, y = data()
    with pytest.raises(SettingError, match=r"activation='polynomial'; found 'relu'"):
        ConvexRobustHead(6, 3, activation="relu").fit(mapped(tmp_path, x), y)


def test_a_fault_in_a_late_chunk_of_a_file_is_found(tmp_path: Path) -> None:
    x, _ = data(n=70_000, d=2)
    x[69_999, 1] = np.nan
    with pytest.raises(Exception, match="first in row 69999"):
        check_features(mapped(tmp_path, x))


@pytest.mark.parametrize("loss", ["crammer_singer", "one_vs_rest"])
def test_factors_made_on_demand_are_the_same(monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    x, y = data(classes=4)
    found = []
    for limit in (10_000, 0):
        monkeypatch.setattr(margins, "_EAGER_FORMS", limit)
        problem = PolynomialProblem(torch.as_tensor(x), y, num_classes=4, radius=0.6, reg=0.02, loss=loss)
        packed = problem.pack(problem.random_network(3, 0))
        value = problem.evaluate(packed, 0.1, problem.blur(0.1))
        report = problem.dual_point(packed, 0.1, problem.blur(0.1))
        dual = report.point
        found.append((value.smoothed, value.hard, value.gradient, report.primal, dual.mass, dual.moments))
    for eager, lazy in zip(*found, strict=True):
        torch.testing.assert_close(torch.as_tensor(lazy), torch.as_tensor(eager))
