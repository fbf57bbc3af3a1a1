"""The LMI SDP against published-data reference numbers, brute force and its own certificate."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_iris, load_wine

from convex_head.errors import SolverError, UnknownLossError, UnknownSolverError
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers.conic import certify, form_signs, pick_conic_solver, values_at
from convex_head.solvers.result import Status
from convex_head.solvers.sdp import SDP, build, multipliers

COEFFICIENTS = (0.09, 0.5, 0.47)
LOSSES = ("crammer_singer", "multi_margin", "one_vs_rest")


def breast_cancer(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """First n rows and d columns, permuted and standardised with the first 200 rows; labels 0 and 1."""
    features, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(569)
    features, labels = features[order], labels[order]
    features = (features - features[:200].mean(0)) / features[:200].std(0)
    return features[:n, :d], labels[:n]


def three_classes(load: object, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    features, labels = load(return_X_y=True)  # type: ignore[operator]
    order = np.random.default_rng(0).permutation(len(labels))[:n]
    return ((features - features.mean(0)) / features.std(0))[order, :d], labels[order]


def problem_of(features: np.ndarray, labels: np.ndarray, **kwargs: object) -> PolynomialProblem:
    return PolynomialProblem(torch.from_numpy(features), torch.from_numpy(labels), **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "d", "optimum"), [(40, 5, 0.321142), (100, 9, 0.354804)])
def test_reference_optimum_with_certificate(n: int, d: int, optimum: float) -> None:
    features, labels = breast_cancer(n, d)
    problem = problem_of(features, labels, num_classes=2, radius=0.5, reg=0.02)
    result = SDP("CLARABEL").solve(problem, tol=1e-4)
    assert result.status is Status.CONVERGED
    assert result.primal == pytest.approx(optimum, abs=2e-6)
    assert result.dual <= result.primal
    assert result.gap <= 1e-5
    assert result.neurons <= 2 * (d + 1)


def test_scs_reaches_the_same_optimum() -> None:
    features, labels = breast_cancer(40, 5)
    result = SDP("SCS").solve(problem_of(features, labels, num_classes=2, radius=0.5, reg=0.02), tol=1e-4)
    assert result.primal == pytest.approx(0.321142, rel=1e-4)
    assert result.extra["conic_solver"] == "SCS"


@pytest.mark.parametrize("coefficients", [COEFFICIENTS, (0.2, -0.3, 0.1)])
def test_margins_are_the_worst_case_by_brute_force(coefficients: tuple[float, float, float]) -> None:
    """The sign of the off-diagonal block: with the wrong one, w falls below the sampled minimum by far."""
    features, labels = breast_cancer(14, 2)
    program, variables = build(features, labels, num_classes=2, radius=0.8, reg=0.01, coefficients=coefficients)
    program.solve(solver="CLARABEL", canon_backend="SCIPY")
    a, b, c = coefficients
    D = variables.positive[0].value - variables.negative[0].value
    angle = np.linspace(0, 2 * np.pi, 721)
    lengths = 0.8 * np.linspace(0, 1, 41)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    steps = (lengths[:, None, None] * circle).reshape(-1, 2)
    margins = variables.margins.value[:, 0]
    tight = 0
    for x, label, w in zip(features, labels, margins, strict=True):
        g = x + steps
        value = a * np.einsum("pi,ij,pj->p", g, D[:2, :2], g) + b * g @ D[:2, 2] + c * D[2, 2]
        worst = ((2 * label - 1) * value).min()
        assert w <= worst + 1e-5
        tight += w >= min(worst, 1.0) - 1e-3
    assert tight == len(labels)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("load", [load_iris, load_wine])
def test_three_classes_close_the_gap(load: object, loss: str) -> None:
    features, labels = three_classes(load, 24, 4)
    problem = problem_of(features, labels, num_classes=3, radius=0.3, reg=0.02, loss=loss)
    result = SDP("CLARABEL").solve(problem, tol=1e-4)
    assert result.status is Status.CONVERGED
    assert result.primal == pytest.approx(result.extra["conic_value"], rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_objective_of_the_program_is_the_loss_of_its_margins(loss: str) -> None:
    """The CVXPY objective against torch's own losses where there is one (ball of radius zero)."""
    features, labels = three_classes(load_iris, 12, 3)
    program, variables = build(features, labels, num_classes=3, radius=0.0, reg=0.05, loss=loss)
    program.solve(solver="CLARABEL", canon_backend="SCIPY")
    a, b, c = COEFFICIENTS
    logits = []
    for Z, other in zip(variables.positive, variables.negative, strict=True):
        D = Z.value - other.value
        quadratic = a * np.einsum("ni,ij,nj->n", features, D[:-1, :-1], features)
        logits.append(quadratic + b * features @ D[:-1, -1] + c * D[-1, -1])
    f, y = torch.from_numpy(np.stack(logits, axis=1)), torch.from_numpy(labels)
    own = f.gather(1, y[:, None])
    masked = f.masked_fill(torch.nn.functional.one_hot(y, 3).bool(), -torch.inf)
    signs = 2.0 * torch.nn.functional.one_hot(y, 3) - 1
    expected = {
        "crammer_singer": (1 - own[:, 0] + masked.amax(1)).clamp_min(0).mean(),
        "multi_margin": torch.nn.functional.multi_margin_loss(f, y),
        "one_vs_rest": (1 - signs * f).clamp_min(0).mean(),
    }[loss]
    norm = sum(float(Z.value[-1, -1]) for Z in (*variables.positive, *variables.negative))
    assert program.value == pytest.approx(float(expected) + 0.05 * norm, rel=1e-4)


