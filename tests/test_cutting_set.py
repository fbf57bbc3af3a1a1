"""Cutting sets against the LMI SDP's reference numbers and against the SDP itself."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_iris

from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers.cutting_set import CuttingSet
from convex_head.solvers.result import Status
from convex_head.solvers.sdp import SDP


def breast_cancer(n: int, d: int, **kwargs: object) -> PolynomialProblem:
    """Permuted, standardised with the first 200 rows; the first n rows and d columns."""
    features, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(569)
    features, labels = features[order], labels[order]
    features = (features - features[:200].mean(0)) / features[:200].std(0)
    x, y = torch.from_numpy(features[:n, :d].copy()), torch.from_numpy(labels[:n].copy())
    return PolynomialProblem(x, y, num_classes=2, **kwargs)  # type: ignore[arg-type]


def iris(loss: str) -> PolynomialProblem:
    features, labels = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(150)[:24]
    features = ((features - features.mean(0)) / features.std(0))[order]
    x, y = torch.from_numpy(features), torch.from_numpy(labels[order])
    return PolynomialProblem(x, y, num_classes=3, radius=0.3, reg=0.02, loss=loss)


@pytest.mark.parametrize(("n", "d", "optimum"), [(40, 5, 0.321142), (100, 9, 0.354804)])
def test_reference_optimum(n: int, d: int, optimum: float) -> None:
    result = CuttingSet().solve(breast_cancer(n, d, radius=0.5, reg=0.02), tol=1e-4)
    assert result.status is Status.CONVERGED
    assert result.primal == pytest.approx(optimum, rel=1e-4)
    assert result.dual <= optimum + 1e-6 <= result.primal + 2e-6
    assert result.extra["points"] > n


@pytest.mark.parametrize("loss", ["crammer_singer", "multi_margin", "one_vs_rest"])
def test_three_classes_equal_the_semidefinite_program(loss: str) -> None:
    problem = iris(loss)
    cut = CuttingSet().solve(problem, tol=1e-3)
    lmi = SDP("CLARABEL").solve(problem, tol=1e-4)
    assert cut.status is Status.CONVERGED
    assert cut.primal == pytest.approx(lmi.primal, rel=1e-3)
    assert cut.dual <= lmi.primal


def test_bounds_hold_in_every_iteration_and_the_dual_rises() -> None:
    result = CuttingSet().solve(breast_cancer(40, 5, radius=0.5, reg=0.02), tol=1e-3)
    duals = [line.dual for line in result.history]
    assert duals == sorted(duals)
    assert all(line.dual <= 0.321143 and line.primal >= 0.321140 for line in result.history)


def test_radius_zero_needs_one_master() -> None:
    result = CuttingSet().solve(breast_cancer(40, 5, radius=0.0, reg=0.02), tol=1e-4)
    assert result.status is Status.CONVERGED
    assert result.iterations == 2  # the zero network, then the only master
    assert result.extra["points"] == 40


def test_warm_start_needs_fewer_masters() -> None:
    problem = breast_cancer(40, 5, radius=0.5, reg=0.02)
    cold = CuttingSet().solve(problem, tol=1e-3)
    nearby = breast_cancer(40, 5, radius=0.52, reg=0.02)
    warm = CuttingSet().solve(nearby, tol=1e-3, start=cold.network)
    assert warm.status is Status.CONVERGED
    assert warm.iterations < CuttingSet().solve(nearby, tol=1e-3).iterations


def test_iteration_and_time_limits_keep_an_honest_gap() -> None:
    problem = breast_cancer(40, 5, radius=0.5, reg=0.02)
    with pytest.warns(UserWarning, match="cutting_set: max_iter"):
        result = CuttingSet(max_iterations=3).solve(problem, tol=1e-4)
    assert result.status is Status.MAX_ITER
    assert result.gap > 1e-4
    assert result.dual <= 0.321143 <= result.primal + 2e-6
    with pytest.warns(UserWarning, match="cutting_set: max_time"):
        result = CuttingSet().solve(problem, tol=1e-4, max_seconds=1e-6)
    assert result.status is Status.MAX_TIME
    assert result.primal == pytest.approx(1.0)
