"""Limited-memory BFGS on a tensor, on its device, interruptible between evaluations.

torch.optim.LBFGS is not used: it costs a Python loop over parameters and several evaluations a step in its strong
Wolfe search, where one evaluation here is a pass over the data; scipy's would move every iterate to the host.

Source: J. Nocedal and S. Wright, "Numerical Optimization" (2006), algorithms 7.4-7.5, with an Armijo backtracking
search; pairs that break the curvature condition are skipped. Near a minimum the decrease drowns in rounding, where
gradients still tell: there a step is taken by its slopes (W. Hager and H. Zhang, SIAM J. Optim. 16 (2005), (4.3)).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor

Objective = Callable[[Tensor], tuple[float, Tensor]]
Pair = tuple[Tensor, Tensor, float]
MEMORY = 100
_DECREASE = 1e-4
# So many steps in a row that slopes alone accept, without a smaller gradient, are rounding.
_IDLE = 10


def minimise(
    objective: Objective,
    x: Tensor,
    *,
    converged: Callable[[Tensor, Tensor], bool],
    max_evaluations: int,
    stop: Callable[[], bool],
    metric: Callable[[Tensor], Tensor],
    memory: int = MEMORY,
    pairs: deque[Pair] | None = None,
    noise: float = 0.0,
) -> tuple[Tensor, int]:
    """Minimise a C^1 function from x.

    Args:
        objective: returns (value, gradient) at a point.
        x: start; any shape.
        converged: called with a point and its gradient; True ends the search.
        max_evaluations: bound on calls of ``objective``.
        stop: asked between evaluations; True ends the search.
        metric: applies a fixed approximation of the inverse Hessian, up to scale, to a tensor of x's shape.
        memory: number of correction pairs.
        pairs: correction pairs (step, change of the gradient, their product) of an earlier search on a similar
            function; those of this search are added to it.
        noise: relative rounding error of values: so far they may rise where slopes accept a step.

    Returns:
        The last point accepted - no point tried is lower by more than rounding - and the number of evaluations.
    """
    value, gradient = objective(x)
    lowest, evaluations, smallest, idle = value, 1, float(gradient.norm()), 0
    pairs = deque(maxlen=memory) if pairs is None else pairs
    while idle < _IDLE and evaluations < max_evaluations and not stop() and not converged(x, gradient):
        direction = _two_loop(gradient, pairs, metric)
        slope = float((direction * gradient).sum())
        if slope >= 0:
            if not pairs:
                break
            pairs.clear()
            continue
        length = 1.0 if pairs else min(1.0, abs(value) / max(-slope, 1e-300))
        accepted = False
        while evaluations < max_evaluations and not stop():
            candidate = x + length * direction
            new_value, new_gradient = objective(candidate)
            evaluations += 1
            accepted = falls = new_value <= value + _DECREASE * length * slope
            if not falls and new_value <= lowest + 2 * noise * abs(lowest):
                accepted = float((direction * new_gradient).sum()) <= (2 * _DECREASE - 1) * slope
            if accepted:
                break
            curvature = 2 * (new_value - value - length * slope) / length**2
            length = min(0.5 * length, max(0.1 * length, -slope / curvature if curvature > 0 else 0.0))
            if length < 1e-12:
                break
        if not accepted:
            if not pairs:
                break
            pairs.clear()
            continue
        step, change = candidate - x, new_gradient - gradient
        product = float((step * change).sum())
        if product > 1e-12 * float(step.norm() * change.norm()):
            pairs.append((step, change, product))
        x, value, gradient = candidate, new_value, new_gradient
        size = float(gradient.norm())
        idle = 0 if falls or size < smallest else idle + 1
        lowest, smallest = min(lowest, value), min(smallest, size)
    return x, evaluations


def _two_loop(gradient: Tensor, pairs: deque[Pair], metric: Callable[[Tensor], Tensor]) -> Tensor:
    q = -gradient
    coefficients = []
    for step, change, product in reversed(pairs):
        coefficient = (step * q).sum() / product
        coefficients.append(coefficient)
        q = q - coefficient * change
    q = metric(q)
    if pairs:
        _, change, product = pairs[-1]
        q = q * (product / (change * metric(change)).sum())
    for (step, change, product), coefficient in zip(pairs, reversed(coefficients), strict=True):
        q = q + (coefficient - (change * q).sum() / product) * step
    return q
