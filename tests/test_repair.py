"""Repaired dual points: better bounds, never above the optimum that the LMI SDP finds."""

import dataclasses
import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from repair_cases import case, clusters, near_an_optimum, of_a_random_network
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork
from convex_head.problems import dual_rows, repair
from convex_head.problems.dual import OracleAnswer
from convex_head.problems.interior_point import SlopeProgram
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.shards import Whole
from convex_head.solvers.base import Run
from convex_head.solvers.column_generation import ColumnGeneration


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


@pytest.mark.parametrize("loss", ["crammer_singer", "multi_margin"])
@pytest.mark.parametrize(("radius", "reg"), [(0.0, 0.2), (0.3, 0.02)])
def test_no_repair_passes_the_optimum(monkeypatch: pytest.MonkeyPatch, loss: str, radius: float, reg: float) -> None:
    """However far it is asked to go, for all neurons and for few, with all slopes free and with some."""
    problem, optimum = case(loss, radius, reg)
    found = []
    for free in (500, 12):
        for leading in (64, 1):
            monkeypatch.setattr(repair, "_FREE", free)
            monkeypatch.setattr(repair, "_LEADING", leading)
            for seed in range(3):
                packed = problem.pack(problem.random_network(1, seed))
                report = problem.dual_point(packed, 0.5)
                assert report.rows is not None
                answer = problem.oracle(report.point)
                better = problem.repair(report.rows, packed, answer, primal=10 * optimum, tol=1e-4, late=True)
                found.append(better.dual)
    assert 0.3 * optimum < max(found) <= optimum * (1 + 1e-5)


@pytest.mark.filterwarnings("ignore::convex_head.errors.ConvergenceWarning")
def test_a_bound_that_is_far_off_is_repaired_where_the_time_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred classes with one neuron each the worst one scales the slopes of all down."""
    x, y = clusters(1000, 24, 100)
    problem = PolynomialProblem(x, y, num_classes=100, radius=0.25, reg=0.001)
    answers, repaired = [], problem.repair
    monkeypatch.setattr(problem, "repair", lambda *args, **more: (answers.append(args[2]), repaired(*args, **more))[1])
    network = ColumnGeneration(neurons=1, max_iterations=1, inner_evaluations=30).solve(problem, tol=0.05).network
    assert not answers
    monkeypatch.setattr(Run, "out_of_time", lambda _: True)  # without a limit that the repair itself would pass
    result = ColumnGeneration().solve(problem, tol=0.05, start=network)
    assert [float(answer.bounds.amax()) > 4 * problem.reg for answer in answers] == [True]
    assert 2.5 * answers[0].dual < result.dual < result.primal


def test_far_from_an_optimum_sums_are_free_and_functions_count_by_their_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, packed, report, answer = of_a_random_network()
    given: list[tuple[Tensor, bool]] = []
    move = repair.stationary_slopes

    def watched(rows: Any, neurons: Tensor, signs: Tensor, **more: Any) -> Tensor:
        given.append((signs.abs().amax(1), more["is_far"]))
        return move(rows, neurons, signs, **more)

    monkeypatch.setattr(repair, "stationary_slopes", watched)
    assert report.rows is not None
    for share, is_far in ((0.9, True), (1.1, False)):
        problem.repair(report.rows, packed, answer, primal=answer.dual / (share * repair._FAR), tol=1e-4)
        assert given[-1][1] is is_far
    peak = answer.bounds.amax(1)
    assert float(peak.median()) > problem.reg and float(peak.amax()) > 1.1 * float(peak.median())
    torch.testing.assert_close(given[0][0], (peak / peak.median()).clamp_min(1.0))
    assert set(given[-1][0].tolist()) == {1.0}
    given.clear()
    asked = counted_oracle(monkeypatch)
    monkeypatch.setattr(repair, "_WORTH", -1.0)
    problem.repair(report.rows, packed, answer, primal=10 * report.primal, tol=1e-4, late=True)
    assert len(given) == repair._LATE_MOVES and len(asked) <= repair._LATE_MOVES + repair._LATE_ROUNDS
    for (weights, _), before in zip(given[1:], asked, strict=False):
        peak_then = before.bounds.amax(1)
        torch.testing.assert_close(weights, (peak_then / peak_then.median().clamp_min(problem.reg)).clamp_min(1.0))
    # Where most functions are worth next to nothing, the others count by what they are worth in units of reg.
    idle = dataclasses.replace(answer, bounds=answer.bounds * torch.tensor([[1.0], [0.0], [0.0]]))
    problem.repair(report.rows, packed, idle, primal=10 * report.primal, tol=1e-4)
    first = float((peak[0] / problem.reg).clamp_min(1.0))
    torch.testing.assert_close(given[-1][0], torch.tensor([first, 1.0, 1.0]).double())


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
    answer, asked = problem.oracle(report.point), counted_oracle(monkeypatch)
    assert report.rows is not None and len(report.rows.slope) > 40
    whole = problem.repair(report.rows, packed, answer, primal=report.primal, tol=1e-4)
    assert len(asked) == 2  # after least squares one round suffices for all neurons of 24 dimensions
    asked.clear()
    monkeypatch.setattr(repair, setting, 20 if setting == "_FREE" else 4)
    fewer = problem.repair(report.rows, packed, answer, primal=report.primal, tol=1e-4)
    assert answer.dual < fewer.dual < above
    assert fewer.dual - answer.dual > 0.5 * (whole.dual - answer.dual)
    torch.testing.assert_close(fewer.directions, answer.directions)


def test_rounds_go_on_where_the_aim_is_in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of slopes that the first few neurons allow shows whether it is; the next ones only lower it."""
    x, y = clusters(300, 24, 4)
    problem = PolynomialProblem(x, y, num_classes=4, radius=1.0, reg=0.02)
    packed = problem.pack(ColumnGeneration().solve(problem, tol=0.03).network)
    report = problem.dual_point(packed, 0.02, problem.blur(0.02))
    answer, rounds = problem.oracle(report.point), [0]
    maximise = SlopeProgram.maximise

    def counted(*args: Any, **more: Any) -> Tensor:
        rounds[0] += 1
        return maximise(*args, **more)

    def repaired(tol: float, late: bool = False) -> tuple[float, int]:
        rounds[0] = 0
        return problem.repair(report.rows, packed, answer, report.primal, tol, late=late).dual, rounds[0]

    monkeypatch.setattr(SlopeProgram, "maximise", counted)
    best, _ = repaired(1e-4)
    monkeypatch.setattr(repair, "_LEADING", 4)
    within = 1.05 * (1 - best / report.primal)
    dual, done = repaired(within)
    assert dual >= (1 - within) * report.primal and 1 < done <= repair._ROUNDS
    short, done = repaired(1e-4)
    assert short < (1 - 1e-4) * report.primal and done == 1
    assert repaired(1e-4, late=True)[1] == repair._LATE_ROUNDS


