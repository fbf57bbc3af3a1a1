"""Column generation: reference optima, the LMI SDP, determinism, and every way in which a solve can end."""

import itertools
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_iris, load_wine

from convex_head.errors import ConvergenceWarning, SolverError, ToleranceError, UnknownSolverError
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers import Progress, SolveResult, Status, column_generation, get_solver
from convex_head.solvers.base import Run
from convex_head.solvers.column_generation import ColumnGeneration, _sample_sizes
from convex_head.solvers.sdp import build

LOSSES = ("crammer_singer", "multi_margin", "one_vs_rest")
# n, d -> optimum of the LMI SDP at radius 0.5, reg 0.02; Clarabel and SCS agree.
OPTIMA = {(40, 5): 0.321142, (100, 9): 0.354804}


def breast_cancer(n: int, d: int, **kwargs: Any) -> PolynomialProblem:
    features, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(569)
    features, labels = features[order], labels[order]
    features = ((features - features[:200].mean(0)) / features[:200].std(0))[:n, :d]
    settings = {"num_classes": 2, "radius": 0.5, "reg": 0.02} | kwargs
    return PolynomialProblem(torch.from_numpy(features), torch.from_numpy(labels[:n]), **settings)


def solve(problem: PolynomialProblem, **kwargs: Any) -> SolveResult:
    return get_solver("column_generation").solve(problem, **kwargs)


def check_history(result: SolveResult, optimum: float, slack: float = 1e-6) -> None:
    """Primal >= optimum >= dual in every line, both monotone; the last line is the result."""
    for line in result.history:
        assert line.dual - slack <= optimum <= line.primal + slack
        assert line.gap == pytest.approx((line.primal - line.dual) / line.primal, abs=1e-12)
    for before, after in itertools.pairwise(result.history):
        assert after.primal <= before.primal and after.dual >= before.dual
        assert after.seconds >= before.seconds and after.iteration == before.iteration + 1
    assert result.iterations == len(result.history)
    assert result.history[-1].dual == result.dual
    assert result.history[-1].primal == pytest.approx(result.primal, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), OPTIMA)
def test_reference_optima_with_certificate(n: int, d: int) -> None:
    problem = breast_cancer(n, d)
    result = solve(problem, tol=1e-4)
    assert result.status is Status.CONVERGED and result.converged and result.gap <= 1e-4
    assert result.primal == pytest.approx(OPTIMA[n, d], rel=1e-4)
    assert result.dual == pytest.approx(OPTIMA[n, d], rel=1e-4)
    assert result.primal == problem.objective(result.network)
    assert result.neurons == result.network.size
    torch.testing.assert_close(result.network.directions.norm(dim=1), torch.ones(result.neurons, dtype=torch.float64))
    check_history(result, OPTIMA[n, d])


@pytest.mark.parametrize(("tol", "iterations"), [(0.5, 2), (0.05, 10), (1e-3, 30)])
def test_the_gap_asked_for_is_the_gap_reached(tol: float, iterations: int) -> None:
    result = solve(breast_cancer(40, 5), tol=tol)
    assert result.converged and result.gap <= tol and result.iterations <= iterations
    assert result.dual - 1e-6 <= OPTIMA[40, 5] <= result.primal + 1e-6


