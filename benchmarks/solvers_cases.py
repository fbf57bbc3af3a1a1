"""Solvers side by side on one problem of :mod:`benchmarks.solvers`: certified objective, gap and time.

Every network is measured by the same code, whatever its solver believes, and every lower bound is rigorous. CPU seconds
are those of the whole process with all its threads.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from benchmarks.common import Record, load_average
from benchmarks.solvers_data import Split, held_out, load
from convex_head import provenance
from convex_head.console import messages
from convex_head.errors import ConvergenceWarning, SolverError
from convex_head.problems.base import Network
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers import Solver, SolveResult, get_solver
from convex_head.solvers.sdp import SDP

RADIUS = 0.5
_TEST_ROWS = 2000
_EXTRA = ("claimed_objective", "margin_overstatement", "lmi_min_eigenvalue", "psd_min_eigenvalue")


@dataclass(frozen=True)
class Entry:
    """One solver and loss; the median time of ``repeats`` runs counts. ``reg`` is another one than the problem's."""

    solver: str
    loss: str = "crammer_singer"
    repeats: int = 1
    reg: float | None = None


@dataclass(frozen=True)
class SideBySide:
    """One problem and what it is given to; ratios are to the first entry.

    Attributes:
        name: of the file that keeps the measurements.
        part: data set.
        n, d: rows and features, the first of each.
        reg, tol: regularisation and relative gap asked for; the radius is 0.5.
        entries: solvers and losses, in order.
        tests: held-out rows.
        max_seconds: limit of each solver.
        reference: known optimum, or None.
    """

    name: str
    part: str
    n: int
    d: int
    reg: float
    tol: float
    entries: tuple[Entry, ...]
    tests: int
    max_seconds: float
    reference: float | None = None

    def measure(self, folder: Path, threads: int) -> list[Record]:
        """One record an entry, all from this process."""
        split = load(self.part, self.n, self.d, self.tests, folder)
        records = []
        with limited(threads):
            for entry in self.entries:
                messages().print(f"{self.name}: {entry.solver}, {entry.loss} (tol {self.tol:g})")
                records.append(self._solve(split, entry) | {"threads": threads})
        first = records[0]
        for record in records if len(records) > 1 else ():
            for key in ("cpu_seconds", "seconds"):
                record[f"{key}_ratio"] = record[key] / first[key] if first["status"] == "converged" else None
        return records

    def _solve(self, split: Split, entry: Entry) -> Record:
        reg = self.reg if entry.reg is None else entry.reg
        record: Record = {
            "kind": "solve",
            "data": self.part,
            "n": self.n,
            "d": self.d,
            "classes": split.num_classes,
            "radius": RADIUS,
            "reg": reg,
            "tol": self.tol,
            "max_seconds": self.max_seconds,
            "solver": entry.solver,
            "loss": entry.loss if split.num_classes > 2 else "hinge",
            "repeats": entry.repeats,
            "load_average": load_average(),
            "commit": provenance.commit(),
        }
        problem = problem_of(split, entry.loss, reg)
        problem.prepare()  # compiling is nobody's work
        seconds, cpu_seconds = [], []
        for _ in range(entry.repeats):
            began, cpu_began = time.perf_counter(), time.process_time()
            try:
                with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
                    result = solver_of(entry.solver).solve(problem, tol=self.tol, max_seconds=self.max_seconds)
            except SolverError as fault:
                messages().print(f"{entry.solver}: {fault}")
                return record | {
                    "status": "failed",
                    "seconds": time.perf_counter() - began,
                    "cpu_seconds": time.process_time() - cpu_began,
                }
            cpu_seconds.append(time.process_time() - cpu_began)
            seconds.append(result.seconds)
        record |= {"seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu_seconds)}
        record |= outcome(result)
        if self.reference is not None:
            record["above_reference"] = result.primal / self.reference - 1
        return record | accuracies(result.network, split)


def solver_of(name: str) -> Solver:
    """A solver of the registry, or "sdp, <conic solver>"."""
    head, _, conic = name.partition(", ")
    return SDP(conic_solver=conic) if conic else get_solver(head)


def problem_of(split: Split, loss: str, reg: float) -> PolynomialProblem:
    """The robust problem on the rows to fit on, in the precision of the features."""
    options = {"num_classes": split.num_classes, "radius": RADIUS, "reg": reg, "loss": loss}
    return PolynomialProblem(split.x, split.y, dtype=split.x.dtype, **options)


def outcome(result: SolveResult) -> Record:
    """What a solve ended with, and its way there."""
    # The zero network starts the conic solvers; a gap of 1 at time 0 says nothing.
    history = [line for line in result.history if line.gap < 1]
    return {
        "status": str(result.status),
        "primal": result.primal,
        "dual": result.dual,
        "gap": result.gap,
        "neurons": result.neurons,
        "iterations": result.iterations,
        "evaluations": result.extra.get("evaluations"),
        **{key: result.extra.get(key) for key in _EXTRA},
        "history_seconds": [round(line.seconds, 4) for line in history],
        "history_gap": [float(f"{line.gap:.6g}") for line in history],
    }


def accuracies(network: Network, split: Split) -> Record:
    """Held-out accuracy of a network, clean and exact for every point of the ball (all pairs of classes)."""
    correct = {}
    for name, radius in (("clean", 0.0), ("robust", RADIUS)):
        parts = []
        for x, y in zip(split.test_x.split(_TEST_ROWS), split.test_y.split(_TEST_ROWS), strict=True):
            problem = PolynomialProblem(x.double(), y, num_classes=split.num_classes, radius=radius, reg=1.0)
            parts.append(problem.worst_case(network)[0].amin(1) > 0)
        correct[name] = torch.cat(parts)
    return held_out(correct)


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """This many threads for torch, BLAS and OpenMP, whatever the environment says."""
    before = torch.get_num_threads()
    with threadpool_limits(threads):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
