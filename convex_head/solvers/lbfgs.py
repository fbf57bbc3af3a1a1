"""Limited-memory BFGS on a tensor, on its device, interruptible between evaluations.

torch.optim.LBFGS is not used: it costs a Python loop over parameters and several evaluations a step in its strong
Wolfe search, where one evaluation here is a pass over the data; scipy's would move every iterate to the host.

Source: J. Nocedal and S. Wright, "Numerical Optimization" (2006), algorithms 7.4-7.5, with an Armijo backtracking
search; pairs that break the curvature condition are skipped. Near a minimum the decrease drowns in rounding, where
gradients still tell: there a step is taken by its slopes (W. Hager and H. Zhang, SIAM J. Optim. 16 (2005), (4.3)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Objective = Callable[[Tensor], tuple[float, Tensor]]
MEMORY = 100
_CURVED = 1e-12
_DECREASE = 1e-4
# So many steps in a row that slopes alone accept, without a smaller gradient, are rounding.
_IDLE = 10


class Corrections:
    """Correction pairs of L-BFGS, steps s and changes y of the gradient, and what applies them at once.

    With P the products s_i'y_j of pairs i not younger than j, the two recursions of the textbook are two triangular
    systems, P a = S q and P'b = diag(P) a - Y r, and four products with the pairs as matrices (R. Byrd, J. Nocedal,
    R. Schnabel, Math. Program. 63 (1994)): a handful of operations instead of hundreds, none of which waits for a
    number from a GPU.

    Args:
        memory: number of pairs kept; the oldest goes first.
        dtype: that pairs are kept in; None for that of the first. They are approximate, and read twice a step.
    """

    def __init__(self, memory: int = MEMORY, dtype: torch.dtype | None = None):
        self.memory, self.dtype = memory, dtype
        self.clear()

    @staticmethod
    def of(pairs: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype | None = None) -> Corrections:
        """These (step, change), oldest first."""
        held = Corrections(dtype=dtype)
        for pair in pairs:
            held.append(*pair)
        return held

    def clear(self) -> None:
        """Forget all pairs."""
        self._count, self._first = 0, 0
        self._shape: tuple[int, ...] = ()
        self._steps = self._changes = self._products = torch.zeros(0, 0)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(step, change), oldest first."""
        for position in range(self._count):
            slot = (self._first + position) % len(self._steps)
            yield self._steps[slot].view(self._shape), self._changes[slot].view(self._shape)

    def append(self, step: Tensor, change: Tensor) -> None:
        """Keep a pair, unless its curvature is not positive beyond rounding."""
        dtype = self.dtype or step.dtype
        least = max(_CURVED, torch.finfo(dtype).eps)
        s, y = step.reshape(-1), change.reshape(-1)
        is_curved = s @ y > least * s.norm() * y.norm()
        s, y = s.to(dtype), y.to(dtype)
        # The second: where that is too small for the dtype.
        if not bool(is_curved & (s @ y > 0)):
            return
        if self._count == 0:
            self._shape, self._first = tuple(step.shape), 0
        if self._count == len(self._steps) < self.memory:
            self._grow(s)
        if self._count == self.memory:
            slot, self._first = self._first, (self._first + 1) % self.memory
        else:
            slot, self._count = self._count, self._count + 1
        self._steps[slot], self._changes[slot] = s, y
        self._products[: self._count, slot] = self._steps[: self._count] @ self._changes[slot]

    def _grow(self, like: Tensor) -> None:
        room = min(self.memory, max(8, 2 * self._count))
        wide = [like.new_zeros(room, len(like)) for _ in range(2)]
        products = like.new_zeros(room, room, dtype=torch.float64)
        if self._count:
            for new, old in zip(wide, (self._steps, self._changes), strict=True):
                new[: self._count] = old
            products[: self._count, : self._count] = self._products
        self._steps, self._changes = wide
        self._products = products

    def direction(self, gradient: Tensor, metric: Callable[[Tensor], Tensor]) -> Tensor:
        """-H gradient; ``metric`` is the first approximation of the inverse Hessian, scaled to the youngest pair."""
        if not self._count:
            return -metric(gradient)
        q = -gradient.reshape(-1).to(self._steps.dtype)
        steps, changes = self._steps[: self._count], self._changes[: self._count]
        turn = -self._first

        def combined(vectors: Tensor, weights: Tensor) -> Tensor:
            return vectors.mT @ weights.squeeze(1).roll(-turn).to(vectors.dtype)

        products = self._products[: self._count, : self._count].roll((turn, turn), (0, 1)).triu()
        right = (steps @ q).double().roll(turn).unsqueeze(1)
        ahead = torch.linalg.solve_triangular(products, right, upper=True)
        q = q - combined(changes, ahead)
        youngest = changes[(self._first + self._count - 1) % self._count]
        scaled = (youngest * metric(youngest.view(self._shape)).reshape(-1)).sum()
        r = metric(q.view(self._shape)).reshape(-1) * (products[-1, -1] / scaled).to(q.dtype)
        right = products.diagonal().unsqueeze(1) * ahead - (changes @ r).double().roll(turn).unsqueeze(1)
        back = torch.linalg.solve_triangular(products.mT, right, upper=False)
        return (r + combined(steps, back)).view(self._shape).to(gradient.dtype)


def minimise(
    objective: Objective,
    x: Tensor,
    *,
    converged: Callable[[Tensor, Tensor], bool],
    max_evaluations: int,
    stop: Callable[[], bool],
    metric: Callable[[Tensor], Tensor],
    pairs: Corrections | None = None,
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
        pairs: correction pairs of an earlier search on a similar function; those of this search are added to it.
        noise: relative rounding error of values: so far they may rise where slopes accept a step.

    Returns:
        The last point accepted - no point tried is lower by more than rounding - and the number of evaluations.
    """
    value, gradient = objective(x)
    lowest, evaluations, smallest, idle = value, 1, float(gradient.norm()), 0
    pairs = Corrections() if pairs is None else pairs
    while idle < _IDLE and evaluations < max_evaluations and not stop() and not converged(x, gradient):
        direction = pairs.direction(gradient, metric)
        slope = float((direction * gradient).sum())
        if slope >= 0:
            if not pairs:
                break
            pairs.clear()
            continue
        length = 1.0 if pairs else min(1.0, abs(value) / max(-slope, 1e-300))
        accepted = failed = False
        while not failed and evaluations < max_evaluations and not stop():
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
            failed = length < 1e-12
        if not accepted:
            if not failed or not pairs:
                break
            pairs.clear()
            continue
        pairs.append(candidate - x, new_gradient - gradient)
        x, value, gradient = candidate, new_value, new_gradient
        size = float(gradient.norm())
        idle = 0 if falls or size < smallest else idle + 1
        lowest, smallest = min(lowest, value), min(smallest, size)
    return x, evaluations
