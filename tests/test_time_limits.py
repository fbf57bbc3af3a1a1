"""Time limits: searches end early enough that the last bound fits into the limit, whatever it costs."""

import math
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from repair_cases import clusters

from convex_head.errors import ConvergenceWarning
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers import base, column_generation
from convex_head.solvers.base import Run
from convex_head.solvers.column_generation import ColumnGeneration
from convex_head.solvers.result import SolveResult, Status

PASS, LIMIT = 100.0, 10_000.0


class Clock:
    """Real time, and as many seconds more as the test says that something takes; ``repairs`` (late, began, ended)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, repair_seconds: float, pass_seconds: float = PASS):
        self.more, self.began, self.repairs = 0.0, time.perf_counter(), []
        evaluate, repair, clock = PolynomialProblem.evaluate, PolynomialProblem.repair, self

        def slow(problem: PolynomialProblem, *args: Any) -> Any:
            clock.more += pass_seconds
            return evaluate(problem, *args)

        def dear(problem: PolynomialProblem, *args: Any, late: bool, until: float) -> Any:
            assert until == pytest.approx(clock.began + LIMIT, abs=100)
            began = clock.seconds()
            found = repair(problem, *args, late=late, until=until)
            clock.more += repair_seconds
            clock.repairs.append((late, began, clock.seconds()))
            return found

        monkeypatch.setattr(PolynomialProblem, "evaluate", slow)
        monkeypatch.setattr(PolynomialProblem, "repair", dear)
        for module in (base, column_generation):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + self.more))

    def seconds(self) -> float:
        return time.perf_counter() + self.more - self.began


def solve(
    loss: str = "crammer_singer", rows: int = 200, solver: ColumnGeneration | None = None, **settings: Any
) -> SolveResult:
    settings = {"tol": 1e-7, "max_seconds": LIMIT} | settings
    x, y = clusters(rows, 12, 4)
    problem = PolynomialProblem(x, y, num_classes=4, radius=1.0, reg=0.002, loss=loss)
    is_limited = settings["max_seconds"] is not None
    with pytest.warns(ConvergenceWarning, match="max_time") if is_limited else nullcontext():
        return (solver or ColumnGeneration()).solve(problem, **settings)


def test_the_last_bound_fits_into_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is known of its cost a fifth of the limit is kept, then twice what the last one took."""
    clock = Clock(monkeypatch, repair_seconds=300.0)
    result = solve()
    late = [(began, ended) for is_late, began, ended in clock.repairs if is_late]
    assert late[0][0] == pytest.approx(0.8 * LIMIT, abs=PASS + 20)
    assert late[-1][0] == pytest.approx(LIMIT - 600, abs=PASS + 20)
    assert late[-1][1] <= clock.seconds() <= LIMIT
    assert len(late) <= 3 and result.status is Status.MAX_TIME and 0 < result.dual <= result.primal


def test_cheap_bounds_leave_the_limit_to_the_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, repair_seconds=0.0)
    solve()
    assert LIMIT - PASS - 20 <= clock.seconds() <= LIMIT + PASS + 20


def test_a_dear_bound_takes_a_fifth_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, repair_seconds=0.3 * LIMIT)
    solve()
    began = [began for is_late, began, _ in clock.repairs if is_late]
    assert began == [pytest.approx(0.8 * LIMIT, abs=PASS + 20)]


def test_losses_without_repairs_keep_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, repair_seconds=0.0)
    solve("one_vs_rest")
    assert not clock.repairs and LIMIT - PASS - 20 <= clock.seconds() <= LIMIT + PASS + 20