def test_radius_zero_is_the_limit_of_small_balls() -> None:
    features, labels = breast_cancer(30, 4)
    values = []
    for radius in (0.0, 1e-3, 1e-2):
        program, _ = build(features, labels, num_classes=2, radius=radius, reg=0.02)
        values.append(program.solve(solver="CLARABEL", canon_backend="SCIPY"))
    assert values[0] < values[1] < values[2]
    assert values[1] - values[0] < 2e-3
    result = SDP().solve(problem_of(features, labels, num_classes=2, radius=0.0, reg=0.02), tol=1e-4)
    assert result.primal == pytest.approx(values[0], rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_certificate_is_a_bound_whatever_the_multipliers(loss: str) -> None:
    """Random multipliers, neither PSD nor in the ball nor in the set of slopes, prove nothing false."""
    features, labels = three_classes(load_iris, 10, 3)
    problem = problem_of(features, labels, num_classes=3, radius=0.3, reg=0.02, loss=loss)
    program, variables = build(features, labels, num_classes=3, radius=0.3, reg=0.02, loss=loss)
    optimum = program.solve(solver="CLARABEL", canon_backend="SCIPY")
    signs = form_signs(labels, 3, loss)
    moments = multipliers(variables, 0.3)
    assert certify(problem, signs, moments) == pytest.approx(optimum, rel=1e-4)
    rng = np.random.default_rng(0)
    for scale in (0.1, 1.0, 10.0):
        noise = scale * np.abs(moments).max() * rng.normal(size=moments.shape)
        assert certify(problem, signs, moments + noise) <= optimum + 1e-6
        assert certify(problem, signs, (1 + scale) * moments) <= optimum + 1e-6


def test_form_signs_and_values_by_hand() -> None:
    labels = np.array([0, 2])
    assert form_signs(np.array([0, 1]), 2, "one_vs_rest").ravel().tolist() == [-1.0, 1.0]
    pairs = form_signs(labels, 3, "multi_margin")
    assert pairs.tolist() == [[[1, -1, 0], [1, 0, -1]], [[-1, 0, 1], [0, -1, 1]]]
    rest = form_signs(labels, 3, "one_vs_rest")
    assert rest[1].tolist() == [[-1, 0, 0], [0, -1, 0], [0, 0, 1]]
    W = np.arange(8.0).reshape(2, 2, 2)
    value = values_at(np.array([[3.0]]), np.array([[1.0, -1.0]])) @ W.ravel()
    lifted = np.array([3.0, 1.0])
    assert value.item() == lifted @ W[0] @ lifted - lifted @ W[1] @ lifted


def test_time_limit_returns_a_measured_point() -> None:
    features, labels = breast_cancer(40, 5)
    problem = problem_of(features, labels, num_classes=2, radius=0.5, reg=0.02)
    with pytest.warns(UserWarning, match=r"sdp: max_time after .* tol = 0.0001 was not reached"):
        result = SDP("CLARABEL").solve(problem, tol=1e-4, max_seconds=1e-3)
    assert result.status is Status.MAX_TIME
    assert result.dual <= 0.321142 <= result.primal == problem.objective(result.network)


def test_a_failing_conic_solver_is_an_error_that_keeps_the_best_point() -> None:
    features, labels = breast_cancer(40, 5)
    problem = problem_of(features, labels, num_classes=2, radius=0.5, reg=0.02)
    with pytest.raises(SolverError, match="HIGHS must return a point; it failed") as caught:
        SDP("HIGHS").solve(problem)
    assert problem.objective(caught.value.best) == pytest.approx(1.0)


def test_conic_solver_is_picked_by_size_and_checked() -> None:
    assert pick_conic_solver(None, 10**9) in ("MOSEK", "SCS")
    assert pick_conic_solver(None, 10) in ("MOSEK", "CLARABEL")
    assert pick_conic_solver("SCS", 10) == "SCS"
    with pytest.raises(UnknownSolverError, match="must be installed; found 'nonesuch'"):
        pick_conic_solver("nonesuch", 10)
    with pytest.raises(UnknownLossError, match="found 'hinge'"):
        form_signs(np.array([0, 1, 2]), 3, "hinge")


def test_program_is_dcp_and_has_one_batched_inequality() -> None:
    features, labels = breast_cancer(6, 3)
    program, variables = build(features, labels, num_classes=2, radius=0.5, reg=0.02)
    assert program.is_dcp()
    assert isinstance(variables.bound, cp.constraints.PSD)
    assert variables.bound.shape == (6, 4, 4)
