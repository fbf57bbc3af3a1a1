"""HOW a problem is minimised: one algorithm a file, one registry of names.

``auto`` is the first solver of an activation: the one that scales and certifies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from convex_head.errors import UnknownSolverError
from convex_head.solvers.base import Solver
from convex_head.solvers.result import Progress, SolveResult, Status

_SOLVERS = {
    "column_generation": ("convex_head.solvers.column_generation", "ColumnGeneration"),
    "sdp": ("convex_head.solvers.sdp", "SDP"),
    "cutting_set": ("convex_head.solvers.cutting_set", "CuttingSet"),
    "penalty": ("convex_head.solvers.penalty", "Penalty"),
    "group_descent": ("convex_head.solvers.group_descent", "GroupDescent"),
    "socp": ("convex_head.solvers.gates_socp", "GatesSOCP"),
}
POLYNOMIAL_SOLVERS = ("column_generation", "sdp", "cutting_set", "penalty")
GATE_SOLVERS = ("group_descent", "socp")


def get_solver(name: str, allowed: Sequence[str] = POLYNOMIAL_SOLVERS) -> Solver:
    """Make the solver of that name.

    Args:
        name: one of ``allowed``, or "auto" for the first of them.
        allowed: the solvers of the problem at hand.

    Raises:
        UnknownSolverError: no solver of this problem has that name.
    """
    chosen = allowed[0] if name == "auto" else name
    if chosen not in allowed:
        raise UnknownSolverError(f"solver must be auto or one of {', '.join(allowed)}; found {name!r}. Pick one.")
    module, attribute = _SOLVERS[chosen]
    factory: Callable[[], Solver] = getattr(import_module(module), attribute)
    return factory()


__all__ = ["GATE_SOLVERS", "POLYNOMIAL_SOLVERS", "Progress", "SolveResult", "Solver", "Status", "get_solver"]
