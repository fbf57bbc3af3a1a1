"""The preconditioner of the neurons: what it leaves out, its precision, and when a search takes a new one."""

from typing import Any

import pytest
import torch

from benchmarks.common import synthetic_features
from convex_head.problems import preconditioner
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers.column_generation import ColumnGeneration

MU = 0.1


def problem(dtype: torch.dtype = torch.float64) -> PolynomialProblem:
    x, y = synthetic_features(400, 24, 4, seed=0)
    x = (x - x.mean(0)) / x.std(0)
    return PolynomialProblem(x.double(), y, num_classes=4, radius=0.5, reg=0.05, dtype=dtype)


def gradient(of: PolynomialProblem) -> tuple[Any, torch.Tensor]:
    packed = of.pack(ColumnGeneration().solve(problem(), tol=0.05).network)
    generator = torch.Generator().manual_seed(0)
    return packed, torch.randn(packed.vectors.shape, generator=generator, dtype=torch.float64)


def test_curvature_that_does_not_show_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    convex = problem()
    packed, g = gradient(convex)
    metric = convex.metric(packed, MU)
    monkeypatch.setattr(preconditioner, "_FELT", 0.0)
    whole = convex.metric(packed, MU)
    # The inverse of no eigenvalue changes by more than a tenth, and some do change.
    difference = float((metric(g) - whole(g)).norm() / whole(g).norm())
    assert 0 < difference <= 0.1
    # 2 reg I is the largest inverse, and the operator is symmetric and positive.
    h = torch.randn_like(g)
    assert float((h * whole(g)).sum()) == pytest.approx(float((g * whole(h)).sum()), rel=1e-9)
    assert 0 < float((g * metric(g)).sum()) < float(g.square().sum()) / (2 * convex.reg)


def test_single_precision_serves() -> None:
    single = problem(torch.float32)
    packed, g = gradient(single)
    found = single.metric(packed, MU)(g)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, problem().metric(packed, MU)(g), rtol=1e-3, atol=1e-3 * float(found.abs().max()))


def test_steep_curvature_is_inverted_in_double_precision() -> None:
    """An inverse a millionth of the largest is rounding in single precision, of either sign."""
    x, y = synthetic_features(400, 24, 4, seed=0)
    of = PolynomialProblem(x.double(), y, num_classes=4, radius=0.5, reg=1e-7, dtype=torch.float32)
    packed = of.pack(of.random_network(4, 0))
    metric = of.metric(packed, 0.03)
    unit = torch.eye(packed.vectors.numel(), dtype=torch.float64).view(-1, *packed.vectors.shape)
    whole = torch.stack([2 * of.reg * metric(row).reshape(-1) for row in unit])
    least, *_, largest = torch.linalg.eigvalsh(0.5 * (whole + whole.T)).tolist()
    assert 0 < least < 1e-6 < largest <= 1


def test_a_search_far_from_its_minimum_takes_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    convex, taken, metric = problem(), [], PolynomialProblem.metric
    passes: list[int] = []
    evaluate = PolynomialProblem.evaluate
    monkeypatch.setattr(
        PolynomialProblem, "metric", lambda *a: (taken.append((sum(passes), a[4] is None)), metric(*a))[1]
    )
    monkeypatch.setattr(PolynomialProblem, "evaluate", lambda *a: (passes.append(1), evaluate(*a))[1])
    assert ColumnGeneration().solve(convex, tol=1e-3).converged
    far, near = ([at for at, first in taken if first is is_far] for is_far in (True, False))
    assert far[:2] == [0, 15] and near
