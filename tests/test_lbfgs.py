"""Directions against the two loops of the textbook, and minima of known functions."""

from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from convex_head.solvers.lbfgs import Pair, _Curvature, minimise


def two_loops(gradient: Tensor, pairs: deque[Pair], metric: Callable[[Tensor], Tensor]) -> Tensor:
    """Algorithm 7.4 of Nocedal and Wright, with the scaling (7.20) in the metric."""
    q, coefficients = -gradient, []
    for step, change, product in reversed(pairs):
        coefficients.append((step * q).sum() / product)
        q = q - coefficients[-1] * change
    _, change, product = pairs[-1]
    q = metric(q) * (product / (change * metric(change)).sum())
    for (step, change, product), coefficient in zip(pairs, reversed(coefficients), strict=True):
        q = q + (coefficient - (change * q).sum() / product) * step
    return q


@pytest.mark.parametrize("count", [1, 3, 5, 8, 13])
def test_directions_are_those_of_the_two_loops(count: int) -> None:
    """With room for five pairs: some, all, and after the oldest have gone."""
    generator = torch.Generator().manual_seed(count)
    shape = (3, 2, 4)
    curvature, scale = (0.1 + torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    pairs: deque[Pair] = deque(maxlen=5)
    memory = _Curvature(torch.zeros(shape, dtype=torch.float64), pairs)
    added = []
    for _ in range(count):
        step = torch.randn(shape, generator=generator, dtype=torch.float64)
        added.append((step, curvature * step, float((curvature * step.square()).sum())))
        memory.add(*added[-1])
    assert len(pairs) == min(5, count)
    for (step, change, product), expected in zip(pairs, added[-5:], strict=True):
        assert torch.equal(step, expected[0]) and torch.equal(change, expected[1]) and product == expected[2]
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = two_loops(gradient, deque(added[-5:]), lambda g: scale * g)
    torch.testing.assert_close(memory.direction(gradient, lambda g: scale * g), expected, rtol=1e-12, atol=1e-12)
    again = _Curvature(gradient, deque(pairs, maxlen=5))
    torch.testing.assert_close(again.direction(gradient, lambda g: scale * g), expected, rtol=1e-12, atol=1e-12)
    memory.clear()
    assert not pairs and torch.equal(memory.direction(gradient, lambda g: scale * g), scale * -gradient)


@pytest.mark.parametrize("memory", [1, 5, 100])
def test_rosenbrock(memory: int) -> None:
    def objective(x: Tensor) -> tuple[float, Tensor]:
        x = x.detach().requires_grad_()
        value = (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()
        (gradient,) = torch.autograd.grad(value, x)
        return float(value.detach()), gradient

    point, evaluations = minimise(
        objective,
        torch.full((6,), -1.0, dtype=torch.float64),
        converged=lambda x, gradient: float(gradient.norm()) < 1e-8,
        max_evaluations=5000,
        stop=lambda: False,
        metric=lambda gradient: gradient,
        memory=memory,
    )
    assert evaluations < 5000
    torch.testing.assert_close(point, torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0)
