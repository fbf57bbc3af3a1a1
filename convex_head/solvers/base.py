"""What every solver shares: argument checks, time, progress, interruption, and the final measurement.

A concrete solver implements ``_solve(problem, run)``: it reports points and lower bounds to ``run`` and returns when
``run.finished()`` says so or when it has nothing left to do. The returned point is the best one reported; its
objective is measured again by the problem, never taken from the solver.
"""

from __future__ import annotations

import abc
import math
import numbers
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from convex_head.errors import ConvergenceWarning, SolveCheckpointError, SolverError, ToleranceError
from convex_head.solvers.checkpoint import SolveState, load_state, save_state
from convex_head.solvers.result import Progress, SolveResult, Status, network_of, relative_gap
from convex_head.threads import one_thread_if_small

Callback = Callable[[Progress], Any]


@dataclass
class Run:
    """Book-keeping of one solve: best point, best bound, history, clock; multipliers given, and found.

    Of the time limit ``reserve`` seconds are kept for the last bound, and ``share`` of it at most. ``is_whole``: of all
    data, not of a sample; ``is_late``: the last measurement was made because the time was out; ``was_late``: one was.
    A callback that returns True ends the solve after the current iteration.
    """

    tol: float
    max_seconds: float | None
    callbacks: tuple[Callback, ...]
    seed: int
    start: Any = None
    given: Any = None
    multipliers: Any = None
    began: float = field(default_factory=time.perf_counter)
    primal: float = math.inf
    dual: float = 0.0
    network: Any = None
    history: list[Progress] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    stopped: bool = False
    stalled: bool = False
    checkpoint: Path | None = None
    key: dict[str, Any] = field(default_factory=dict)
    agree: Callable[[bool], bool] = bool
    writes: bool = True
    earlier: float = 0.0
    is_whole: bool = True
    reserve: float = 0.0
    share: float = 0.2
    is_late: bool = False
    was_late: bool = False

    @property
    def gap(self) -> float:
        """Relative gap of the best point and the best bound."""
        return relative_gap(self.primal, self.dual) if self.primal < math.inf else math.inf

    @property
    def seconds(self) -> float:
        """Wall-clock since the start, with that of the runs before a checkpoint."""
        return self.earlier + time.perf_counter() - self.began

    def out_of_time(self) -> bool:
        """The time limit of this run has passed, but for what is kept for the last bound, in any process."""
        return self.max_seconds is not None and self.agree(time.perf_counter() >= self.deadline - self.reserve)

    @property
    def deadline(self) -> float:
        """Where ``time.perf_counter`` stands when the limit has passed."""
        return math.inf if self.max_seconds is None else self.began + self.max_seconds

    def keep_back(self, seconds: float = math.inf) -> None:
        """Keep so many seconds of the time limit for the last bound, ``share`` of it at most."""
        self.reserve = 0.0 if self.max_seconds is None else min(seconds, self.share * self.max_seconds)

    def trial(self, tol: float) -> Run:
        """Book-keeping of a solve on a sample of the data: the same clock, no callbacks, no checkpoint."""
        limit = None if self.max_seconds is None else self.max_seconds - self.reserve
        return Run(tol, limit, (), self.seed, began=self.began, extra=self.extra, agree=self.agree, is_whole=False)

    def save(self, network: Any, tensors: Mapping[str, torch.Tensor], **numbers: float) -> None:
        """Keep where the solve stands, if it has a checkpoint: the network, and what else the algorithm needs."""
        if self.checkpoint is None or not self.writes:
            return
        kept = numbers | {"primal": self.primal, "dual": self.dual, "seconds": self.seconds, "extra": self.extra}
        save_state(self.checkpoint, self.key, SolveState(network, self.network, kept, self.history, dict(tensors)))

    def resume(self, device: torch.device) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]] | None:
        """Network, numbers and tensors of the checkpoint, if there is one; the book-keeping goes on from it.

        Raises:
            ResumeMismatchError: it is damaged or belongs to another problem.
        """
        if self.checkpoint is None or not self.checkpoint.is_file():
            return None
        state = load_state(self.checkpoint, self.key, device)
        self.primal, self.dual, self.earlier = (state.numbers[name] for name in ("primal", "dual", "seconds"))
        self.network, self.history = state.best, state.history
        self.extra.update(state.numbers["extra"])
        return state.network, state.numbers, state.tensors

    def finished(self) -> bool:
        """Converged, out of time, or stopped by a callback."""
        return self.gap <= self.tol or self.out_of_time() or self.stopped

    def report(self, *, primal: float, dual: float, network: Any, neurons: int) -> None:
        """Record a point with its exact objective and a lower bound of the optimum."""
        if primal < self.primal:
            self.primal, self.network = primal, network
        self.dual = max(self.dual, dual)
        line = Progress(len(self.history), self.seconds, self.primal, self.dual, self.gap, neurons)
        self.history.append(line)
        for callback in self.callbacks:
            if callback(line) is True:
                self.stopped = True
        self.stopped = self.agree(self.stopped)  # every process takes part, with callbacks or without


