"""Repaired dual points: better bounds, never above the optimum that the LMI SDP finds."""

from typing import Any

import pytest
import torch
from sklearn.datasets import load_iris

from convex_head.adversary.margins import PackedNetwork
from convex_head.problems import dual_rows, repair
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers.column_generation import ColumnGeneration
from convex_head.solvers.sdp import build


def clusters(n: int, d: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    x = centres[labels] + torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (x - x.mean(0)) / x.std(0), labels


def case(loss: str, radius: float) -> tuple[PolynomialProblem, float]:
    features, labels = load_iris(return_X_y=True)
    chosen = torch.randperm(150, generator=torch.Generator().manual_seed(0))[:24].numpy()
    x = ((features - features.mean(0)) / features.std(0))[chosen]
    settings: dict[str, Any] = {"num_classes": 3, "radius": radius, "reg": 0.02, "loss": loss}
    optimum = build(x, labels[chosen], **settings)[0].solve(solver="CLARABEL", canon_backend="SCIPY")
    return PolynomialProblem(torch.from_numpy(x), torch.from_numpy(labels[chosen]), **settings), optimum


@pytest.mark.parametrize("loss", ["crammer_singer", "multi_margin"])
@pytest.mark.parametrize("radius", [0.0, 0.3])
def test_a_repaired_bound_is_better_and_still_a_bound(loss: str, radius: float) -> None:
    problem, optimum = case(loss, radius)
    network = ColumnGeneration().solve(problem, tol=1e-2).network
    packed = problem.pack(network)
    generator = torch.Generator().manual_seed(1)
    gained = 0.0
    for size in (0.0, 0.003, 0.01, 0.03):
        noise = size * torch.randn(packed.vectors.shape, generator=generator, dtype=torch.float64)
        rough = PackedNetwork.of(packed.vectors + noise * (packed.signs != 0).unsqueeze(-1), packed.signs)
        report = problem.dual_point(rough, 0.02, problem.blur(0.02))
        answer = problem.oracle(report.point)
        assert report.rows is not None
        better = problem.repair(report.rows, rough, answer, primal=report.primal, tol=1e-4)
        assert answer.dual <= better.dual <= optimum + 1e-6
        gained = max(gained, better.dual - answer.dual)
    assert gained > 1e-3 * optimum


@pytest.mark.filterwarnings("ignore::convex_head.errors.ConvergenceWarning")
def test_a_bound_that_is_far_off_is_repaired_where_the_time_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred classes with one neuron each the worst one scales the slopes of all down."""
    x, y = clusters(1000, 24, 100)
    problem = PolynomialProblem(x, y, num_classes=100, radius=0.25, reg=0.001)
    answers, repaired = [], problem.repair
    monkeypatch.setattr(problem, "repair", lambda *args, **more: (answers.append(args[2]), repaired(*args, **more))[1])
    network = ColumnGeneration(neurons=1, max_iterations=1, inner_evaluations=30).solve(problem, tol=0.05).network
    assert not answers
    result = ColumnGeneration().solve(problem, tol=0.05, start=network, max_seconds=1e-6)
    assert [float(answer.bounds.amax()) > 4 * problem.reg for answer in answers] == [True]
    assert 1.5 * answers[0].dual < result.dual < result.primal


def test_rows_give_the_moments_of_their_pass() -> None:
    problem, _ = case("crammer_singer", 0.0)
    packed = problem.pack(problem.random_network(3, 0))
    report = problem.dual_point(packed, 0.5)
    rows = report.rows
    assert rows is not None and float(rows.slope.sum()) == pytest.approx(float(report.point.mass), rel=1e-12)
    second = torch.zeros_like(report.point.moments[:, :-1, :-1])
    for x, (plus, minus), sign, slope in zip(rows.points, rows.functions.tolist(), rows.sign, rows.slope, strict=True):
        second[plus] += sign * slope * 0.09 * torch.outer(x, x)
        second[minus] -= sign * slope * 0.09 * torch.outer(x, x)
    torch.testing.assert_close(second, report.point.moments[:, :-1, :-1])


def test_functions_that_no_margin_couples_have_no_rows() -> None:
    problem, _ = case("one_vs_rest", 0.3)
    assert problem.dual_point(problem.pack(problem.random_network(3, 0)), 0.5).rows is None


def test_rows_are_dropped_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, optimum = case("crammer_singer", 0.3)
    monkeypatch.setattr(dual_rows, "_LIMIT", 8)
    assert problem.dual_point(problem.pack(problem.random_network(3, 0)), 0.5).rows is None
    assert ColumnGeneration().solve(problem, tol=1e-3).primal == pytest.approx(optimum, rel=1e-3)


@pytest.mark.parametrize("setting", ["_FREE", "_LEADING"])
def test_a_few_free_slopes_or_neurons_repair_too(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """Of 24 dimensions matrices have a few, and of some hundred slopes twenty are free."""
    x, y = clusters(300, 24, 4)
    problem = PolynomialProblem(x, y, num_classes=4, radius=1.0, reg=0.02)
    network = ColumnGeneration().solve(problem, tol=0.03).network
    above = ColumnGeneration().solve(problem, tol=2e-3, start=network).primal
    packed = problem.pack(network)
    report = problem.dual_point(packed, 0.02, problem.blur(0.02))
    answer, asked, oracle = problem.oracle(report.point), [], repair.oracle
    assert report.rows is not None and len(report.rows.slope) > 40
    monkeypatch.setattr(repair, "oracle", lambda point, reg: (asked.append(oracle(point, reg)), asked[-1])[1])
    whole = problem.repair(report.rows, packed, answer, primal=report.primal, tol=1e-4)
    assert len(asked) == 1  # all neurons of 24 dimensions
    asked.clear()
    monkeypatch.setattr(repair, setting, 20 if setting == "_FREE" else 4)
    fewer = problem.repair(report.rows, packed, answer, primal=report.primal, tol=1e-4)
    assert answer.dual < fewer.dual < above
    assert fewer.dual - answer.dual > 0.5 * (whole.dual - answer.dual)
    assert 1 < len(asked) <= repair._ROUNDS or setting == "_FREE"
    torch.testing.assert_close(fewer.directions, answer.directions)


def test_no_slope_free_leaves_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = case("crammer_singer", 0.3)
    packed = problem.pack(problem.random_network(3, 0))
    report = problem.dual_point(packed, 5.0)
    answer = problem.oracle(report.point)
    assert report.rows is not None
    monkeypatch.setattr(repair, "_FREE", 1)  # every example has two margins here
    assert problem.repair(report.rows, packed, answer, primal=report.primal, tol=1e-4) is answer


def test_free_slopes_do_not_depend_on_how_rows_are_spread() -> None:
    """What two processes choose together is what one chooses; examples are whole, those with room come first."""
    example = torch.arange(40).repeat_interleave(3)
    slope = torch.where(example % 4 == 0, 1.0, 0.3).double()
    slope[(example % 4 == 0) & (torch.arange(120) % 3 > 0)] = 0.0
    rows = dual_rows.DualRows(torch.zeros(120, 2), example, torch.zeros(120, 2).long(), torch.ones(120), slope)
    number = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    order = repair._order(rows, number, 1.0)
    halves = [rows.example < 17, rows.example >= 17]
    for half in halves:
        part = dual_rows.DualRows(
            *(getattr(rows, name)[half] for name in ("points", "example", "functions", "sign", "slope"))
        )
        torch.testing.assert_close(repair._order(part, number, 1.0), order[half])
    assert len(torch.unique(order)) == 40
    full = slope.clone()
    full[example % 4 == 0] = 1.0
    late = repair._order(dual_rows.DualRows(*(rows.points, example, rows.functions, rows.sign, full)), number, 1.0)
    assert float(late[example % 4 == 0].min()) > float(late[example % 4 > 0].max())
