"""ReLU and gated ReLU: problems, solvers against each other, bounds against brute force."""

from __future__ import annotations

import math
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_iris
from torch import Tensor

from convex_head import errors
from convex_head.adversary.gates import GatedGeometry, ReluGeometry
from convex_head.problems.gated_relu import GatedReluProblem
from convex_head.problems.gates import GateNetwork, GateProblem
from convex_head.problems.patterns import sample_gates, with_constant
from convex_head.problems.relu import FEASIBLE, ReluProblem
from convex_head.solvers import get_solver
from convex_head.solvers.cone_projection import into_cones
from convex_head.solvers.group_descent import GroupDescent


def iris(n: int = 45) -> tuple[Tensor, Tensor]:
    features, labels = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(150)[:n]
    features = (features - features.mean(0)) / features.std(0)
    return torch.tensor(features[order]), torch.tensor(labels[order])


def problem(kind: str, classes: int = 3, n: int = 45, patterns: int = 5, **changes: Any) -> GateProblem:
    x, y = iris(n)
    gates = sample_gates(x, patterns, 0)
    options: dict[str, Any] = {"num_classes": classes, "radius": 0.3, "reg": 0.02, "loss": "crammer_singer"} | changes
    labels = y if classes == 3 else (y > 0).long()
    if kind.startswith("relu"):
        return ReluProblem(x, labels, gates, slack=float(kind.split()[1]), **options)
    return GatedReluProblem(x, labels, gates, flips=kind, **options)


def random_network(of: GateProblem, seed: int = 0) -> GateNetwork:
    generator = torch.Generator().manual_seed(seed)
    return GateNetwork(of.gates, 0.3 * torch.randn(of.shape, generator=generator, dtype=torch.float64))


# -- patterns -----------------------------------------------------------------------------------------------------


def test_patterns_are_distinct_active_and_seeded() -> None:
    x, _ = iris()
    gates = sample_gates(x, 12, 3)
    on = with_constant(x) @ gates.mT >= 0
    assert len(gates) == 13 and bool(on[:, 0].all()) and bool(on.any(0).all())
    assert len(torch.unique(on, dim=1).T) == len(gates)
    assert torch.equal(gates, sample_gates(x, 12, 3)) and not torch.equal(gates, sample_gates(x, 12, 4))
    torch.testing.assert_close(gates.norm(dim=1), torch.ones(13, dtype=torch.float64))
    # Two points have four patterns, one of them dead and one that of the constant.
    assert len(sample_gates(x[:2], 50, 0)) <= 4


def test_patterns_that_no_example_activates() -> None:
    class Nowhere(torch.Tensor):
        pass

    far = torch.full((3, 2), -1e9, dtype=torch.float64)
    found = sample_gates(far, 3, 0)
    assert len(found) >= 1
    with pytest.raises(
        errors.SettingError, match="at least one pattern must be active for an example; found none among"
    ):
        # Only gates with both weights negative are on: seed 1 draws one gate ten times, and none is.
        seeds = [s for s in range(200) if not _alive(far, s)]
        sample_gates(far, 1, seeds[0])


def _alive(x: Tensor, seed: int) -> bool:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.cat([torch.randn(1, x.shape[1] + 1, generator=generator, dtype=torch.float64) for _ in range(10)])
    return bool((with_constant(x) @ drawn.mT >= 0).any())


