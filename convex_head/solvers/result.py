"""The one result type of all solvers."""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

from convex_head.errors import ConvergenceWarning, StartError


class Status(enum.StrEnum):
    """How a solver ended. Only CONVERGED comes with gap <= tol."""

    CONVERGED = "converged"
    MAX_TIME = "max_time"
    MAX_ITER = "max_iter"
    INTERRUPTED = "interrupted"
    STALLED = "stalled"


@dataclass(frozen=True)
class Progress:
    """One line of a solver's history; the same object reaches callbacks and progress bars.

    Attributes:
        iteration: outer iteration, from 0.
        seconds: wall-clock since the start.
        primal: exact objective of the best point so far.
        dual: best rigorous lower bound so far.
        gap: (primal - dual) / max(1e-12, primal).
        neurons: neurons of the current point.
    """

    iteration: int
    seconds: float
    primal: float
    dual: float
    gap: float
    neurons: int


@dataclass(frozen=True)
class SolveResult:
    """What a solver returns, measured again at the returned point.

    Attributes:
        status: how it ended.
        primal: exact robust objective of ``network``.
        dual: rigorous lower bound of the optimum over networks of any width.
        gap: relative duality gap (primal - dual) / max(1e-12, primal).
        neurons: number of neurons of ``network``.
        seconds: wall-clock of the solve.
        iterations: outer iterations.
        history: one :class:`Progress` an outer iteration.
        message: one sentence for humans.
        solver: name of the solver.
        network: the point itself.
        multipliers: the dual side of the last point, for a solve that starts from this one
            (:class:`~convex_head.problems.multipliers.Multipliers`); None where the solver has none.
        extra: solver-specific measurements (for example constraint violations).
    """

    status: Status
    primal: float
    dual: float
    gap: float
    neurons: int
    seconds: float
    iterations: int
    history: tuple[Progress, ...]
    message: str
    solver: str
    network: Any = field(repr=False, default=None)
    multipliers: Any = field(repr=False, default=None)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def converged(self) -> bool:
        """True only when the gap met the tolerance."""
        return self.status is Status.CONVERGED


def network_of(start: Any) -> Any:
    """The network of a start, which is a network, a :class:`SolveResult` or None.

    Raises:
        StartError: a result without a network.
    """
    if not isinstance(start, SolveResult):
        return start
    if start.network is None:
        raise StartError(
            "start must hold a network; found a result without one, as that of a loaded head. Use head.network()."
        )
    return start.network


def relative_gap(primal: float, dual: float) -> float:
    """(primal - dual) / max(1e-12, primal)."""
    return (primal - dual) / max(1e-12, primal)


def as_deployed(result: SolveResult, primal: float, tol: float, dtype: str, *, zero: bool) -> SolveResult:
    """The result with the objective measured on the deployed weights; warns where the gap then misses ``tol``.

    Args:
        result: what the solver returned.
        primal: objective of the weights as deployed.
        tol: relative gap asked for.
        dtype: of the weights.
        zero: the weights are those of the zero network.
    """
    gap = relative_gap(primal, result.dual)
    status = result.status
    if gap <= tol:
        status = Status.CONVERGED
    elif status is Status.CONVERGED:
        status = Status.STALLED
    message = f"{result.solver}: {status.value}, objective {primal:.6g}, relative gap {gap:.3g} as deployed ({dtype})"
    message += "; the best network is the zero network: lower reg or radius" if zero else ""
    if status is not Status.CONVERGED:
        warnings.warn(
            f"{message}; tol = {tol:g} was not reached after {result.seconds:.3g} s. Allow more time "
            "(max_seconds), a larger tol, more regularisation (reg), or a float64 head.",
            ConvergenceWarning,
            stacklevel=4,
        )
    return replace(result, status=status, primal=primal, gap=gap, message=message)
