"""All four solvers on one problem: certified objective and time, side by side.

    python -m benchmarks.solvers_breast_cancer            455 points, 30 features; the SDP alone takes minutes
    python -m benchmarks.solvers_breast_cancer --quick    100 points, 9 features

The binary robust problem of convex_head/problems/polynomial.py on sklearn's breast cancer data: rows permuted by
numpy's default_rng(0), standardised with the first 200 of them. Every solver's network is measured by the same code,
and its lower bound is rigorous. The small problems have reference optima, on which two conic solvers agree. The
penalty method minimises another function; listed is the true objective of the network that it leaves. "ratio" divides
CPU seconds by those of column generation (median of five runs): on a busy machine only they can be compared, on an
idle one they are the wall clock of one thread.
"""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer

from benchmarks.common import COLOURS, Column, Record, arguments, load_average, publish
from convex_head.console import messages
from convex_head.errors import ConvergenceWarning
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers import SolveResult, get_solver

NAME = "solvers_breast_cancer"
_LONGEST = 1800.0
_COLUMN_GENERATION = "column_generation"


@dataclass(frozen=True)
class Case:
    """One problem and the solvers that it is given to.

    Attributes:
        n, d: points and features, the first of each.
        reg: regularisation; the radius is 0.5 throughout.
        tol: relative gap asked for.
        repeats: runs of column generation, of which the median time counts.
        reference: known optimum, or None.
    """

    n: int
    d: int
    reg: float
    tol: float
    repeats: int
    reference: float | None = None
    solvers: tuple[str, ...] = ("cutting_set", "sdp")

    @property
    def label(self) -> str:
        """How tables and figures call it."""
        return f"n={self.n}, d={self.d}"


SMALL = (
    Case(40, 5, 0.02, 1e-4, 5, reference=0.321142),
    Case(100, 9, 0.02, 1e-4, 5, reference=0.354804),
)
FULL = Case(455, 30, 0.01, 1e-3, 5, solvers=("penalty", "cutting_set", "sdp"))
QUICK = Case(100, 9, 0.02, 1e-3, 1, reference=0.354804, solvers=("penalty", "cutting_set", "sdp"))


def problem_of(case: Case) -> PolynomialProblem:
    """The problem of ``case``, in float64."""
    features, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    features, labels = features[order], labels[order]
    features = (features - features[:200].mean(axis=0)) / features[:200].std(axis=0)
    x, y = torch.from_numpy(features[: case.n, : case.d]), torch.from_numpy(labels[: case.n])
    return PolynomialProblem(x, y, num_classes=2, radius=0.5, reg=case.reg)


def timed(name: str, case: Case) -> tuple[SolveResult, float, float]:
    """Result, median seconds and median CPU seconds of the solver ``name``."""
    problem = problem_of(case)
    seconds, cpu_seconds = [], []
    for _ in range(case.repeats if name == _COLUMN_GENERATION else 1):
        began = time.process_time()
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            result = get_solver(name).solve(problem, tol=case.tol, max_seconds=_LONGEST)
        cpu_seconds.append(time.process_time() - began)
        seconds.append(result.seconds)
    return result, statistics.median(seconds), statistics.median(cpu_seconds)


def record_of(case: Case, result: SolveResult, seconds: float, cpu_seconds: float, load: float) -> Record:
    """One flat record."""
    relative = None if case.reference is None else result.primal / case.reference - 1
    return {
        "problem": case.label,
        "n": case.n,
        "d": case.d,
        "radius": 0.5,
        "reg": case.reg,
        "tol": case.tol,
        "solver": result.solver,
        "conic_solver": result.extra.get("conic_solver"),
        "status": str(result.status),
        "primal": result.primal,
        "dual": result.dual,
        "gap": result.gap,
        "above_reference": relative,
        "neurons": result.neurons,
        "iterations": result.iterations,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "claimed_objective": result.extra.get("claimed_objective"),
        "margin_overstatement": result.extra.get("margin_overstatement"),
        "threads": torch.get_num_threads(),
        "load_average": load,
    }


def run(case: Case) -> tuple[list[Record], list[SolveResult]]:
    """Every solver on ``case``; column generation first and the slow ones after it, in one process."""
    records, solved = [], []
    for name in (_COLUMN_GENERATION, *case.solvers):
        messages().print(f"{case.label}: {name} (tol {case.tol:g})")
        load = load_average()
        result, seconds, cpu_seconds = timed(name, case)
        records.append(record_of(case, result, seconds, cpu_seconds, load))
        solved.append(result)
    for record in records:
        record["ratio"] = record["cpu_seconds"] / records[0]["cpu_seconds"]
    return records, solved


def draw(pyplot: Any, case: Case, solved: list[SolveResult]) -> None:
    """Relative gap against seconds of the largest problem."""
    for colour, result in zip(COLOURS, solved, strict=False):
        # The zero network starts the conic solvers; a gap of 1 at time 0 says nothing.
        points = [(max(line.seconds, 1e-3), line.gap) for line in result.history if line.gap < 1] or [
            (result.seconds, result.gap)
        ]
        seconds, gaps = zip(*points, strict=True)
        pyplot.plot(seconds, gaps, "o-", color=colour, markersize=4, label=result.solver)
    pyplot.axhline(case.tol, color="0.4", linestyle="--", linewidth=1)
    pyplot.annotate(f"asked for: {case.tol:g}", (0.01, case.tol), (3, 3), ("axes fraction", "data"), "offset points")
    pyplot.xscale("log")
    pyplot.yscale("log")
    pyplot.xlabel("seconds")
    pyplot.ylabel("certified relative gap")
    pyplot.title(f"Breast cancer, {case.label}, radius 0.5")
    pyplot.legend()


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    options = arguments(NAME, __doc__, argv)
    cases = (QUICK,) if options.quick else (*SMALL, FULL)
    records: list[Record] = []
    for case in cases:
        found, solved = run(case)
        records += found
    columns = [
        Column("problem", "problem"),
        Column("solver", "solver"),
        Column("primal", "objective", "{:.6f}".format),
        Column("dual", "bound", "{:.6f}".format),
        Column("gap", "gap", "{:.1e}".format),
        Column("above_reference", "over optimum", "{:+.1e}".format),
        Column("neurons", "neurons"),
        Column("seconds", "seconds", "{:.3g}".format),
        Column("cpu_seconds", "CPU s", "{:.3g}".format),
        Column("ratio", "ratio", "{:.3g}".format),
    ]
    claims = [
        f"penalty on {record['problem']}: its own variables claim {record['claimed_objective']:.6f}; the network they "
        f"describe has {record['primal']:.6f}."
        for record in records
        if record["claimed_objective"] is not None
    ]
    publish(
        options,
        "Breast cancer, radius 0.5: four solvers",
        records,
        records,
        columns,
        lambda pyplot: draw(pyplot, cases[-1], solved),
        claims,
    )


if __name__ == "__main__":
    main()