# -- margins ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ball", ["l2", "linf"])
@pytest.mark.parametrize("kind", ["relu 1", "cover", "ignore"])
@pytest.mark.parametrize(("classes", "loss"), [(2, "crammer_singer"), (3, "multi_margin"), (3, "one_vs_rest")])
def test_margins_by_hand(kind: str, classes: int, loss: str, ball: str) -> None:
    p = problem(kind, classes, n=12, ball=ball, loss=loss)
    network = random_network(p)
    found = p.margins(network)
    theta = p.theta(network.vectors)
    r, order = p.radius, 1 if ball == "linf" else 2

    def dual(v: Tensor) -> float:
        return float(torch.linalg.vector_norm(v[:-1], order))

    for i in range(p.n):
        y, x = int(p.labels[i]), p.x[i]
        if classes == 2:
            forms = [(2 * y - 1) * theta[:, 0]]
        elif loss == "one_vs_rest":
            forms = [(1 if c == y else -1) * theta[:, c] for c in range(3)]
        else:
            forms = [theta[:, y] - theta[:, c] for c in range(3) if c != y]
        for k, form in enumerate(forms):
            total, lost = torch.zeros_like(x), 0.0
            for gate, part in zip(p.gates, form, strict=True):
                score = float(gate @ x)
                if kind == "cover" and abs(score) <= r * dual(gate):
                    lost += min(0.0, float(part @ x) - r * dual(part))
                elif score >= 0:
                    total = total + part
            assert float(found[i, k]) == pytest.approx(float(total @ x) - r * dual(total) + lost, abs=1e-10)


@pytest.mark.parametrize("kind", ["relu 2", "cover", "ignore"])
@pytest.mark.parametrize(
    ("classes", "loss", "ball"),
    [(3, "crammer_singer", "l2"), (3, "multi_margin", "linf"), (3, "one_vs_rest", "l2"), (2, "crammer_singer", "linf")],
)
def test_gradient_and_bound_of_the_smoothed_problem(kind: str, classes: int, loss: str, ball: str) -> None:
    p = problem(kind, classes, loss=loss, ball=ball)
    v = random_network(p).vectors
    centre = p.centre()
    for _ in range(2):
        found, centre_next = p.evaluate(v, 0.3, 0.3, centre)
        direction = torch.randn(p.shape, dtype=torch.float64)
        h = 1e-5
        ahead, behind = (p.evaluate(v + s * h * direction, 0.3, 0.3, centre)[0].smooth for s in (1, -1))
        norms = [p.reg * float((v + s * h * direction).norm(dim=-1).sum()) for s in (1, -1)]
        slope = (ahead - behind - norms[0] + norms[1]) / (2 * h)
        assert slope == pytest.approx(float((found.gradient * direction).sum()), rel=1e-4)
        assert found.primal == pytest.approx(p.objective(GateNetwork(p.gates, v)), rel=1e-10)
        assert found.smooth <= found.primal + 1e-12
        centre = centre_next
    optimum = get_solver("socp", ("socp",)).solve(p, tol=1e-4).primal
    assert found.dual <= optimum <= found.primal


