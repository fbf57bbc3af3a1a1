"""Fully corrective column generation: the default solver.

Repeat: minimise the smoothed problem over the neurons that the network has (L-BFGS on v_j = sqrt|alpha_j| u_j, in
which the problem is smooth and unconstrained), read slopes and worst-case points off that minimum, ask the exact
oracle for the best neuron anywhere on the sphere, and either stop - its value proves that no wider network is
better - or go on: with a narrower smoothing where smoothing makes the gap, with the oracle's neurons added where a
missing neuron does. Neurons that have shrunk to nothing are dropped, those that have become nearly the same made one
(solvers/merging.py): what is left is a fraction, and passes cost less. Smoothing is centred on the slopes of the last
minimum (problems/multipliers.py), so that its width needs to shrink far less than the gap.

The inner problem is blurred in proportion to the smoothing width (adversary/trust_region.py), because its worst-case
points are not unique at larger radii and L-BFGS stalls on the kinks that this makes.

Large data are met first in samples of growing size (in memory, the same smoothing schedule), so that only the last
iterations pass over all rows; the bound and the objective that are reported are always those of all rows.

Every outer iteration yields a rigorous bound (problems/polynomial.py) and an exact objective, after the best scaling of
the output weights: margins are linear in them, so the scaling costs no further worst case.

Source: fully corrective Frank-Wolfe with a convex-gauge oracle (M. Jaggi, ICML 2013, section 3; F. Bach, JMLR 18
(2017)), smoothing with continuation (Y. Nesterov, 2005).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork
from convex_head.problems.base import Network
from convex_head.problems.dual import DualReport, OracleAnswer
from convex_head.solvers.base import Run, Solver
from convex_head.solvers.checkpoint import kept_multipliers, multipliers_to_keep
from convex_head.solvers.curvature import CurvatureMemory
from convex_head.solvers.lbfgs import Corrections, minimise
from convex_head.solvers.merging import merging

_FIRST_WIDTH = 0.3
# With many classes more margins of an example lie within the width, and each costs a worst case.
_FIRST_WIDTH_OF_MANY = 0.1
_NEURONS = 8
_ALL_NEURONS = 40
_MANY = 96
_WARM_WIDTHS = 6
_SHRINK = 0.3
_TIGHTEN = 0.5
_NEW_SHARE = 1e-3
_NARROWEST = 1e-9
_ZERO = 1e-12
# A warm start within the second gap looks for its width until steps are this close to 1; within the first it is kept.
_NEAR, _FAR, _CLOSE = 0.05, 0.15, 0.9
_DEAD = 1e-8
_EQUAL = 1e-9
_STALL_ITERATIONS = 12
_STALL_PROGRESS = 0.02
# Neurons that differ by this share of tol are one (solvers/merging.py), where a search goes on by the second share. It
# stops for that if its network is so much narrower then, and looks every so many evaluations.
_SAME, _NEARLY_SAME, _NARROWER, _LOOK = 0.01, 0.1, 0.8, 25
# Of many functions an inner minimisation has so many evaluations while the gap is above the larger one above:
# neurons that are missing keep more open then than what is left of it.
_PATIENCE = 150
# Far from its minimum a search takes a new preconditioner after so many evaluations, and after so many more.
_AFRESH = (15, 45)
# Accuracy of the first inner minimisations: this many times tol, within these.
_FIRST_ACCURACY, _LEAST_FIRST, _MOST_FIRST = 5.0, 0.03, 0.2
# Smoothing may keep this share of tol open; where it keeps more, its width is set for the second share at most.
_SMOOTHING_SHARE = 0.6
_SMOOTHING_AIM = 0.5
# While a new centre takes what smoothing keeps open down to this share, its width stays.
_SETTLING = 0.5
# A path goes on with a width so many times that of the head before.
_REOPEN = 1.5
# A bound is repaired where smoothing alone keeps no more than tol open and no neuron is worth more than this many times
# reg, or the best one of the median function exceeds reg by so many times tol at most; for the latter not before what
# the last repair missed can have shrunk by the third factor an iteration. Where the time is out, in any case.
_REPAIR_WORST, _REPAIR_MEDIAN, _REPAIR_PACE = 1.25, 4.0, 1.5
# Of the time limit so many times what the last measurement with a repair took is kept for the next.
_KEPT = 2.0
# Of many functions, where repairs gain more than searches do, up to this share.
_KEPT_OF_MANY = 1 / 3
# Missing neurons violate the bound by more than the inner solution's inaccuracy: then they come first.
_INNER_SHARE = 0.3
# Large data: samples of growing size first, each solved roughly, while a pass over all is much dearer.
_FIRST_SAMPLE = 4096
_SAMPLE_OF_FUNCTION = 32
_SAMPLE_GROWTH = 4
_LEAST_FACTOR = 2.5
# So roughly, because its optimum is another; where it is ill-conditioned, no longer than this.
_SAMPLE_TOL = 0.4
_SAMPLE_EVALUATIONS = 200
_SAMPLE_ITERATIONS = 2


@dataclass
class _State:
    """Where outer iterations stand.

    Attributes:
        network: the point.
        mu: width of the smoothing.
        accuracy: of the next inner minimisation.
        centre: multipliers that the smoothing is centred on, or None.
        open: what smoothing kept open at the last point.
        wait: iterations before the median function alone asks for a repair again.
    """

    network: Network
    mu: float
    accuracy: float
    centre: Tensor | None = None
    open: float = math.inf
    wait: float = 0.0


class ColumnGeneration(Solver):
    """See the module docstring.

    Args:
        neurons: neurons of each sign and function to start from, and to add in a round at most; None for 8, and fewer
            from 6 functions on, because a pair of classes costs the cube of its neurons in every pass.
        max_iterations: bound on outer iterations.
        inner_evaluations: bound on evaluations of one inner minimisation; of more than 96 functions, far from the
            optimum, 150 at most.
    """

    name = "column_generation"
    keeps_checkpoints = True

    def __init__(self, neurons: int | None = None, max_iterations: int = 100, inner_evaluations: int = 1000):
        self.neurons = neurons
        self.max_iterations = max_iterations
        self.inner_evaluations = inner_evaluations
        self._memory = CurvatureMemory()

    def _solve(self, problem: Any, run: Run) -> None:
        run.extra["evaluations"] = 0
        run.share = _KEPT_OF_MANY if problem.num_functions > _MANY else run.share
        run.keep_back()
        self._memory = CurvatureMemory()
        saved = run.resume(problem.device)
        if saved is not None:
            network, numbers, tensors = saved
            self._memory = CurvatureMemory.of(tensors, network)
            run.multipliers, centre = kept_multipliers(problem, numbers.get("width", 0.0), tensors)
            more = numbers.get("open", math.inf), numbers.get("wait", 0.0)
            state = _State(network, numbers["mu"], numbers["accuracy"], centre, *more)
        elif run.start is not None and float(run.start.norm) > 0:
            state = self._resume_from(problem, run.start, run)
        else:
            state = _State(problem.zero_network(), _FIRST_WIDTH, _first_accuracy(run))
            if problem.num_functions > _MANY:
                state.mu = _FIRST_WIDTH_OF_MANY
                # Near the zero network every pair of classes is at work; from discriminants few are.
                state.network = problem.fit_scale(problem.discriminant_network(), state.mu)
            elif self._is_zero_optimal(problem, state.mu, run):
                return
            else:
                state.network = problem.random_network(self._width(problem), run.seed)
            try:
                for size in _sample_sizes(problem.n, problem.num_functions):
                    part = problem.sample(size, run.seed)
                    trial = run.trial(max(_SAMPLE_TOL, run.tol))
                    most = min(_SAMPLE_EVALUATIONS, self.inner_evaluations)
                    state = self._iterate(part, trial, state, most, min(_SAMPLE_ITERATIONS, self.max_iterations))
                    state.centre, state.wait = None, 0.0
            except KeyboardInterrupt:
                state.centre = None  # that of a sample's rows
                self._measure(problem, state, run)
                raise
        self._iterate(problem, run, state, self.inner_evaluations, self.max_iterations)
        if run.network is None:  # no iteration is allowed
            self._measure(problem, state, run)

    def _iterate(self, problem: Any, run: Run, state: _State, evaluations: int, iterations: int) -> _State:
        """So many outer iterations, of so many evaluations each, at most; returns where they stand."""
        for _ in range(len(run.history), iterations):
            if _is_over(run):
                break
            if state.mu < _NARROWEST or _stalled(run):
                run.stalled = True
                break
            is_rough = problem.num_functions > _MANY and run.gap > _FAR
            most = min(evaluations, _PATIENCE) if is_rough else evaluations
            converged = self._correct(problem, state, run, most)
            report, answer = self._measure(problem, state, run)
            if _is_over(run):
                break
            if report.smoothing > _SMOOTHING_SHARE * run.tol * report.primal:
                if state.centre is None or report.smoothing > _SETTLING * state.open:
                    state.mu *= self._narrowing(report, run)
                state.open = report.smoothing
            elif converged:
                violation = float(answer.bounds.amax()) / problem.reg - 1
                state.accuracy = min(state.accuracy, max(_TIGHTEN * state.accuracy, _INNER_SHARE * violation))
            if converged or is_rough:
                state.centre = report.slopes
                reg = problem.reg * (1 + 0.5 * state.accuracy)
                state.network = self._add(state.network, answer, reg, self._width(problem))
            # What the clock has cut off would not be gone on from to the same result.
            if run.checkpoint is not None and not run.was_late:
                tensors = self._memory.tensors() | multipliers_to_keep(problem, run.multipliers, state.centre)
                width = 0.0 if run.multipliers is None else run.multipliers.width
                numbers = {"mu": state.mu, "accuracy": state.accuracy, "open": state.open, "wait": state.wait}
                run.save(state.network, tensors, **numbers, width=width)
        return state

    def _resume_from(self, problem: Any, start: Network, run: Run) -> _State:
        """The start, scaled, and the width to go on with; a start that is good enough ends the solve here.

        With multipliers of the same examples that is a width somewhat larger than theirs. Else it is the one that
        proves most where the start is nearly optimal, else one wider than the first at which smoothing is no longer
        what keeps the gap open.
        """
        accuracy, given = _first_accuracy(run), run.given
        if given is not None and problem.takes(given):
            centre = given.slopes.to(problem.device, problem.dtype)
            state = _State(start, min(_FIRST_WIDTH, _REOPEN * given.width), accuracy, centre)
            self._measure(problem, state, run)
            return state
        tried: dict[float, tuple[float, Network]] = {}

        def measure(mu: float) -> DualReport:
            network = problem.fit_scale(start, mu)
            report, answer = self._measure(problem, _State(network, mu, accuracy), run)
            tried[mu] = answer.dual, network
            return report

        mu = wider = _FIRST_WIDTH
        for _ in range(_WARM_WIDTHS):
            report = measure(mu)
            if run.finished() or report.smoothing <= _SMOOTHING_SHARE * run.tol * report.primal:
                break
            wider, mu = mu, mu * self._narrowing(report, run)
        # Of an optimal network the bound is sharp only about the width that it was optimal for.
        factor = _SHRINK**0.5
        while not run.finished() and run.gap <= _FAR and factor < _CLOSE:
            best = max(tried, key=lambda mu: tried[mu][0])
            measure(best * factor)
            if not run.finished():
                measure(best / factor)
            factor **= 0.5
        best = max(tried, key=lambda mu: tried[mu][0])
        mu = best if run.gap <= _NEAR else wider
        return _State(tried[mu][1], mu, accuracy)

    @staticmethod
    def _narrowing(report: DualReport, run: Run) -> float:
        """Factor of the width after which smoothing keeps its share of tol open, as far as one step may go."""
        wanted = _SMOOTHING_AIM * run.tol * report.primal
        return max(_SHRINK, wanted / report.smoothing)

    def _is_zero_optimal(self, problem: Any, mu: float, run: Run) -> bool:
        """Report the zero network only where one pass proves it optimal.

        Where it is merely within tol of the optimum, a network that tells classes apart is worth more.
        """
        zero = problem.zero_network()
        report = problem.dual_point(problem.pack(zero), mu, problem.blur(mu))
        dual = problem.oracle(report.point).dual
        if dual < (1 - _EQUAL) * report.primal:
            return False
        run.report(primal=report.primal, dual=dual, network=zero, neurons=zero.size)
        return run.finished()

    def _measure(self, problem: Any, state: _State, run: Run) -> tuple[DualReport, OracleAnswer]:
        """Report the exact objective of the network at its best scaling, and the bound that it proves."""
        network, mu, began = state.network, state.mu, time.perf_counter()
        packed = problem.pack(network)
        report = problem.dual_point(packed, mu, problem.blur(mu), state.centre)
        run.multipliers = problem.multipliers(report.slopes, mu)
        answer = problem.oracle(report.point)
        peak = answer.bounds.amax(1) / problem.reg
        is_soon = state.wait < 1 and float(peak.median()) <= 1 + _REPAIR_MEDIAN * run.tol
        is_close = report.smoothing <= run.tol * report.primal and (is_soon or float(peak.amax()) <= _REPAIR_WORST)
        run.is_late = run.is_whole and run.out_of_time()
        run.was_late = run.was_late or run.is_late
        state.wait -= 1
        is_repaired = report.rows is not None and (is_close or run.is_late)
        if is_repaired:
            primal = min(run.primal, report.primal)
            limits: dict[str, Any] = {"late": run.is_late, "until": run.deadline}
            answer = problem.repair(report.rows, packed, answer, primal, run.tol, **limits)
            state.wait = math.log(max(1.0, (1 - answer.dual / primal) / run.tol), _REPAIR_PACE)
        scaled = replace(network, weights=network.weights * report.scale)
        run.report(primal=report.primal, dual=answer.dual, network=scaled, neurons=network.size)
        if is_repaired or report.rows is None:
            run.keep_back(_KEPT * (time.perf_counter() - began))
        return report, answer

    def _correct(self, problem: Any, state: _State, run: Run, most: int) -> bool:
        """Minimise the smoothed problem over the neurons of the network; returns whether to the state's accuracy."""
        is_kept = self._memory.holds(state.network.size, problem.d)
        looks = list(_AFRESH) if state.centre is None and is_kept else []
        left = most
        while True:
            before, piece = run.extra["evaluations"], min(left, looks.pop(0) if looks else left)
            reached, narrower = self._search(problem, state, run, piece)
            done = run.extra["evaluations"] - before
            left -= done
            if reached or left <= 0 or run.out_of_time() or not (narrower or done >= piece):
                return reached

    def _search(self, problem: Any, state: _State, run: Run, most: int) -> tuple[bool, bool]:
        """One search of :meth:`_correct`: whether it has converged, and whether it stopped for a narrower network."""
        reached = narrower = False
        network, mu, accuracy, centre = state.network, state.mu, state.accuracy, state.centre
        blur = problem.blur(mu)
        packed = problem.pack(network)
        done, looked, width = 0, 0, packed.signs.shape[1]

        def objective(vectors: Tensor) -> tuple[float, Tensor]:
            nonlocal done
            point = problem.evaluate(PackedNetwork.of(vectors, packed.signs), mu, blur, centre)
            done += 1
            return point.smoothed, point.gradient

        def converged(vectors: Tensor, gradient: Tensor) -> bool:
            nonlocal reached, looked, narrower
            scale = 2 * problem.reg
            square = vectors.square().sum(-1)
            if float(square.sum()) < _ZERO:
                reached = True
                return True
            growth = -(vectors * gradient).sum(-1) / square.clamp_min(1e-30)
            stationary = float(gradient.norm()) <= accuracy * scale * float(square.sum().sqrt())
            reached = stationary and float(growth.amax()) <= accuracy * scale
            if not reached and done >= looked + _LOOK:
                looked = done
                merged = merging(PackedNetwork.of(vectors, packed.signs), _NEARLY_SAME * run.tol)
                narrower = int((merged.signs != 0).sum(1).amax()) <= _NARROWER * width
            return reached or narrower

        pairs = self._memory.packed(packed, network, problem.dtype)
        vectors, evaluations = minimise(
            objective,
            packed.vectors,
            converged=converged,
            max_evaluations=most,
            stop=run.out_of_time,
            metric=problem.metric(packed, mu, blur, centre),
            pairs=pairs,
            noise=torch.finfo(problem.dtype).eps,
        )
        run.extra["evaluations"] += evaluations
        nearness = _NEARLY_SAME if narrower and not run.out_of_time() else _SAME
        merged = merging(PackedNetwork.of(vectors, packed.signs), nearness * run.tol)
        if merged.gone:
            moved = ((merged.rows(step), merged.rows(change)) for step, change in pairs)
            pairs = Corrections.of(moved, problem.dtype)
        after = merged.network().unpack()
        keep = after.weights.abs() > _DEAD * after.norm
        alive = (merged.vectors.norm(dim=-1) > 0) & (merged.signs != 0)
        self._memory.store(pairs, alive, keep)
        state.network = Network(after.directions[keep], after.weights[keep], after.function[keep])
        return reached, narrower

    def _width(self, problem: Any) -> int:
        return self.neurons or max(1, min(_NEURONS, _ALL_NEURONS // problem.num_functions))

    def _add(self, network: Network, answer: OracleAnswer, reg: float, most: int) -> Network:
        """Add the neurons that violate the bound, each with a small share of the network's norm."""
        function, sign, rank = (answer.values[..., :most] > reg).nonzero(as_tuple=True)
        self._memory.grow(len(sign))
        signs = torch.where(sign == 0, 1.0, -1.0).to(network.weights)
        weight = _NEW_SHARE * max(1.0, float(network.norm)) / max(1, len(sign))
        return Network(
            torch.cat([network.directions, answer.directions[function, sign, rank]]),
            torch.cat([network.weights, weight * signs]),
            torch.cat([network.function, function]),
        )


def _is_over(run: Run) -> bool:
    """Whether a run ends here: where the time is out, not before a measurement that knows it."""
    return run.finished() and (run.gap <= run.tol or run.stopped or run.is_late or not run.is_whole)


def _first_accuracy(run: Run) -> float:
    return min(_MOST_FIRST, max(_LEAST_FIRST, _FIRST_ACCURACY * run.tol))


def _sample_sizes(n: int, functions: int) -> list[int]:
    sizes = []
    size = max(_FIRST_SAMPLE, _SAMPLE_OF_FUNCTION * functions)
    while size * _LEAST_FACTOR <= n:
        sizes.append(size)
        size *= _SAMPLE_GROWTH
    return sizes


def _stalled(run: Run) -> bool:
    if len(run.history) <= _STALL_ITERATIONS:
        return False
    before, now = run.history[-1 - _STALL_ITERATIONS].gap, run.history[-1].gap
    return before - now < _STALL_PROGRESS * now
