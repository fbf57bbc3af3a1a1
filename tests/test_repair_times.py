"""When bounds are repaired: as soon as the median function is near enough, and after a miss not too soon again."""

import math
from pathlib import Path
from typing import Any

import pytest
from repair_cases import clusters

from convex_head import ConvexRobustHead
from convex_head.errors import ConvergenceWarning
from convex_head.problems.dual import OracleAnswer
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers import column_generation
from convex_head.solvers.column_generation import ColumnGeneration

TOL = 0.08


def hard_problem() -> PolynomialProblem:
    x, y = clusters(300, 24, 4)
    return PolynomialProblem(x, y, num_classes=4, radius=2.0, reg=0.005)


def test_one_bad_function_does_not_put_a_repair_off(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    repair = PolynomialProblem.repair

    def noted(self: PolynomialProblem, rows: Any, packed: Any, answer: OracleAnswer, *rest: Any, **limits: Any) -> Any:
        found = repair(self, rows, packed, answer, *rest, **limits)
        asked.append((answer.bounds.amax(1) / self.reg, answer.dual, found.dual))
        return found

    monkeypatch.setattr(PolynomialProblem, "repair", noted)
    sooner = ColumnGeneration().solve(hard_problem(), tol=TOL)
    (peak, before, after), *_ = asked
    limit = 1 + column_generation._REPAIR_MEDIAN * TOL
    assert float(peak.median()) <= limit < float(peak.amax()) and float(peak.amax()) > column_generation._REPAIR_WORST
    assert before < (1 - 2 * TOL) * sooner.primal < (1 - TOL) * sooner.primal <= after
    monkeypatch.setattr(column_generation, "_REPAIR_MEDIAN", -math.inf)
    later = ColumnGeneration().solve(hard_problem(), tol=TOL)
    assert max(sooner.gap, later.gap) <= TOL
    assert sooner.extra["evaluations"] < later.extra["evaluations"]
    assert later.dual <= sooner.primal and sooner.dual <= later.primal


def test_a_repair_asks_for_a_median_within_tol(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worst function and no median allows it, until they are so near."""
    peaks: list[Any] = []
    monkeypatch.setattr(
        PolynomialProblem,
        "repair",
        lambda self, rows, packed, answer, *_, **limits: (peaks.append(answer.bounds.amax(1) / self.reg), answer)[1],
    )
    ColumnGeneration().solve(hard_problem(), tol=0.05)
    assert peaks
    for peak in peaks:
        is_near = float(peak.median()) <= 1 + 0.05 * column_generation._REPAIR_MEDIAN
        assert is_near or float(peak.amax()) <= column_generation._REPAIR_WORST


def test_a_repair_that_missed_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its gap can have shrunk to tol by a factor an iteration. Here the network stays, and no repair helps."""
    measured, missed = [0], []
    measure = ColumnGeneration._measure

    def counted(self: ColumnGeneration, *args: Any) -> Any:
        measured[0] += 1
        return measure(self, *args)

    def hopeless(
        self: PolynomialProblem, rows: Any, packed: Any, answer: OracleAnswer, primal: float, tol: float, **limits: Any
    ) -> OracleAnswer:
        missed.append((measured[0], 1 - answer.dual / primal))
        return answer

    network = ColumnGeneration().solve(hard_problem(), tol=0.3).network
    monkeypatch.setattr(ColumnGeneration, "_measure", counted)
    monkeypatch.setattr(ColumnGeneration, "_correct", lambda *_: False)
    monkeypatch.setattr(PolynomialProblem, "repair", hopeless)
    monkeypatch.setattr(column_generation, "_REPAIR_MEDIAN", math.inf)
    with pytest.warns(ConvergenceWarning, match="max_iter"):
        ColumnGeneration(max_iterations=12).solve(hard_problem(), tol=TOL, start=network)
    _, (first, gap), *later = missed  # the start's own comes first
    wait = math.floor(math.log(gap / TOL, column_generation._REPAIR_PACE))
    assert wait >= 2 and len(later) >= 2
    assert [at for at, _ in later] == [first + (1 + wait) * k for k in range(1, 1 + len(later))]


def test_the_wait_outlives_an_interruption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a solve goes on from its checkpoint, repairs that help nothing are asked for as if it never had stopped."""
    asked: list[float] = []
    monkeypatch.setattr(
        PolynomialProblem,
        "repair",
        lambda self, rows, packed, answer, *_, **limits: (asked.append(answer.dual), answer)[1],
    )
    monkeypatch.setattr(column_generation, "_REPAIR_MEDIAN", math.inf)
    monkeypatch.setattr(column_generation, "_REPAIR_WORST", 0.0)
    x, y = clusters(300, 24, 4)

    def fit(**settings: Any) -> ConvexRobustHead:
        return ConvexRobustHead(24, 4, radius=2.0, reg=0.005).double().fit(x, y, tol=0.03, **settings)

    iterations = fit().result_.iterations
    straight = list(asked)
    assert 1 <= len(straight) < iterations - 1
    for stop in range(1, iterations - 1):
        asked.clear()
        path = tmp_path / str(stop)
        with pytest.warns(ConvergenceWarning, match="interrupted"):
            fit(checkpoint=path, callback=lambda line, at=stop: line.iteration >= at)
        fit(checkpoint=path)
        assert asked == straight