@pytest.mark.parametrize("kind", ["relu 2", "cover", "ignore"])
def test_a_restricted_problem_is_the_problem_with_zeros(kind: str) -> None:
    p = problem(kind, n=30)
    groups = torch.tensor([[1, 2], [0, 0], [p.shape[0] - 1, 1], [1, 0]])
    packed = torch.randn(4, p.d + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    vectors = torch.zeros(p.shape, dtype=torch.float64)
    vectors[groups[:, 0], groups[:, 1]] = packed
    part = p.restricted(groups)
    inside, whole = part.evaluate(packed, 0.3, 0.1, part.centre())[0], p.evaluate(vectors, 0.3, 0.1, p.centre())[0]
    assert inside.primal == pytest.approx(whole.primal, rel=1e-12)
    torch.testing.assert_close(inside.gradient, whole.gradient[groups[:, 0], groups[:, 1]])


@pytest.mark.parametrize("ball", ["l2", "linf"])
def test_support_against_the_cone_program(ball: str) -> None:
    p = problem("relu 0.7", n=20, patterns=3, ball=ball)
    moments = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).flatten(0, 1)
    sizes, _ = p.support(moments, 0.0)
    sides, order = torch.cat([2 * p.on - 1] * 2, dim=1).numpy(), 1 if ball == "linf" else 2
    for row in range(0, len(moments), 5):
        v = cp.Variable(p.d + 1)
        short = p.radius * cp.norm(v[:-1], order) - cp.multiply(sides[:, row // 3], p.x.numpy() @ v)
        value = moments[row].numpy() @ v - 0.7 / p.n * cp.sum(cp.pos(short))
        exact = cp.Problem(cp.Maximize(value), [cp.norm(v) <= 1]).solve(solver="CLARABEL")
        assert exact * (1 - 1e-6) <= float(sizes[row]) <= 1.01 * exact


# -- solvers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "classes", "loss", "ball"),
    [
        ("relu 1", 2, "crammer_singer", "l2"),
        ("relu 0.3", 2, "multi_margin", "linf"),
        ("relu 1", 3, "crammer_singer", "l2"),
        ("relu 0.1", 3, "multi_margin", "l2"),
        ("relu 1", 3, "crammer_singer", "linf"),
        ("cover", 3, "multi_margin", "linf"),
        ("cover", 3, "crammer_singer", "l2"),
        ("ignore", 3, "one_vs_rest", "linf"),
        ("cover", 2, "crammer_singer", "l2"),
        ("ignore", 3, "multi_margin", "l2"),
    ],
)
def test_torch_and_cone_program_agree(kind: str, classes: int, loss: str, ball: str) -> None:
    p = problem(kind, classes, loss=loss, ball=ball, n=40, patterns=4)
    exact = get_solver("socp", ("socp",)).solve(p, tol=1e-4)
    assert exact.converged
    found = GroupDescent().solve(p, tol=1e-3)
    assert found.converged and all(line.dual <= exact.primal * (1 + 1e-6) for line in found.history)
    assert found.primal == pytest.approx(exact.primal, rel=1e-3)
    assert found.dual <= exact.primal * (1 + 1e-6) and exact.dual <= found.primal * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["relu 0.5", "cover"])
def test_bounds_of_stages_in_single_precision_enclose_the_optimum(kind: str) -> None:
    p = problem(kind, n=30, patterns=4)
    exact = get_solver("socp", ("socp",)).solve(p, tol=1e-5)
    found = GroupDescent().solve(p, tol=2e-2)
    assert found.converged and found.primal == p.objective(found.network)
    for line in found.history:
        assert line.dual <= exact.primal and exact.dual <= line.primal


def test_mini_batches_start_near_the_optimum() -> None:
    p = problem("ignore", n=60)
    lines: list[Any] = []
    solver = GroupDescent(batch=20, epochs=40, batches_above=10)
    result = solver.solve(p, tol=1e-2, max_seconds=600, callbacks=(lines.append,))
    assert result.converged and solver.solve(p, tol=1e-2).primal == result.primal
    cold: list[Any] = []
    GroupDescent().solve(p, tol=1e-2, callbacks=(cold.append,))
    assert lines[1].primal < cold[1].primal
    exact = get_solver("socp", ("socp",)).solve(p, tol=1e-4)
    close = solver.solve(p, tol=1e-3)
    assert close.converged and close.primal == pytest.approx(exact.primal, rel=1e-3)