@pytest.mark.parametrize(("loss", "radius"), [*((loss, 0.3) for loss in LOSSES), ("crammer_singer", 0.0)])
@pytest.mark.parametrize("load", [load_iris, load_wine])
def test_three_classes_reach_the_pairwise_sdp(load: Any, loss: str, radius: float) -> None:
    features, labels = load(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[:24]
    x, y = ((features - features.mean(0)) / features.std(0))[order, :4], labels[order]
    settings: dict[str, Any] = {"num_classes": 3, "radius": radius, "reg": 0.02, "loss": loss}
    optimum = build(x, y, **settings)[0].solve(solver="CLARABEL", canon_backend="SCIPY")
    result = solve(PolynomialProblem(torch.from_numpy(x), torch.from_numpy(y), **settings), tol=1e-3)
    assert result.converged
    assert result.primal == pytest.approx(optimum, rel=1e-3)
    check_history(result, optimum)


@pytest.mark.parametrize("radius", [0.0, 0.2, 1.0])
def test_radii_reach_the_sdp(radius: float) -> None:
    problem = breast_cancer(40, 5, radius=radius)
    optimum = build(problem.features.numpy(), problem.labels.numpy(), num_classes=2, radius=radius, reg=0.02)[0].solve(
        solver="CLARABEL", canon_backend="SCIPY"
    )
    result = solve(problem, tol=3e-3)
    assert result.converged and result.primal == pytest.approx(optimum, rel=3e-3)
    check_history(result, optimum)


@pytest.mark.parametrize("radius", [1.5, 2.0, 3.0])
def test_radii_beyond_which_worst_points_are_not_unique(radius: float) -> None:
    result = solve(breast_cancer(40, 5, radius=radius), tol=1e-2)
    assert result.primal == pytest.approx({1.5: 0.819643, 2.0: 0.908748, 3.0: 1.0}[radius], rel=1e-2)
    assert result.converged


@pytest.mark.parametrize("reg", [5.0, 1e4])
def test_zero_network_is_optimal_when_regularisation_is_large(reg: float) -> None:
    result = solve(breast_cancer(40, 5, reg=reg), tol=1e-3)
    assert result.converged and result.primal == pytest.approx(1.0, rel=1e-3)


def test_runs_repeat_by_seed() -> None:
    first, again, other = (solve(breast_cancer(40, 5), tol=1e-2, seed=seed) for seed in (3, 3, 4))
    assert first.primal == again.primal and first.dual == again.dual
    assert torch.equal(first.network.directions, again.network.directions)
    assert torch.equal(first.network.weights, again.network.weights)
    assert other.primal != first.primal
    assert other.primal == pytest.approx(first.primal, rel=1e-2)


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    solve(breast_cancer(40, 5), tol=0.1)
    assert torch.equal(torch.rand(3), expected)


def test_warm_start_costs_less_and_ends_the_same() -> None:
    problem = breast_cancer(40, 5)
    cold = solve(problem, tol=1e-3)
    warm = solve(breast_cancer(40, 5), tol=1e-3, start=cold.network)
    assert warm.converged and warm.primal == pytest.approx(cold.primal, rel=1e-3)
    assert warm.extra["evaluations"] < cold.extra["evaluations"]
    near = solve(breast_cancer(40, 5, radius=0.55), tol=1e-2, start=cold.network)
    assert near.converged and near.primal > cold.primal
    empty = solve(problem, tol=1e-2, start=problem.pack(problem.zero_network()).unpack())
    assert empty.converged


def test_large_data_start_on_samples_and_keep_an_honest_gap_when_time_is_short() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12_000, 4, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + 0.5 * torch.randn(12_000, generator=generator, dtype=torch.float64) > 0).long()
    problem = PolynomialProblem(x, y, num_classes=2, radius=0.3, reg=0.02)
    with pytest.warns(ConvergenceWarning, match="max_time"):
        short = solve(problem, tol=1e-9, max_seconds=0.01)
    assert short.primal == pytest.approx(problem.objective(short.network)) and 0 <= short.dual <= short.primal
    whole = solve(problem, tol=1e-2)
    assert whole.converged and short.dual <= whole.primal and whole.dual <= short.primal


