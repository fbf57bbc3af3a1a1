"""Limited-memory BFGS on a tensor, on its device, interruptible between evaluations.

torch.optim.LBFGS is not used: it costs a Python loop over parameters and several evaluations a step in its strong
Wolfe search, where one evaluation here is a pass over the data; scipy's would move every iterate to the host.

Source: J. Nocedal and S. Wright, "Numerical Optimization" (2006), algorithms 7.4-7.5, with an Armijo backtracking
search; pairs that break the curvature condition are skipped. The two loops of algorithm 7.4 over the pairs are two
triangular systems in the products of steps and changes, and four products with all pairs at once (R. Byrd, J. Nocedal,
R. Schnabel, Math. Program. 63 (1994), theorem 2.2).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

Objective = Callable[[Tensor], tuple[float, Tensor]]
Pair = tuple[Tensor, Tensor, float]
MEMORY = 100


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

    Returns:
        The best point found and the number of evaluations.
    """
    value, gradient = objective(x)
    evaluations = 1
    pairs = deque(maxlen=memory) if pairs is None else pairs
    learned = _Curvature(x, pairs)
    while evaluations < max_evaluations and not stop() and not converged(x, gradient):
        direction = learned.direction(gradient, metric)
        slope = float((direction * gradient).sum())
        if slope >= 0:
            if not pairs:
                break
            learned.clear()
            continue
        length = 1.0 if pairs else min(1.0, abs(value) / max(-slope, 1e-300))
        accepted = False
        while evaluations < max_evaluations and not stop():
            candidate = x + length * direction
            new_value, new_gradient = objective(candidate)
            evaluations += 1
            if new_value <= value + 1e-4 * length * slope:
                accepted = True
                break
            curvature = 2 * (new_value - value - length * slope) / length**2
            length = min(0.5 * length, max(0.1 * length, -slope / curvature if curvature > 0 else 0.0))
            if length < 1e-12:
                break
        if not accepted:
            if not pairs:
                break
            learned.clear()
            continue
        step, change = candidate - x, new_gradient - gradient
        product = float((step * change).sum())
        if product > 1e-12 * float(step.norm() * change.norm()):
            learned.add(step, change, product)
        x, value, gradient = candidate, new_value, new_gradient
    return x, evaluations


class _Curvature:
    """The pairs, oldest first, as rows of two matrices; those of the deque are views of these.

    Args:
        x: a point, for shape and dtype.
        pairs: of an earlier search, with a maximal length; kept up to date.
    """

    def __init__(self, x: Tensor, pairs: deque[Pair]):
        size = pairs.maxlen or MEMORY
        self._pairs, self._shape = pairs, x.shape
        self._steps, self._changes = x.new_empty(2, size, x.numel())
        # Products of the step of a row with the change of a column; those with earlier changes are not kept.
        self._products = x.new_zeros(size, size, dtype=torch.float64)
        self._slots: list[int] = []
        kept = list(pairs)
        pairs.clear()
        for pair in kept:
            self.add(*pair)

    def clear(self) -> None:
        """Forget all pairs."""
        self._pairs.clear()
        self._slots.clear()

    def add(self, step: Tensor, change: Tensor, product: float) -> None:
        """Take a pair in, for the oldest where there is no room."""
        slots = self._slots
        slot = slots.pop(0) if len(slots) == len(self._steps) else len(slots)
        slots.append(slot)
        self._steps[slot], self._changes[slot] = step.reshape(-1), change.reshape(-1)
        self._products[: len(slots), slot] = torch.mv(self._steps[: len(slots)], self._changes[slot]).double()
        self._products[slot, slot] = product
        rows = self._steps[slot], self._changes[slot]
        self._pairs.append((rows[0].view(self._shape), rows[1].view(self._shape), product))

    def direction(self, gradient: Tensor, metric: Callable[[Tensor], Tensor]) -> Tensor:
        """Minus the approximate inverse Hessian times the gradient."""
        if not self._pairs:
            return metric(-gradient)
        count = len(self._slots)
        steps, changes = self._steps[:count], self._changes[:count]
        order = torch.tensor(self._slots, device=gradient.device)
        upper = self._products[order.unsqueeze(1), order]
        flat = -gradient.reshape(-1)
        first = _solved(upper, (steps @ flat).double()[order].unsqueeze(1), upper_triangle=True)
        flat = flat.addmv(changes.mT, _placed(first, order).to(flat.dtype), alpha=-1)
        _, change, product = self._pairs[-1]
        scale = product / (change * metric(change)).sum()
        flat = metric(flat.view(self._shape)).reshape(-1) * scale
        left = upper.diagonal().unsqueeze(1) * first - (changes @ flat).double()[order].unsqueeze(1)
        second = _solved(upper.mT, left, upper_triangle=False)
        return flat.addmv(steps.mT, _placed(second, order).to(flat.dtype)).view(self._shape)


def _solved(matrix: Tensor, right: Tensor, *, upper_triangle: bool) -> Tensor:
    """(m, 1) solution of a triangle of matrix (m, m)."""
    return torch.linalg.solve_triangular(matrix, right, upper=upper_triangle)


def _placed(values: Tensor, order: Tensor) -> Tensor:
    """Values (m, 1) in the order of the slots (m,)."""
    out = torch.empty_like(values).squeeze(1)
    out[order] = values.squeeze(1)
    return out