@pytest.mark.parametrize(
    ("classes", "loss", "ball"),
    [(3, "crammer_singer", "l2"), (3, "multi_margin", "linf"), (2, "crammer_singer", "l2")],
)
def test_hard_constraints_make_the_network_the_convex_model(classes: int, loss: str, ball: str) -> None:
    p = problem("relu inf", classes, n=16, patterns=8, radius=0.1 if ball == "l2" else 0.05, loss=loss, ball=ball)
    assert isinstance(p, ReluProblem)
    result = get_solver("socp", ("socp",)).solve(p, tol=1e-3)
    network = result.network
    # One class of iris against the rest is linearly separable: the gate that is always on is enough.
    assert result.converged and bool(network.vectors[1:9].any()) == (classes == 3)
    assert p.violations(network)[1] <= FEASIBLE
    torch.testing.assert_close(p.values(network), p.network_values(network), atol=FEASIBLE * network.size, rtol=0)
    by_penalty = GroupDescent().solve(p, tol=1e-3)
    assert by_penalty.converged and p.violations(by_penalty.network)[1] <= FEASIBLE
    assert by_penalty.primal == pytest.approx(result.primal, rel=1e-3) and by_penalty.dual <= result.primal * (1 + 1e-6)
    soft = problem("relu 0.05", classes, n=16, patterns=8, radius=0.1, loss=loss, ball=ball)
    loose = get_solver("socp", ("socp",)).solve(soft, tol=1e-3)
    assert isinstance(soft, ReluProblem) and (soft.violations(loose.network)[1] > 1e-3 or classes == 2)
    assert loose.primal <= result.primal


@pytest.mark.parametrize("ball", ["l2", "linf"])
def test_vectors_are_moved_to_the_nearest_point_of_their_cone(ball: str) -> None:
    p = problem("relu inf", n=16, patterns=8, radius=0.02, ball=ball)
    assert isinstance(p, ReluProblem)
    start = random_network(p)
    end = into_cones(p, start, lambda: False)
    before, after = p.largest_violations(start), p.largest_violations(end)
    assert float(before.max()) > 0.1 and float(after.max()) <= FEASIBLE
    assert float(before.max()) == p.violations(start)[1]
    # A point of a cone is nearest where what is left is orthogonal to it and at an obtuse angle to the whole cone.
    left = start.vectors - end.vectors
    scale = float(start.vectors.norm(dim=-1).max())
    assert float((left * end.vectors).sum(-1).abs().max()) <= 1e-3 * scale**2
    inside = into_cones(p, random_network(p, seed=7), lambda: False).vectors
    assert bool(inside[1:8].any()) and float((left * inside).sum(-1).max()) <= 1e-3 * scale**2
    again = into_cones(p, end, lambda: False)
    assert torch.equal(again.vectors, end.vectors)
    assert torch.equal(into_cones(p, start, lambda: True).vectors, start.vectors)


def test_hard_constraints_that_leave_nothing_are_named() -> None:
    p = problem("relu inf", n=150, patterns=3, radius=1.0)
    with pytest.raises(errors.InfeasibleError, match=r"found v = 0 as the only solution for all 3 .* Use slack=1"):
        get_solver("socp", ("socp",)).solve(p)
    with pytest.raises(errors.InfeasibleError, match="found v = 0 as the only solution for all 3"):
        GroupDescent().solve(p, max_seconds=2)
    outside = random_network(p)
    assert p.objective(outside) == math.inf and p.objective(p.zero()) == 1.0


# -- bounds -------------------------------------------------------------------------------------------------------


def geometry(kind: str, classes: int, seed: int, ball: str) -> ReluGeometry | GatedGeometry:
    generator = torch.Generator().manual_seed(seed)
    functions = 1 if classes == 2 else classes
    if kind == "relu":
        directions = torch.randn(functions, 6, 3, generator=generator, dtype=torch.float64)
        return ReluGeometry(directions, torch.randn(functions, 6, generator=generator).double(), classes, ball)
    gates = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    theta = torch.randn(5, functions, 3, generator=generator, dtype=torch.float64)
    return GatedGeometry(gates, theta, classes, ball)