def test_samples_are_left_after_a_bounded_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short minimisations on a sample, although they reach nothing; on all rows what it takes."""
    monkeypatch.setattr(column_generation, "_FIRST_SAMPLE", 60)
    monkeypatch.setattr(column_generation, "_SAMPLE_EVALUATIONS", 7)
    monkeypatch.setattr(column_generation, "_SAMPLE_TOL", 1e-3)
    problem = breast_cancer(400, 20)
    taken: dict[int, list[int]] = {}
    correct = ColumnGeneration._correct

    def counted(self: Any, problem: Any, state: Any, run: Any, most: int) -> bool:
        before = run.extra["evaluations"]
        reached = correct(self, problem, state, run, most)
        taken.setdefault(most, []).append(run.extra["evaluations"] - before)
        return reached

    monkeypatch.setattr(ColumnGeneration, "_correct", counted)
    result = solve(problem, tol=1e-2)
    assert result.converged and taken.keys() == {7, 1000}
    assert taken[7] == [7, 7] and max(taken[1000]) > 7


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_limit_that_passes_between_two_looks_leaves_a_point(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([False] * before)
    monkeypatch.setattr(Run, "out_of_time", lambda self: next(looks, True))
    with pytest.warns(ConvergenceWarning, match="max_time"):
        result = solve(breast_cancer(40, 5), tol=1e-6)
    assert result.status is Status.MAX_TIME and 0 <= result.dual <= result.primal < 2


def test_time_limit_is_kept_with_an_honest_gap() -> None:
    problem = breast_cancer(200, 20)
    began = time.process_time()
    with pytest.warns(ConvergenceWarning, match=r"column_generation: max_time .* tol = 1e-07 was not reached"):
        result = solve(problem, tol=1e-7, max_seconds=0.3)
    assert time.process_time() - began < 3.0
    assert result.status is Status.MAX_TIME and not result.converged
    assert result.gap > 1e-7
    assert result.gap == pytest.approx((problem.objective(result.network) - result.dual) / result.primal, rel=1e-9)
    reference = solve(problem, tol=1e-2)
    assert result.dual <= reference.primal and reference.dual <= result.primal


def test_callback_that_returns_true_stops() -> None:
    lines: list[Progress] = []

    def stop(line: Progress) -> bool:
        lines.append(line)
        return len(lines) == 2

    with pytest.warns(ConvergenceWarning, match="column_generation: interrupted"):
        result = solve(breast_cancer(40, 5), tol=1e-6, callbacks=(stop,))
    assert result.status is Status.INTERRUPTED and result.iterations == 2
    assert tuple(lines) == result.history


def test_ctrl_c_returns_the_best_certified_point() -> None:
    problem = breast_cancer(40, 5)

    def interrupt(line: Progress) -> None:
        if line.iteration == 1:
            raise KeyboardInterrupt

    with pytest.warns(ConvergenceWarning, match="interrupted"):
        result = solve(problem, tol=1e-6, callbacks=(interrupt,))
    assert result.status is Status.INTERRUPTED
    assert result.primal == problem.objective(result.network) == pytest.approx(result.history[-1].primal)
    assert result.dual - 1e-6 <= OPTIMA[40, 5] <= result.primal + 1e-6
    assert result.gap == pytest.approx((result.primal - result.dual) / result.primal)


class Interrupting(PolynomialProblem):
    """Ctrl-C in the middle of the first evaluation."""

    def evaluate(self, *args: Any) -> Any:
        raise KeyboardInterrupt


def test_ctrl_c_before_the_first_point_propagates() -> None:
    problem = breast_cancer(40, 5)
    early = Interrupting(problem.features, problem.labels, num_classes=2, radius=0.5, reg=0.02)
    with pytest.raises(KeyboardInterrupt):
        solve(early)


def test_features_that_overflow_are_a_named_error() -> None:
    problem = breast_cancer(40, 5)
    huge = PolynomialProblem(1e200 * problem.features, problem.labels, num_classes=2, radius=0.5, reg=0.02)
    with pytest.raises(SolverError, match=r"column_generation .* Standardise the features"):
        solve(huge, max_seconds=5.0)


def test_errors_of_callbacks_propagate() -> None:
    def broken(line: Progress) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        solve(breast_cancer(40, 5), callbacks=(broken,))


@pytest.mark.parametrize("tol", [0.0, -1.0, float("nan"), float("inf"), True, "1e-2", None])
def test_tolerances_are_checked(tol: Any) -> None:
    with pytest.raises(ToleranceError, match=r"tol must be a positive finite number; found .* Use for example"):
        solve(breast_cancer(40, 5), tol=tol)


@pytest.mark.parametrize("seconds", [0.0, -3, float("nan")])
def test_time_limits_are_checked(seconds: Any) -> None:
    with pytest.raises(ToleranceError, match="max_seconds must be a positive finite number"):
        solve(breast_cancer(40, 5), max_seconds=seconds)


def test_numbers_of_numpy_are_numbers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert solve(breast_cancer(40, 5), tol=np.float32(0.1), max_seconds=np.int64(60)).converged


def test_unknown_solver_is_named() -> None:
    assert get_solver("auto").name == "column_generation"
    with pytest.raises(UnknownSolverError, match=r"auto or one of column_generation, sdp.*; found 'adam'"):
        get_solver("adam")


def test_single_precision_bulk_keeps_the_certificate() -> None:
    problem = breast_cancer(100, 9, dtype=torch.float32)
    result = solve(problem, tol=1e-3)
    assert result.converged
    assert result.dual - 1e-5 <= OPTIMA[100, 9] <= result.primal + 1e-5


def test_single_precision_goes_on_where_values_drown_in_rounding() -> None:
    """A gap that line searches by values alone do not reach in float32: they stall at four times as much."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randperm(800, generator=generator) % 2
    centres = 1.5 * torch.randn(2, 20, generator=generator)
    x = centres[y] + torch.randn(800, 20, generator=generator)
    problem = PolynomialProblem(x, y, num_classes=2, radius=0.2, reg=0.01, dtype=torch.float32)
    result = solve(problem, tol=1e-4)
    assert result.converged and result.primal - result.dual <= 1e-4 * result.primal


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        solve(breast_cancer(40, 5), tol=1e-1, callbacks=(lambda progress: seen.append(torch.get_num_threads()),))
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def hundred_classes() -> tuple[torch.Tensor, torch.Tensor, PolynomialProblem]:
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(100, 6, generator=generator, dtype=torch.float64)
    labels = torch.arange(400) % 100
    spread = torch.tensor([2.0, 1.0, 0.5, 0.3, 0.2, 0.1], dtype=torch.float64)
    features = means[labels] + spread * torch.randn(400, 6, generator=generator, dtype=torch.float64)
    return features, labels, PolynomialProblem(features, labels, num_classes=100, radius=0.1, reg=0.01)


