"""HOW a problem is minimised: one algorithm a file, one registry of names.

``auto`` is column generation, the only solver that scales and certifies.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from convex_head.errors import UnknownSolverError
from convex_head.solvers.base import Solver
from convex_head.solvers.result import Progress, SolveResult, Status

_SOLVERS = {
    "column_generation": ("convex_head.solvers.column_generation", "ColumnGeneration"),
    "sdp": ("convex_head.solvers.sdp", "SDP"),
    "cutting_set": ("convex_head.solvers.cutting_set", "CuttingSet"),
    "penalty": ("convex_head.solvers.penalty", "Penalty"),
}


def get_solver(name: str) -> Solver:
    """Make the solver of that name.

    Raises:
        UnknownSolverError: no solver has that name.
    """
    module, attribute = _SOLVERS.get("column_generation" if name == "auto" else name, (None, None))
    if module is None:
        raise UnknownSolverError(f"solver must be auto or one of {', '.join(_SOLVERS)}; found {name!r}. Pick one.")
    factory: Callable[[], Solver] = getattr(import_module(module), str(attribute))
    return factory()


__all__ = ["Progress", "SolveResult", "Solver", "Status", "get_solver"]
