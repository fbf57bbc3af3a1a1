"""Smoothing that is centred on multipliers: its value, its gradient, its bound, and what starts from it."""

from pathlib import Path
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from test_fused import PROBLEMS, evaluations, make, network

from convex_head import ConvexRobustHead
from convex_head.errors import ConvergenceWarning, StartError
from convex_head.problems import multipliers, polynomial
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers import column_generation, get_solver
from convex_head.solvers.column_generation import ColumnGeneration

cases = pytest.mark.parametrize(("classes", "loss"), PROBLEMS, ids=[f"{c}-{l}" for c, l in PROBLEMS])


def centred(problem: PolynomialProblem, seed: int = 1) -> torch.Tensor:
    """Multipliers of another network than the one that is looked at: some 0, some 1, some between."""
    other = problem.pack(network(problem.d, problem.num_functions, 12, seed))
    slopes = problem.dual_point(other, 5.0).slopes
    assert slopes is not None and bool(((slopes > 0) & (slopes < 1)).any())
    return slopes


@cases
def test_the_value_is_that_of_its_definition(classes: int, loss: str) -> None:
    """max_s <s, 1 - w> - mu/2 |s - c|^2 over the slopes of the loss, by a conic solver."""
    problem, mu = make(9, 4, classes, loss), 0.3
    net = network(4, problem.num_functions, 12)
    centre = problem.all_multipliers(centred(problem)).numpy()
    margins = problem.worst_case(net)[0].numpy()
    joint = loss == "crammer_singer"
    share = 1.0 if joint else 1.0 / classes
    total = 0.0
    for w, c in zip(margins, centre, strict=True):
        s = cp.Variable(len(w), nonneg=True)
        limits = [cp.sum(s) <= 1] if joint else [s <= 1]
        value = cp.Maximize((1 - w) @ s - 0.5 * mu * cp.sum_squares(s - c))
        total += share * cp.Problem(value, limits).solve(solver="CLARABEL")
    packed = problem.pack(net)
    got = problem.evaluate(packed, mu, 0.0, torch.from_numpy(centre)[problem._rows.order])
    assert got.smoothed == pytest.approx(total / 9 + problem.reg * float(net.norm), rel=1e-6)
    assert np.isnan(got.hard)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["double", "single"])
@cases
def test_compiled_passes_have_it_too(classes: int, loss: str, dtype: torch.dtype, tol: float) -> None:
    problem = make(600, 6, classes, loss, dtype=dtype)
    packed, centre = problem.pack(network(6, problem.num_functions, 12)), centred(problem)
    for mu, blur in ((0.3, 0.05), (0.3, 0.0), (0.01, 0.05)):
        ours, theirs = evaluations(problem, packed, mu, blur, centre)
        assert ours.smoothed == pytest.approx(theirs.smoothed, rel=tol)
        scale = float(theirs.gradient.abs().max())
        torch.testing.assert_close(ours.gradient, theirs.gradient, rtol=0, atol=1000 * tol * scale)
        assert mu < 0.3 or ours.smoothed != pytest.approx(problem.evaluate(packed, mu, blur).smoothed, rel=1e-3)
    zero = torch.zeros_like(centre)
    plain = problem.evaluate(packed, 0.3, 0.05)
    with_zero = problem.evaluate(packed, 0.3, 0.05, zero)
    assert with_zero.smoothed == pytest.approx(plain.smoothed, rel=tol)


