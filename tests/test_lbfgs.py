"""Limited-memory BFGS: the minimum of a quadratic, and values that are known up to rounding only."""

import math

import pytest
import torch
from torch import Tensor

from convex_head.solvers.lbfgs import minimise

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
