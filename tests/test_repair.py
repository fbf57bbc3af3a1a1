"""Repaired dual points: better bounds, never above the optimum that the LMI SDP finds."""

import math
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
        better = problem.repair(report.rows, rough, answer, aim=optimum)
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


@pytest.mark.parametrize("joint", [True, False])
def test_changes_of_slopes_stay_on_their_face(joint: bool) -> None:
    """Four examples with a limit of 1: at the limit, below it, at the limit with one slope left no room, alone."""
    example = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
    slope = torch.tensor([0.5, 0.5, 0.0, 0.3, 0.4, 0.2, 0.8, 0.0], dtype=torch.float64)
    room = torch.tensor([True, True, True, True, True, True, False, True])
    none = torch.zeros(8, 2, dtype=torch.float64)
    rows = dual_rows.DualRows(none, example, none.long(), slope.sign(), slope, room)
    downhill = torch.tensor([2.0, 1.0, -1.0, 1.0, -2.0, 3.0, 5.0, -1.0], dtype=torch.float64)
    face = repair._Face(rows, slope, downhill, 1.0, joint)
    change = face.project(downhill)
    expected = [0.5, -0.5, 0.0, 1.0, -2.0, 0.0, 0.0, 0.0] if joint else [2.0, 1.0, 0.0, 1.0, -2.0, 3.0, 0.0, 0.0]
    assert change.tolist() == expected
    torch.testing.assert_close(face.project(change), change)
    moved = face.into_set(slope + 2 * downhill)
    most = torch.zeros(4, dtype=torch.float64).index_add_(0, example, moved) if joint else moved
    assert float(moved.min()) >= 0 and float(most.max()) <= 1 + 1e-12
    assert torch.equal(face.into_set(slope), slope)


def test_functions_that_no_margin_couples_have_no_rows() -> None:
    problem, _ = case("one_vs_rest", 0.3)
    assert problem.dual_point(problem.pack(problem.random_network(3, 0)), 0.5).rows is None


def test_rows_are_dropped_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, optimum = case("crammer_singer", 0.3)
    monkeypatch.setattr(dual_rows, "_LIMIT", 8)
    assert problem.dual_point(problem.pack(problem.random_network(3, 0)), 0.5).rows is None
    assert ColumnGeneration().solve(problem, tol=1e-3).primal == pytest.approx(optimum, rel=1e-3)


@pytest.mark.parametrize(
    ("gain", "before", "further"),
    [
        (1.0, math.inf, math.inf),
        (-1.0, math.inf, math.inf),
        (0.2, 0.8, 0.2 * (0.25 + 0.25**2 + 0.25**3) / (1 - 0.25**3)),
        (0.8, 0.2, math.inf),
        (0.1, -0.2, math.inf),
        (-0.1, 0.2, math.inf),
        (0.0, 0.0, 0.0),
        (-0.1, -0.2, 0.0),
    ],
)
def test_gains_to_come_are_a_geometric_series(gain: float, before: float, further: float) -> None:
    assert repair._further(gain, before) == pytest.approx(further)


def test_a_repair_that_does_not_get_there_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds go on while the aim is in reach, and end early where it is beyond the optimum."""
    problem, optimum = case("crammer_singer", 0.3)
    packed = problem.pack(ColumnGeneration().solve(problem, tol=1e-2).network)
    report = problem.dual_point(packed, 0.02, problem.blur(0.02))
    answer, rounds = problem.oracle(report.point), []
    oracle = repair.oracle
    monkeypatch.setattr(repair, "oracle", lambda point, reg: (rounds.append(reg), oracle(point, reg))[1])
    assert report.rows is not None
    best = problem.repair(report.rows, packed, answer, aim=2 * optimum)
    assert len(rounds) == 1 and best.dual > answer.dual
    rounds.clear()
    # Where the time is out this is the last bound: a second round follows.
    further = problem.repair(report.rows, packed, answer, aim=2 * optimum, persist=True)
    assert 2 <= len(rounds) < repair._ROUNDS and further.dual >= best.dual
    rounds.clear()
    assert problem.repair(report.rows, packed, answer, aim=0.5 * answer.dual).dual > answer.dual and len(rounds) == 1