class Solver(abc.ABC):
    """One algorithm. Subclasses set ``name`` and implement ``_solve``."""

    name: ClassVar[str]
    keeps_checkpoints: ClassVar[bool] = False

    def solve(
        self,
        problem: Any,
        *,
        tol: float = 1e-2,
        max_seconds: float | None = None,
        callbacks: tuple[Callback, ...] = (),
        seed: int = 0,
        start: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> SolveResult:
        """Minimise ``problem``.

        Args:
            problem: for example :class:`~convex_head.problems.polynomial.PolynomialProblem`.
            tol: relative duality gap to reach, > 0.
            max_seconds: wall-clock limit, or None; compiling, seconds the first time on a machine, is not in it. The
                default solver keeps up to a fifth of it for the last bound, a third with more than 96 classes, and ends
                late by a pass or so where even that is too little.
            callbacks: called with a :class:`Progress` an outer iteration; one that returns True stops the solve.
            seed: seeds whatever is random.
            start: a network to start from (warm start), or the result of another solve on the same examples, whose
                multipliers are then used too where the solver has a use for them; or None.
            checkpoint: file that holds where the solve stands after every outer iteration, or None. Where it exists,
                the solve goes on from it, to the same result; it stays when the solve ends.

        Returns:
            The best point with its re-measured objective. CONVERGED only if its gap is at most ``tol``; otherwise a
            :class:`ConvergenceWarning` says what was reached. Ctrl-C returns the best point so far, if there is one.

        Raises:
            ToleranceError: tol or max_seconds is not positive and finite.
            SolveCheckpointError: this solver keeps no checkpoint.
            ResumeMismatchError: the checkpoint is damaged or belongs to another problem.
            SolverError: the algorithm failed without a usable point.
        """
        check_positive("tol", tol)
        if max_seconds is not None:
            check_positive("max_seconds", max_seconds)
        prepare = getattr(problem, "prepare", None)
        if prepare is not None:
            prepare()
        # A number of numpy would take the clock into its own precision.
        limit = None if max_seconds is None else float(max_seconds)
        run = Run(tol, limit, tuple(callbacks), seed, network_of(start))
        run.given = start.multipliers if isinstance(start, SolveResult) else None
        if checkpoint is not None:
            if not self.keeps_checkpoints:
                raise SolveCheckpointError(
                    f"checkpoint needs a solver that can go on from one; found {self.name}. Use column_generation."
                )
            run.checkpoint, run.key = Path(checkpoint), problem.key() | {"solver": self.name, "seed": seed}
        shard = getattr(problem, "shard", None)
        if shard is not None:
            run.agree, run.writes = shard.any, shard.rank == 0
        interrupted = False
        try:
            with one_thread_if_small(problem.n * problem.d):
                self._solve(problem, run)
        except KeyboardInterrupt:
            if run.network is None:
                raise
            interrupted = True
        except torch.linalg.LinAlgError as fault:
            raise SolverError(
                f"{self.name} needs finite, well-scaled numbers; a factorisation failed after {len(run.history)} "
                f"iterations ({fault}). Standardise the features, or change reg or the radius.",
                best=run.network,
            ) from fault
        if run.network is None:
            raise SolverError(
                f"{self.name} must find a point with a finite objective; found none in {len(run.history)} iterations. "
                "Standardise the features, or change reg or the radius."
            )
        with one_thread_if_small(problem.n * problem.d):
            return self._finish(problem, run, interrupted)

    @abc.abstractmethod
    def _solve(self, problem: Any, run: Run) -> None:
        """Report points to ``run`` until ``run.finished()``."""

    def _finish(self, problem: Any, run: Run, interrupted: bool) -> SolveResult:
        primal = problem.objective(run.network)
        gap = relative_gap(primal, run.dual)
        if gap <= run.tol:
            status = Status.CONVERGED
        elif interrupted or run.stopped:
            status = Status.INTERRUPTED
        elif run.is_late or run.out_of_time():
            status = Status.MAX_TIME
        else:
            status = Status.STALLED if run.stalled else Status.MAX_ITER
        message = (
            f"{self.name}: {status.value} after {run.seconds:.3g} s, objective {primal:.6g}, relative gap {gap:.3g}"
        )
        if status is not Status.CONVERGED:
            warnings.warn(
                f"{message}; tol = {run.tol:g} was not reached. Allow more time (max_seconds), a larger tol, or more "
                "regularisation (reg).",
                ConvergenceWarning,
                stacklevel=3,
            )
        return SolveResult(
            status=status,
            primal=primal,
            dual=run.dual,
            gap=gap,
            neurons=run.network.size,
            seconds=run.seconds,
            iterations=len(run.history),
            history=tuple(run.history),
            message=message,
            solver=self.name,
            network=run.network,
            multipliers=run.multipliers,
            extra=run.extra,
        )


def check_positive(name: str, value: float) -> None:
    """Raise ToleranceError unless value is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise ToleranceError(f"{name} must be a positive finite number; found {value!r}. Use for example {name}=1e-2.")