class _NoProgram:
    """Where no interior-point method should be asked."""

    def __init__(self, *args: Any, **more: Any):
        raise AssertionError("the interior-point method was asked")


def counted_oracle(monkeypatch: pytest.MonkeyPatch) -> list[OracleAnswer]:
    asked: list[OracleAnswer] = []
    oracle = repair.oracle
    monkeypatch.setattr(repair, "oracle", lambda point, reg: (asked.append(oracle(point, reg)), asked[-1])[1])
    return asked


def test_where_no_slope_is_free_least_squares_are_all(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, packed, report, answer = near_an_optimum()
    monkeypatch.setattr(repair, "_FREE", 0)
    monkeypatch.setattr(repair, "SlopeProgram", _NoProgram)
    asked = counted_oracle(monkeypatch)
    assert report.rows is not None
    better = problem.repair(report.rows, packed, answer, primal=report.primal, tol=1e-4)
    assert len(asked) == 1 and better.dual == asked[0].dual > 1.02 * answer.dual
    torch.testing.assert_close(better.directions, answer.directions)
    # And where these suffice.
    monkeypatch.setattr(repair, "_FREE", 500)
    near = better.dual * (1 + 1e-6)
    assert problem.repair(report.rows, packed, answer, primal=near, tol=1e-4).dual == better.dual
    assert problem.repair(report.rows, packed, answer, primal=answer.dual, tol=1e-4) is answer


def test_slopes_are_moved_for_the_network_s_and_the_oracle_s_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the sign that it breaks the bound with, those of a second round with what the first has found."""
    _, packed, report, answer = near_an_optimum()
    given: list[tuple[Tensor, Tensor]] = []
    move = repair.stationary_slopes

    def watched(rows: Any, neurons: Tensor, signs: Tensor, **more: Any) -> Tensor:
        given.append((neurons, signs))
        return move(rows, neurons, signs, **more)

    monkeypatch.setattr(repair, "stationary_slopes", watched)
    asked = counted_oracle(monkeypatch)
    setting = repair._Setting(3, True, 1 / 24, (0.09, 0.5, 0.47), 0.02, Whole())
    assert report.rows is not None
    monkeypatch.setattr(repair, "_WORTH", -1.0)
    rows, best = repair._moved(report.rows, packed, answer, setting, moves=2, aim=math.inf, is_far=False)
    assert best.dual == max(found.dual for found in asked) > answer.dual
    torch.testing.assert_close(setting.point(rows).mass, setting.point(report.rows).mass, rtol=0.2, atol=0)
    expected = int((packed.nu > 0.1 * packed.nu.amax()).sum())
    for (neurons, signs), found in zip(given, (answer, asked[0]), strict=True):
        expected += int((found.values > 0.98 * 0.02).sum())
        assert int((signs != 0).sum()) == expected
        held = {(f, *row) for f in range(3) for row in signed(neurons[f], signs[f])}
        for f in range(3):
            for half, sign in enumerate((1.0, -1.0)):
                near = found.values[f, half] > 0.98 * 0.02
                theirs = found.directions[f, half][near]
                assert {(f, *row) for row in signed(theirs, torch.full((len(theirs),), sign).double())} <= held
            own = packed.nu[f] > 0.1 * packed.nu.amax()
            unit = packed.vectors[f][own] / packed.nu[f][own].unsqueeze(-1)
            assert {(f, *row) for row in signed(unit, packed.signs[f][own])} <= held


def signed(neurons: Tensor, signs: Tensor) -> set[tuple[float, ...]]:
    """Rounded rows (sign, neuron) of those with a sign."""
    table = torch.cat([signs.unsqueeze(1), neurons], dim=1)[signs != 0]
    return {tuple(row) for row in (1e6 * table).round().tolist()}


def test_the_interior_point_method_goes_on_from_the_slopes_that_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, packed, report, answer = near_an_optimum()
    assert report.rows is not None
    setting = repair._Setting(3, True, 1 / 24, (0.09, 0.5, 0.47), 0.02, Whole())
    moved, _ = repair._moved(report.rows, packed, answer, setting, moves=1, aim=math.inf, is_far=False)
    started: list[Tensor] = []

    class Watched(repair.SlopeProgram):
        def __init__(self, rows: Any, *args: Any, **more: Any):
            started.append(rows.slope)
            super().__init__(rows, *args, **more)

    monkeypatch.setattr(repair, "SlopeProgram", Watched)
    problem.repair(report.rows, packed, answer, primal=report.primal, tol=1e-4)
    torch.testing.assert_close(started[0].sort().values, moved.slope.sort().values)
    assert len(moved.slope) != len(report.rows.slope) or not torch.allclose(moved.slope, report.rows.slope)


@pytest.mark.parametrize(
    ("few", "many", "dear", "is_asked"),
    [(3, 128, 1, True), (2, 3, 3 * 4**3, True), (2, 3, 3 * 4**3 - 1, False), (2, 2, 3 * 4**3, False)],
)
def test_the_interior_point_method_is_for_few_functions_or_small_ones(
    monkeypatch: pytest.MonkeyPatch, few: int, many: int, dear: int, is_asked: bool
) -> None:
    """Three functions of four features; where the time is out, too."""
    problem, packed, report, answer = of_a_random_network()
    for name, value in (("_FEW", few), ("_MANY", many), ("_DEAR", dear), ("SlopeProgram", _NoProgram)):
        monkeypatch.setattr(repair, name, value)
    assert report.rows is not None
    for late in (False, True):
        with pytest.raises(AssertionError, match="was asked") if is_asked else nullcontext():
            problem.repair(report.rows, packed, answer, report.primal, 1e-4, late=late)


def test_slopes_move_as_often_as_is_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the interior-point method: more often where the time is out, not beyond the aim, nor for too little."""
    problem, packed, report, answer = of_a_random_network()
    monkeypatch.setattr(repair, "_FEW", 2)
    monkeypatch.setattr(repair, "_MANY", 2)
    monkeypatch.setattr(repair, "SlopeProgram", _NoProgram)
    asked = counted_oracle(monkeypatch)
    assert report.rows is not None
    monkeypatch.setattr(repair, "_WORTH", -1.0)
    duals = []
    for late, moves in ((False, repair._MOVES_ALONE), (True, repair._LATE_MOVES)):
        asked.clear()
        duals.append(problem.repair(report.rows, packed, answer, report.primal, 1e-4, late=late).dual)
        assert len(asked) == moves and duals[-1] == max(found.dual for found in asked) > answer.dual
    assert duals[0] < duals[1]
    first = asked[0].dual
    asked.clear()
    problem.repair(report.rows, packed, answer, primal=0.5 * (answer.dual + first), tol=1e-4, late=True)
    assert len(asked) == 1
    share = (first - answer.dual) / ((1 - 1e-4) * report.primal)
    for worth, goes_on in ((1.01 * share, False), (0.99 * share, True)):
        asked.clear()
        monkeypatch.setattr(repair, "_WORTH", worth)
        problem.repair(report.rows, packed, answer, report.primal, 1e-4, late=True)
        assert (len(asked) > 1) is goes_on


def test_slopes_without_room_and_examples_too_large_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "_FREE", 4)
    example = torch.tensor([0, 1, 2, 2, 2, 2, 2, 3, 3])
    slope = torch.tensor([1.0, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.8], dtype=torch.float64)
    rows = dual_rows.DualRows(torch.zeros(9, 2), example, torch.zeros(9, 2).long(), torch.ones(9), slope)
    order = repair._order(rows, torch.arange(4), 1.0)
    assert len(torch.unique(order)) == 4
    assert float(order[torch.isin(example, torch.tensor([1, 3]))].max()) < float(order[:1]) < math.inf
    assert float(order[7]) < float(order[2])
    found = repair._gathered(rows, order, True, Whole())[0].slope.tolist()
    assert sorted(found) == [0.2, 0.5, 0.8, 1.0] and found[-1] == 1.0