def test_samples_repair_nothing_late_and_leave_the_last_bound_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All the time goes into a sample here."""
    monkeypatch.setattr(column_generation, "_FIRST_SAMPLE", 40)
    monkeypatch.setattr(column_generation, "_SAMPLE_OF_FUNCTION", 1)
    monkeypatch.setattr(column_generation, "_SAMPLE_EVALUATIONS", 10**6)
    monkeypatch.setattr(column_generation, "_SAMPLE_ITERATIONS", 10**6)
    monkeypatch.setattr(column_generation, "_SAMPLE_TOL", 1e-9)
    asked: list[tuple[int, bool, float]] = []
    clock = Clock(monkeypatch, repair_seconds=0.0)
    measure = ColumnGeneration._measure

    def noted(self: ColumnGeneration, problem: Any, state: Any, run: Run) -> Any:
        began = clock.seconds()
        found = measure(self, problem, state, run)
        asked.append((problem.n, run.is_late, began))
        return found

    monkeypatch.setattr(ColumnGeneration, "_measure", noted)
    solve(rows=120)
    sampled, whole = ([line[1:] for line in asked if line[0] == n] for n in (40, 120))
    assert sampled and not any(late for late, _ in sampled)
    late, began = whole[0]
    assert late and began == pytest.approx(0.8 * LIMIT, abs=2 * PASS + 20)
    assert clock.seconds() >= LIMIT - PASS - 20  # what the first bound has left is used


def test_a_limit_that_passes_in_a_callback_still_has_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, repair_seconds=0.0)

    def dawdle(_: Any) -> None:
        clock.more += 0.3 * LIMIT

    solve(callbacks=(dawdle,))
    assert clock.repairs[-1][0]


def test_a_search_that_the_clock_cut_off_is_no_matter_of_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, repair_seconds=0.0)
    assert solve(solver=ColumnGeneration(max_iterations=1)).status is Status.MAX_TIME


def test_a_checkpoint_of_a_limited_run_is_gone_on_from_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing that the clock cut off is kept, here of the second search, but the iteration before it is."""
    straight, path = solve(tol=1e-3, max_seconds=None), tmp_path / "state"
    with monkeypatch.context() as patched:
        clock = Clock(patched, repair_seconds=0.0, pass_seconds=15.0)
        limited = solve(tol=1e-3, checkpoint=path)
    late = [began for is_late, began, _ in clock.repairs if is_late]
    assert path.exists() and late and limited.history[0].primal == straight.history[0].primal
    resumed = solve(tol=1e-3, max_seconds=None, checkpoint=path)
    # All of a history but its seconds.
    ours, theirs = ([replace(line, seconds=0.0) for line in result.history] for result in (resumed, straight))
    assert ours == theirs and resumed.extra == straight.extra and resumed.dual == straight.dual


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.int64])
def test_limits_may_be_numbers_of_numpy(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """Which would take the clock into their own precision."""
    x, y = clusters(60, 6, 3)
    problem = PolynomialProblem(x, y, num_classes=3, radius=0.3, reg=0.05)
    seen: list[Run] = []
    algorithm = ColumnGeneration._solve
    monkeypatch.setattr(ColumnGeneration, "_solve", lambda self, *args: (seen.append(args[1]), algorithm(self, *args)))
    ColumnGeneration().solve(problem, tol=0.05, max_seconds=kind(30))
    assert type(seen[0].deadline) is float and seen[0].deadline == seen[0].began + 30


def test_a_run_keeps_back_what_it_is_told() -> None:
    run = Run(1e-2, 50.0, (), 0)
    assert run.reserve == 0.0 and run.deadline == run.began + 50.0
    run.keep_back()
    assert run.reserve == 10.0 and run.trial(0.1).deadline == pytest.approx(run.began + 40.0)
    assert not run.trial(0.1).is_whole and run.is_whole
    run.keep_back(3.0)
    assert run.reserve == 3.0
    endless = Run(1e-2, None, (), 0)
    endless.keep_back(3.0)
    assert endless.reserve == 0.0 and endless.deadline == math.inf and not endless.out_of_time()
    assert endless.trial(0.1).max_seconds is None


@pytest.mark.parametrize(("many", "share"), [(3, 1 / 3), (4, 0.2)])
def test_of_many_functions_more_is_kept(monkeypatch: pytest.MonkeyPatch, many: int, share: float) -> None:
    """Four functions here, more than ``many`` or not."""
    monkeypatch.setattr(column_generation, "_MANY", many)
    clock = Clock(monkeypatch, repair_seconds=0.4 * LIMIT)
    solve()
    began = [began for is_late, began, _ in clock.repairs if is_late]
    assert began == [pytest.approx((1 - share) * LIMIT, abs=PASS + 20)]
