"""Limited-memory BFGS: the minimum of a quadratic, and values that are known up to rounding only."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from convex_head.solvers import curvature
from convex_head.solvers.lbfgs import Corrections, minimise

SCALES = torch.logspace(0, 3, 30, dtype=torch.float64)
ROUNDING = 1e-5


def search(rounding: float, noise: float) -> tuple[float, int]:
    """Norm of the gradient that is reached on 1 + a quadratic whose values have an error, and evaluations."""
    gradients = []

    def objective(x: Tensor) -> tuple[float, Tensor]:
        value = 1 + 0.5 * float((SCALES * x.square()).sum())
        return value + rounding * math.sin(1e9 * float(x.sum())), SCALES * x

    def converged(x: Tensor, gradient: Tensor) -> bool:
        gradients.append(float(gradient.norm()))
        return gradients[-1] < 1e-6

    start = torch.ones(30, dtype=torch.float64)
    settings = {"stop": lambda: False, "metric": lambda x: x, "max_evaluations": 500, "noise": noise}
    _, evaluations = minimise(objective, start, converged=converged, **settings)
    return min(gradients), evaluations


def test_a_quadratic_is_minimised() -> None:
    size, evaluations = search(0.0, 0.0)
    assert size < 1e-6 and evaluations < 100


@pytest.mark.parametrize("noise", [1.0, 10.0])
def test_steps_too_small_for_the_values_are_judged_by_slopes(noise: float) -> None:
    stuck, _ = search(ROUNDING, 0.0)
    assert stuck > 1e-4
    size, evaluations = search(ROUNDING, noise * ROUNDING)
    assert size < 1e-6 and evaluations < 100


def test_values_do_not_drift_upwards_by_rounding() -> None:
    """Slopes that go on asking for more are believed no further than rounding, counted from the lowest value."""
    values: dict[float, float] = {}
    accepted: list[float] = []

    def objective(x: Tensor) -> tuple[float, Tensor]:
        values[float(x)] = 1 + 1e-7 * len(values)
        return values[float(x)], torch.full_like(x, 0.99 ** len(values))

    def converged(x: Tensor, gradient: Tensor) -> bool:
        accepted.append(values[float(x)])
        return False

    settings = {"stop": lambda: False, "metric": lambda x: x, "max_evaluations": 400, "noise": 1e-6}
    minimise(objective, torch.zeros(1, dtype=torch.float64), converged=converged, **settings)
    assert len(accepted) > 10 and max(accepted) <= 1 + 2.1e-6


def test_a_search_whose_gradients_are_rounding_ends() -> None:
    generator = torch.Generator().manual_seed(0)

    def objective(x: Tensor) -> tuple[float, Tensor]:
        return 1.0, torch.randn(30, generator=generator, dtype=torch.float64)

    settings = {"stop": lambda: False, "metric": lambda x: x, "max_evaluations": 1000, "noise": 1e-6}
    start = torch.zeros(30, dtype=torch.float64)
    _, evaluations = minimise(objective, start, converged=lambda *_: False, **settings)
    assert evaluations < 500


def test_a_step_that_overshoots_within_rounding_is_shortened() -> None:
    """Its value is no reason to refuse it, its slope is: no point beyond the mirror image of the start is kept."""
    kept: list[float] = []

    def objective(x: Tensor) -> tuple[float, Tensor]:
        return 1 + 0.5e-12 * float(x**2), 1e-12 * x

    def converged(x: Tensor, gradient: Tensor) -> bool:
        kept.append(abs(float(x)))
        return kept[-1] < 1e-3

    settings = {"stop": lambda: False, "metric": lambda x: 3e12 * x, "max_evaluations": 30, "noise": 1e-6}
    start = torch.ones(1, dtype=torch.float64)
    # A pair of another function: without one the first step is as long as the value, not as the metric.
    pairs = Corrections()
    pairs.append(torch.ones(1), torch.full((1,), 1e-12 / 3))
    minimise(objective, start, converged=converged, pairs=pairs, **settings)
    assert max(kept) == 1 and kept[-1] < 1e-3


def two_loop(gradient: Tensor, pairs: list[tuple[Tensor, Tensor]], metric: Tensor) -> Tensor:
    """The recursion of the textbook (J. Nocedal and S. Wright, 2006, algorithm 7.4)."""
    q, coefficients = -gradient, []
    for step, change in reversed(pairs):
        coefficients.append((step * q).sum() / (step * change).sum())
        q = q - coefficients[-1] * change
    step, change = pairs[-1]
    q = metric * q * ((step * change).sum() / (change * metric * change).sum())
    for (step, change), coefficient in zip(pairs, reversed(coefficients), strict=True):
        q = q + (coefficient - (change * q).sum() / (step * change).sum()) * step
    return q


@pytest.mark.parametrize("count", [1, 5, 9, 23])
def test_directions_are_those_of_the_two_loop_recursion(count: int) -> None:
    """With fewer pairs than are kept, and with more, of which the oldest go."""
    generator = torch.Generator().manual_seed(count)
    shape, memory = (3, 10), 9
    metric = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    kept = Corrections(memory)
    pairs = []
    for _ in range(count):
        step = torch.randn(shape, generator=generator, dtype=torch.float64)
        change = step * (metric + 0.3) + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
        kept.append(step, change)
        kept.append(step, -change)  # no positive curvature: not kept
        pairs.append((step, change))
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = kept.direction(gradient, lambda x: metric * x)
    torch.testing.assert_close(found, two_loop(gradient, pairs[-memory:], metric), rtol=1e-10, atol=1e-12)
    assert len(kept) == min(count, memory)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(kept, pairs[-memory:], strict=True))


def test_pairs_in_single_precision_give_nearly_the_same_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, 3, 40, dtype=torch.float64)
    double, single = Corrections(), Corrections(dtype=torch.float32)
    for _ in range(30):
        step = torch.randn(40, generator=generator, dtype=torch.float64)
        double.append(step, scale * step)
        single.append(step, scale * step)
    gradient = torch.randn(40, generator=generator, dtype=torch.float64)
    found = single.direction(gradient, lambda x: x)
    assert all(step.dtype == change.dtype == torch.float32 for step, change in single) and len(single) == 30
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, double.direction(gradient, lambda x: x), rtol=1e-3, atol=1e-4)


def test_curvature_within_the_rounding_of_single_precision_is_none() -> None:
    generator = torch.Generator().manual_seed(0)
    single, double = Corrections(dtype=torch.float32), Corrections()
    for _ in range(50):
        step, other = (torch.randn(20_000, generator=generator, dtype=torch.float64) for _ in range(2))
        other -= (other @ step / step.square().sum()) * step
        for share in (-1e-9, 1e-9):
            single.append(step, other + share * other.norm() / step.norm() * step)
            double.append(step, other + share * other.norm() / step.norm() * step)
    assert len(single) == 0 and len(double) == 50
    single.append(torch.full((3,), 1e-30, dtype=torch.float64), torch.full((3,), 1e-30, dtype=torch.float64))
    assert len(single) == 0


def test_a_search_that_is_cut_keeps_its_pairs() -> None:
    """Wherever the limit falls, in a line search too."""

    def objective(x: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_(True)
        value = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        return float(value.detach()), torch.autograd.grad(value, x)[0]

    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    settings = {"stop": lambda: False, "metric": lambda x: 1e-3 * x, "converged": lambda x, gradient: False}
    kept = []
    for limit in range(2, 30):
        pairs = Corrections()
        minimise(objective, start, max_evaluations=limit, pairs=pairs, **settings)
        kept.append(len(pairs))
    assert kept == sorted(kept) and kept[-1] > 5 and any(a == b for a, b in itertools.pairwise(kept))


def test_without_pairs_the_direction_is_that_of_the_metric() -> None:
    assert torch.equal(Corrections().direction(SCALES, lambda x: 3 * x), -3 * SCALES)


def test_pairs_of_large_networks_are_not_carried_over(monkeypatch) -> None:
    pairs = Corrections()
    pairs.append(torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    alive, keep = torch.ones(1, 2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    memory = curvature.CurvatureMemory()
    memory.store(pairs, alive, keep)
    assert len(memory.steps) == len(memory.changes) == 1
    monkeypatch.setattr(curvature, "_LIMIT", 1)
    memory.store(pairs, alive, keep)
    assert not memory.steps and not memory.changes