@cases
def test_gradient_by_differences(classes: int, loss: str) -> None:
    problem = make(40, 4, classes, loss)
    packed, centre = problem.pack(network(4, problem.num_functions, 8)), centred(problem)
    gradient = problem.evaluate(packed, 0.3, 0.05, centre).gradient
    step = torch.randn(packed.vectors.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step[packed.signs == 0] = 0
    up, down = (
        problem.evaluate(type(packed).of(packed.vectors + h * step, packed.signs), 0.3, 0.05, centre).smoothed
        for h in (1e-5, -1e-5)
    )
    assert (up - down) / 2e-5 == pytest.approx(float((gradient * step).sum()), rel=1e-5, abs=1e-7)


@cases
def test_bounds_are_bounds_and_what_smoothing_keeps_open_vanishes(classes: int, loss: str) -> None:
    """At one width, with the slopes of each minimum as the next centre; without a centre the width keeps it open."""
    problem, mu = make(60, 4, classes, loss), 0.3
    optimum = ColumnGeneration().solve(problem, tol=1e-4)
    packed = problem.pack(optimum.network)
    plain = problem.dual_point(packed, mu)
    assert problem.oracle(problem.dual_point(packed, mu, 0.0, centred(problem)).point).dual <= optimum.primal
    centre, opened = None, [plain.smoothing]
    for _ in range(6):
        report = problem.dual_point(packed, mu, 0.0, centre)
        assert problem.oracle(report.point).dual <= optimum.primal * (1 + 1e-12)
        centre = report.slopes
        opened.append(report.smoothing)
    assert opened[-1] < 0.3 * opened[0]


def test_a_path_goes_on_from_results() -> None:
    first = ColumnGeneration().solve(make(80, 5, 3, "crammer_singer"), tol=3e-3)
    assert first.multipliers is not None and first.multipliers.slopes.shape == (80, 2)
    passes = {}
    for name, start in (("cold", None), ("network", first.network), ("result", first)):
        further = ColumnGeneration().solve(make(80, 5, 3, "crammer_singer", radius=0.45), tol=3e-3, start=start)
        assert further.converged
        passes[name] = further.extra["evaluations"]
    assert passes["result"] < 0.6 * passes["cold"] and passes["network"] < passes["cold"]
    # The start counts, however little time there is.
    with pytest.warns(ConvergenceWarning, match="max_time"):
        short = ColumnGeneration().solve(make(80, 5, 3, "crammer_singer"), tol=1e-6, max_seconds=1e-6, start=first)
    assert short.primal <= first.primal * (1 + 1e-9) and short.multipliers is not first.multipliers
    with pytest.warns(ConvergenceWarning, match="penalty"):
        penalty = get_solver("penalty").solve(make(80, 5, 3, "one_vs_rest"), tol=0.5, start=first, max_seconds=2)
    assert penalty.multipliers is None
    # Multipliers of other examples are of no use, as many as they may be; the network is.
    same = make(80, 5, 3, "crammer_singer", radius=0.1)
    turned = PolynomialProblem(-same.features, same.labels, num_classes=3, radius=0.4, reg=0.02)
    assert not turned.takes(first.multipliers) and same.takes(first.multipliers)
    other = ColumnGeneration().solve(make(60, 5, 3, "crammer_singer"), tol=3e-3, start=first)
    alone = ColumnGeneration().solve(make(60, 5, 3, "crammer_singer"), tol=3e-3, start=first.network)
    assert other.converged and other.extra["evaluations"] == alone.extra["evaluations"]


def test_heads_start_from_results(tmp_path: Path) -> None:
    problem = make(80, 5, 3, "crammer_singer")
    x, y = problem.features, problem.labels
    head = ConvexRobustHead(5, 3, radius=0.4, reg=0.02).fit(x, y, tol=3e-3)
    assert head.result_ is not None
    warm, cold = (
        ConvexRobustHead(5, 3, radius=0.45, reg=0.02).fit(x, y, tol=3e-3, start=start).result_
        for start in (head.result_, None)
    )
    assert warm is not None and cold is not None and warm.converged
    assert warm.primal == pytest.approx(cold.primal, rel=3e-3)
    assert warm.extra["evaluations"] < cold.extra["evaluations"]
    loaded = ConvexRobustHead.load(head.save(tmp_path / "head.safetensors"))
    with pytest.raises(StartError, match="found a result without one"):
        ConvexRobustHead(5, 3).fit(x, y, start=loaded.result_)
    gated = ConvexRobustHead(5, 3, activation="gated_relu", patterns=4).fit(x, y, tol=0.5)
    with pytest.raises(StartError, match="found a GateNetwork"):
        ConvexRobustHead(5, 3).fit(x, y, start=gated.result_)
    with pytest.raises(StartError, match="must be a network on gates; found a Network"):
        ConvexRobustHead(5, 3, activation="gated_relu", patterns=4).fit(x, y, start=head.result_)


def test_ctrl_c_while_samples_have_a_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    """The centre of a sample's rows is none for all rows."""
    monkeypatch.setattr(column_generation, "_FIRST_SAMPLE", 200)
    monkeypatch.setattr(column_generation, "_SAMPLE_TOL", 1e-3)
    problem, calls = make(900, 5, 3, "crammer_singer"), []
    correct = ColumnGeneration._correct

    def interrupted(self: Any, part: Any, state: Any, run: Any, most: int) -> bool:
        calls.append(state.centre is not None)
        if calls[-1]:
            raise KeyboardInterrupt
        return correct(self, part, state, run, most)

    monkeypatch.setattr(ColumnGeneration, "_correct", interrupted)
    with pytest.warns(ConvergenceWarning, match="interrupted"):
        result = ColumnGeneration().solve(problem, tol=1e-3)
    assert calls == [False, True] and result.status == "interrupted" and 0 < result.gap < 1


def test_without_room_for_them_solves_go_on_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    assert multipliers.fits(1_000_000, 9) and not multipliers.fits(1_280_000, 999)
    monkeypatch.setattr(polynomial, "fits", lambda *_: False)
    problem = make(60, 4, 3, "crammer_singer")
    assert problem.dual_point(problem.pack(network(4, 3, 6)), 0.3).slopes is None
    result = ColumnGeneration().solve(problem, tol=1e-2)
    assert result.converged and result.multipliers is None
    warm: Any = ColumnGeneration().solve(problem, tol=1e-2, start=result)
    assert warm.converged