def test_many_classes_start_from_their_discriminants() -> None:
    features, labels, problem = hundred_classes()
    start = problem.discriminant_network()
    centres = torch.stack([features[labels == c].mean(0) for c in range(100)])
    within = (features - centres[labels]).T @ (features - centres[labels]) / 400
    means = centres - features.mean(0)
    between = means.square().sum() / 100
    within += (0.3 * within.trace() + 1e-3 * between) / 6 * torch.eye(6, dtype=torch.float64)
    expected = means @ torch.linalg.inv(within)
    torch.testing.assert_close(start.directions, expected / expected.norm(dim=1, keepdim=True))
    assert torch.equal(start.function, torch.arange(100)) and (start.weights == 1).all()
    result = get_solver("column_generation").solve(problem, tol=0.3)
    assert result.converged and 0 < result.dual <= result.primal
    assert problem.objective(result.network) == pytest.approx(result.primal, rel=1e-6)
    assert result.primal < 0.9 * problem.objective(problem.zero_network())


@pytest.mark.filterwarnings("ignore::convex_head.errors.ConvergenceWarning")
@pytest.mark.parametrize(
    ("limit", "many", "far", "evaluations", "grown"),
    [
        (1000, 96, 0.15, (50, 50), True),
        (20, 96, 0.15, (20, 20), True),
        (60, 100, 0.15, (60, 60), False),  # functions are few
        (60, 96, 1.0, (50, 60), True),  # the optimum is near after the first search
    ],
)
def test_of_many_functions_neurons_are_added_before_a_search_ends(
    monkeypatch: pytest.MonkeyPatch, limit: int, many: int, far: float, evaluations: tuple[int, ...], grown: bool
) -> None:
    """A search is cut off after few evaluations; where those asked for are fewer still, after them."""
    for name, value in (("_PATIENCE", 50), ("_MANY", many), ("_FAR", far)):
        monkeypatch.setattr(column_generation, name, value)
    found: list[tuple[int, int, float]] = []

    class Watched(ColumnGeneration):
        def _correct(self, problem: Any, state: Any, run: Any, most: int) -> bool:
            size, before, accuracy = state.network.size, run.extra["evaluations"], state.accuracy
            state.accuracy = 1e-9
            reached = super()._correct(problem, state, run, most)
            assert not reached
            found.append((run.extra["evaluations"] - before, size, accuracy))
            state.accuracy = 0.1
            return reached

    Watched(max_iterations=2, inner_evaluations=limit).solve(hundred_classes()[2], tol=1e-6)
    taken, sizes, accuracies = zip(*found, strict=True)
    assert taken == evaluations and (sizes[0] < sizes[1]) is grown
    assert accuracies[1] == 0.1  # of a search that has not ended it is not asked for more


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discriminants_of_odd_data(dtype: torch.dtype) -> None:
    """One example a class, far from the origin, missing classes, constant features: unit directions, class means."""
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    labels = torch.arange(60)
    single = PolynomialProblem(x, labels, num_classes=61, radius=0.1, reg=0.01, dtype=dtype).discriminant_network()
    expected = x - x.mean(0)
    torch.testing.assert_close(single.directions[:60], expected / expected.norm(dim=1, keepdim=True), rtol=0, atol=1e-4)
    constant = PolynomialProblem(torch.ones(3, 4), torch.arange(3), num_classes=3, radius=0.1, reg=0.01, dtype=dtype)
    for net in (single, constant.discriminant_network()):
        torch.testing.assert_close(net.directions.norm(dim=1), torch.ones(len(net.weights), dtype=torch.float64))


def test_samples_have_examples_of_every_class() -> None:
    assert _sample_sizes(50_000, 10) == [4096, 16384]
    assert _sample_sizes(5_000, 10) == []
    assert _sample_sizes(20_000, 1000) == []
    assert _sample_sizes(1_280_000, 1000) == [32_000, 128_000, 512_000]


@pytest.mark.filterwarnings("ignore::convex_head.errors.ConvergenceWarning")
@pytest.mark.parametrize(("tol", "accuracy"), [(1e-4, 0.03), (1e-2, 0.05), (0.03, 0.15), (0.1, 0.2)])
def test_first_searches_are_as_accurate_as_tol_asks_within_limits(tol: float, accuracy: float) -> None:
    taken: list[float] = []

    class Watched(ColumnGeneration):
        def _correct(self, problem: Any, state: Any, run: Any, most: int) -> bool:
            taken.append(state.accuracy)
            return super()._correct(problem, state, run, most)

    Watched(max_iterations=1, inner_evaluations=1).solve(breast_cancer(40, 5), tol=tol)
    assert taken == [pytest.approx(accuracy)]
