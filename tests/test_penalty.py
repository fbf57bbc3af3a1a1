"""The published penalty method: its penalties against the SDP's optimum, its report against exact values."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_iris

from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers.penalty import Iterate, Objective, Penalty
from convex_head.solvers.result import SolveResult, Status
from convex_head.solvers.sdp import build

LOSSES = ("crammer_singer", "multi_margin", "one_vs_rest")


def breast_cancer(n: int = 40, d: int = 5) -> PolynomialProblem:
    """Permuted, standardised with the first 200 rows; optimum 0.321142 for n = 40, d = 5."""
    features, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(569)
    features, labels = features[order], labels[order]
    features = (features - features[:200].mean(0)) / features[:200].std(0)
    x, y = torch.from_numpy(features[:n, :d].copy()), torch.from_numpy(labels[:n].copy())
    return PolynomialProblem(x, y, num_classes=2, radius=0.5, reg=0.02)


def iris(loss: str) -> PolynomialProblem:
    features, labels = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(150)[:20]
    features = ((features - features.mean(0)) / features.std(0))[order]
    x, y = torch.from_numpy(features), torch.from_numpy(labels[order])
    return PolynomialProblem(x, y, num_classes=3, radius=0.3, reg=0.02, loss=loss)


def solved(problem: PolynomialProblem) -> tuple[Iterate, float]:
    """The exact optimum of the SDP as an iterate of this method, and its value."""
    program, variables = build(
        problem.features.numpy(),
        problem.labels.numpy(),
        num_classes=problem.num_classes,
        radius=problem.radius,
        reg=problem.reg,
        loss=problem.loss,
    )
    program.solve(solver="CLARABEL", canon_backend="SCIPY")
    multipliers = next(variable for variable in program.variables() if variable.is_nonneg())
    pairs = zip(variables.positive, variables.negative, strict=True)
    matrices = np.stack([np.stack([Z.value, other.value]) for Z, other in pairs])
    margins = torch.from_numpy(variables.margins.value)
    iterate = Iterate(torch.from_numpy(matrices), margins, torch.from_numpy(multipliers.value).reshape(margins.shape))
    return iterate, float(program.value)


@pytest.mark.parametrize("name", ["binary", *LOSSES])
def test_penalties_vanish_at_the_optimum_of_the_sdp(name: str) -> None:
    problem = breast_cancer() if name == "binary" else iris(name)
    iterate, optimum = solved(problem)
    objective = Objective(problem, rho=1.0)
    assert float(objective.value(iterate, torch.arange(problem.n))) == pytest.approx(optimum, abs=1e-4)


def test_each_penalty_sees_its_own_violation() -> None:
    problem = breast_cancer()
    iterate, optimum = solved(problem)
    objective, rows = Objective(problem, rho=10.0), torch.arange(problem.n)
    too_high = Iterate(iterate.matrices, iterate.margins + 0.1, iterate.multipliers)
    assert float(objective.value(too_high, rows)) > optimum + 0.1
    negative = Iterate(iterate.matrices, iterate.margins, iterate.multipliers - 1.0)
    assert float(objective.value(negative, rows)) > optimum + 10.0
    shifted = iterate.matrices.clone()
    shifted[0, 0, 0, 0] += 0.5  # more curvature: PSD still, trace no longer
    gain = objective.value(Iterate(shifted, iterate.margins, iterate.multipliers), rows)
    assert float(gain) > optimum + 10.0 * 0.5 / 2 - 1e-3
    indefinite = iterate.matrices - 0.3 * torch.eye(problem.d + 1, dtype=torch.float64)
    assert float(objective.value(Iterate(indefinite, iterate.margins, iterate.multipliers), rows)) > optimum + 10


def test_gradient_is_the_derivative() -> None:
    problem = iris("one_vs_rest")
    rng = torch.Generator().manual_seed(0)
    start = [torch.randn(t.shape, generator=rng, dtype=torch.float64) for t in Iterate.zero(problem).tensors()]
    inputs = tuple(t.requires_grad_() for t in start)
    objective, rows = Objective(problem, rho=0.7), torch.arange(4)
    assert torch.autograd.gradcheck(lambda *t: objective.value(Iterate(*t), rows), inputs, atol=1e-4)


def run(problem: PolynomialProblem, **kwargs: object) -> SolveResult:
    with pytest.warns(UserWarning, match="penalty: max_iter"):
        return Penalty(**kwargs).solve(problem, tol=1e-3)  # type: ignore[arg-type]


def test_published_settings_end_far_from_the_optimum_with_an_honest_gap() -> None:
    problem = breast_cancer()
    result = run(problem)
    assert result.status is Status.MAX_ITER
    assert result.iterations == 5
    assert result.primal == problem.objective(result.network)
    assert 0 < result.dual <= 0.321143 < 0.5 < result.primal
    assert result.extra["psd_min_eigenvalue"] < 0 < result.extra["trace_mismatch"]


@pytest.mark.parametrize("loss", LOSSES)
def test_three_classes_and_the_reported_overstatement(loss: str) -> None:
    """With penalties too weak to bind, the method believes margins that its network does not have."""
    problem = iris(loss)
    result = run(problem, epochs=60, rho=1e-3, batch_size=10)
    overstated = result.extra["margin_overstatement"]
    assert overstated > 0.05
    assert result.extra["claimed_objective"] < result.primal
    assert result.extra["lmi_min_eigenvalue"] < -0.01
    assert result.extra["lmi_mean_violation"] > 0


def test_more_epochs_help() -> None:
    problem = breast_cancer()
    assert run(problem, epochs=100, batch_size=10).primal < run(problem, epochs=5, batch_size=10).primal


def test_seed_decides_the_order_and_nothing_else() -> None:
    problem = breast_cancer()
    solver = Penalty(epochs=2, batch_size=10)
    with pytest.warns(UserWarning, match="penalty: max_iter"):
        first, again, other = (solver.solve(problem, tol=1e-3, seed=seed) for seed in (1, 1, 2))
    assert first.primal == again.primal
    assert torch.equal(first.network.directions, again.network.directions)
    assert first.primal != other.primal


def test_time_limit_ends_within_an_epoch() -> None:
    with pytest.warns(UserWarning, match="penalty: max_time"):
        result = Penalty(epochs=10**6, batch_size=1).solve(breast_cancer(), tol=1e-3, max_seconds=0.05)
    assert result.status is Status.MAX_TIME
    assert result.iterations < 100