def grid_of_ball(radius: float, ball: str) -> Tensor:
    line = torch.linspace(-radius, radius, 61, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    return points if ball == "linf" else points[points.norm(dim=1) <= radius]


@settings(max_examples=20)
@given(
    st.sampled_from(["relu", "gated"]),
    st.sampled_from([2, 3]),
    st.integers(0, 10**6),
    st.sampled_from(["l2", "linf"]),
    st.floats(0.01, 1.5),
)
def test_bound_truth_attack_in_order(kind: str, classes: int, seed: int, ball: str, radius: float) -> None:
    g = geometry(kind, classes, seed, ball)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (6,), generator=generator)
    bound = g.worst_case_margin(x, labels, radius)
    around = grid_of_ball(radius, ball)
    points = (x[:, None] + around).flatten(0, 1)
    margins = g.worst_case_margin(points, labels.repeat_interleave(len(around)), 0.0).view(6, -1)
    worst = g.worst_case_point(x, labels, radius)
    step = (worst - x).norm(dim=1) if ball == "l2" else (worst - x).abs().amax(1)
    attack = g.worst_case_margin(worst, labels, 0.0)
    clean = g.worst_case_margin(x, labels, 0.0)
    assert bool((step <= radius * (1 + 1e-9)).all())
    assert bool((bound <= margins.amin(1) + 1e-9).all()) and bool((bound <= attack + 1e-9).all())
    assert bool((attack <= clean + 1e-12).all())
    # Descent is no worse than half of what the grid finds.
    assert bool((attack <= clean - 0.5 * (clean - margins.amin(1)) + 1e-9).float().mean() >= 0.5)
    # Inside the certified distance nothing changes the label; at a wrong point it is zero.
    distance = g.distance_to_boundary(x, labels)
    assert bool((distance[clean <= 0] == 0).all()) and bool((distance[clean > 0] > 0).all())
    shrunk = x[:, None] + distance.clamp_max(1e3)[:, None, None] * (1 - 1e-9) * around / radius
    inside = g.worst_case_margin(shrunk.flatten(0, 1), labels.repeat_interleave(len(around)), 0.0).view(6, -1)
    assert bool((inside.amin(1) > 0)[clean > 0].all())


@pytest.mark.parametrize("classes", [2, 3])
def test_bounds_are_tight_where_nothing_changes_sign(classes: int) -> None:
    for kind in ("relu", "gated"):
        g = geometry(kind, classes, 5, "l2")
        x = torch.randn(200, 2, dtype=torch.float64) * 3
        labels = torch.arange(200) % classes
        rows = g.directions.flatten(0, 1) if isinstance(g, ReluGeometry) else g.gates
        stable = ((with_constant(x) @ rows.mT).abs() > 0.05 * rows[:, :-1].norm(dim=1)).all(1)
        assert int(stable.sum()) > 20
        bound = g.worst_case_margin(x, labels, 0.05)
        attack = g.worst_case_margin(g.worst_case_point(x, labels, 0.05), labels, 0.0)
        torch.testing.assert_close(bound[stable], attack[stable], atol=1e-6, rtol=0)


def test_a_flip_beats_the_published_margin_and_not_ours() -> None:
    """One gate that is off at the point and switches on a bad part inside the ball."""
    x, y = torch.tensor([[0.0, -0.1], [0.0, 2.0]], dtype=torch.float64), torch.tensor([1, 0])
    gates = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    theta = torch.tensor([[[0.0, 0.0, 0.5]], [[0.0, -3.0, -1.0]]], dtype=torch.float64)
    options: dict[str, Any] = {"num_classes": 2, "radius": 0.3, "reg": 0.1, "loss": "crammer_singer"}
    network = GateNetwork(gates, theta)
    seed_margin = GatedReluProblem(x, y, gates, flips="ignore", **options).margins(network)[0]
    ours = GatedReluProblem(x, y, gates, flips="cover", **options).margins(network)[0]
    g = GatedGeometry(gates, theta, 2, "l2")
    point = x[:1] + torch.tensor([[0.0, 0.25]], dtype=torch.float64)
    found = g.worst_case_margin(point, y[:1], 0.0)
    assert float(seed_margin) == 0.5 and float(found) == pytest.approx(0.5 - 1.0 - 0.45)
    assert float(ours) <= float(found) < 0 < float(seed_margin)
    assert float(g.worst_case_margin(x[:1], y[:1], 0.3)) == pytest.approx(float(ours))