@pytest.mark.parametrize(("until", "moves"), [(-1.0, 1), (19.0, 1), (25.0, 2), (35.0, 3)])
def test_moves_end_before_the_time_is_out(monkeypatch: pytest.MonkeyPatch, until: float, moves: int) -> None:
    """Each takes ten seconds of this clock. The first is always made; the interior-point method then is not asked."""
    (_, optimum), (problem, packed, report, answer) = case("crammer_singer", 0.3), of_a_random_network()
    now, ask = [0.0], repair.oracle

    def slow(*args: Any) -> Any:
        now[0] += 10.0
        return ask(*args)

    monkeypatch.setattr(repair, "_WORTH", -1.0)
    monkeypatch.setattr(repair, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(repair, "oracle", slow)
    if until < 10:
        monkeypatch.setattr(repair, "SlopeProgram", _NoProgram)
    else:
        monkeypatch.setattr(repair, "_solved", lambda rows, packed, best, *_: best)
    assert report.rows is not None
    better = problem.repair(report.rows, packed, answer, report.primal, 1e-4, late=True, until=until)
    assert now[0] == 10.0 * moves and answer.dual < better.dual <= optimum * (1 + 1e-6)


def test_the_time_is_out_where_it_is_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, packed, report, answer = of_a_random_network()
    asked: list[bool] = []

    class OtherIsOut(Whole):
        def any(self, flag: bool) -> bool:
            asked.append(flag)
            return True

    monkeypatch.setattr(repair, "_WORTH", -1.0)
    monkeypatch.setattr(repair, "SlopeProgram", _NoProgram)
    moves = counted_oracle(monkeypatch)
    problem.shard = OtherIsOut()
    assert report.rows is not None
    problem.repair(report.rows, packed, answer, report.primal, 1e-4, late=True)
    assert len(moves) == 1 and asked == [False, False]


def test_the_interior_point_method_ends_with_the_time() -> None:
    """It makes no step then, and what it has is a bound all the same."""
    problem, optimum = case("crammer_singer", 0.3)
    _, packed, report, answer = near_an_optimum()
    assert report.rows is not None
    setting = {"primal": report.primal, "tol": 1e-4}
    rows = report.rows
    free, is_free = repair._gathered(rows, repair._order(rows, torch.arange(24), 1 / 24), True, Whole())
    assert bool(is_free.any())
    eye = torch.eye(4).double().expand(3, 2, 4, 4)
    rest = repair._Setting(3, True, 1 / 24, problem.coefficients, 0.02, Whole()).point(rows.some(~is_free))
    program = SlopeProgram(free, rest, eye, cap=1 / 24, coefficients=problem.coefficients, reg=0.02)
    x = torch.cat([free.slope, free.slope.new_ones(1)])
    found = {until: program.maximise(x, report.primal, report.primal, until=until) for until in (-math.inf, math.inf)}
    early, whole = (problem.oracle(program.point(found[until])).dual for until in (-math.inf, math.inf))
    assert 0 < early < whole <= optimum * (1 + 1e-6)
    assert problem.repair(rows, packed, answer, **setting, until=-math.inf).dual >= answer.dual
