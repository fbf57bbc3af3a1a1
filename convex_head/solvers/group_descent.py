"""Group-norm problems on fixed gates at scale: a working set of vectors, L-BFGS on v = |u| u, a bound for all of them.

At the optimum few vectors v_g differ from zero. So the problem is solved with all but a working set held at zero; then
the moments of the loss say for every vector left out whether it would lower the objective (problems/gates.py), those
that would do so most are taken in, and so on. The check is a lower bound of the whole problem at the same time: it
gives every vector its own best multipliers of its constraints.

Inside the working set the group norm is made smooth by the substitution v_g = |u_g| u_g, for which |v_g| = |u_g|^2
(the balanced weights of a ReLU neuron, as reg |v| = min reg (|w|^2 + a^2) / 2). In u the smoothed problem of width mu
is C^1 and L-BFGS applies. A stage ends when the smoothed problem is solved well enough for most of the gap to be due to
the smoothing. Then the smoothing of slopes and constraints is centred on their last values, the method of multipliers,
and that of the norms narrows.

Large data start with a sample of the examples, then with mini-batches (Adam on u), then go on with all examples: only
a pass over all of them gives a bound.

Hard constraints are solved by the penalty, which is exact for a weight above the largest multiplier, and its best point
is moved into the cones (solvers/cone_projection.py); the weight grows until that is good enough. Only points that
violate nothing by more than FEASIBLE (problems/relu.py) count, and the lower bound of the penalised problem is one of
the hard problem.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from convex_head.problems.gates import Centre, GateEvaluation, GateNetwork
from convex_head.solvers.base import Run, Solver
from convex_head.solvers.gate_metric import block_metric, shared_metric
from convex_head.solvers.lbfgs import Corrections, minimise

_FIRST_WIDTH, _SHRINK, _LAST_WIDTH = 1.0, 0.3, 0.03
_SHRINK_NORMS, _LEAST_WIDTH = 0.4, 1e-12
_BATCH_WIDTH, _LEARNING_RATE = 0.1, 5e-3
# A stage ends once this share of the gap is left to the smoothed problem itself.
_SHARE = 0.3
_EVALUATIONS, _STALLED_STAGES, _MEMORY = 50, 25, 50
# A stage's bound is that at the mean of so many last points, if it is better.
_MEAN = 25
# The working set is solved to this share of the gap of the whole problem, and grows by this share, or this many.
_INNER, _GROWTH, _NEW = 0.5, 1.0, 32
_MU_GAP, _NARROW_GAP = 3.0, 0.3
_DEAD = 1e-5
_FIRST_SLACK, _SLACK_GROWTH, _LAST_SLACK = 10.0, 10.0, 1e6
_SAMPLE_GAP, _SAMPLE_TIME = 0.1, 0.2
# From this tolerance on stages run in single precision; bounds and objectives that count never do.
_SINGLE = 5e-3
# The working set is solved with a little less reg: at most this share less, and at most this share of tol in the gap.
_EASE, _EASE_COST = 0.1, 0.3


class GroupDescent(Solver):
    """Working set and L-BFGS on v = |u| u.

    Args:
        batch: examples of a mini-batch.
        epochs: passes over the data in mini-batches.
        batches_above: number of examples from which on a sample of them and mini-batches come first.
        sample: examples of that sample.
    """

    name: ClassVar[str] = "group_descent"

    def __init__(self, batch: int = 500, epochs: int = 3, batches_above: int = 5_000, sample: int = 2_000):
        self.batch, self.epochs, self.batches_above, self.sample = batch, epochs, batches_above, sample

    def _solve(self, problem: Any, run: Run) -> None:
        hard = problem if getattr(problem, "slack", 0.0) == math.inf else None
        if hard is not None:
            problem = copy.copy(problem)
            problem.slack = _FIRST_SLACK
            run.report(primal=hard.objective(hard.zero()), dual=0.0, network=hard.zero(), neurons=0)
        self._minimise(problem, run, hard)
        if hard is not None:
            from convex_head.solvers.gates_socp import check_alive

            check_alive(hard, run.network.vectors, problem.n)

    def _minimise(self, problem: Any, run: Run, hard: Any) -> None:
        start = problem.zero() if run.start is None else run.start
        if problem.n < self.batches_above:
            _WorkingSet(problem, run, start, hard).solve()
            return
        generator = torch.Generator().manual_seed(run.seed)
        if run.start is None:
            few = run.trial(max(run.tol, _SAMPLE_GAP))
            few.max_seconds = None if run.max_seconds is None else _SAMPLE_TIME * run.max_seconds
            rows = torch.randperm(problem.n, generator=generator)[: self.sample].to(problem.x.device)
            _WorkingSet(problem.rows(rows), few, start).solve()
            start = start if few.network is None else few.network
        state = _WorkingSet(problem, run, start, hard)
        self._mini_batches(state, generator)
        state.solve()

    def _mini_batches(self, state: _WorkingSet, generator: torch.Generator) -> None:
        """Adam on u over mini-batches of the smoothed problem, in the working set."""
        u, reg = state.u.clone(), state.problem.reg
        first, second, steps = torch.zeros_like(u), torch.zeros_like(u), 0
        for _ in range(self.epochs):
            for rows in torch.randperm(state.problem.n, generator=generator).split(self.batch):
                if state.run.finished():
                    break
                steps += 1
                part = state.quick.rows(rows.to(u.device))
                vectors = _squared(u)
                found, _ = part.evaluate(vectors, _BATCH_WIDTH, _BATCH_WIDTH, part.centre())
                gradient = _through_root(u, found.gradient) + 2 * reg * u
                first = 0.9 * first + 0.1 * gradient
                second = 0.99 * second + 0.01 * gradient.square()
                scale = (second / (1 - 0.99**steps)).sqrt() + 1e-8
                u -= _LEARNING_RATE / (1 - 0.9**steps) * first / scale
        before = state.primal
        state.look(_squared(u), exactly=True)
        if state.primal < before:
            state.u = u


class _WorkingSet:
    """Vectors that may differ from zero, the best point and the best bound so far."""

    def __init__(self, problem: Any, run: Run, start: GateNetwork, hard: Any = None):
        self.problem, self.run, self.hard = problem, run, hard
        self.best, self.primal, self.dual = start.vectors, problem.objective(start), 0.0
        self.mu, self.narrow = _FIRST_WIDTH, _FIRST_WIDTH
        self.slopes = problem.centre().slopes
        self.evaluations = self.lost = self.checks = 0
        x = problem.x.double()
        self.spectrum = torch.linalg.eigh(x.mT @ x / problem.n)
        alive = start.vectors.norm(dim=-1) > 0
        alive[:: len(problem.gates)] = True  # the gate that is always on
        alive |= problem.flip is not None  # there the check outside is crude, and few vectors are zero
        self.groups = alive.nonzero()
        vectors = start.vectors[self.groups[:, 0], self.groups[:, 1]]
        self.restrict()
        self.shares = self.part.centre().shares
        self.solved, self.inner = False, 0.0
        self.point = vectors
        self.pairs = Corrections(_MEMORY)
        self.look(vectors, exactly=True)
        unit = 0.1 * _unit(-self.last.gradient)
        self.u = torch.where(vectors.norm(dim=-1, keepdim=True) > 0, _root(vectors), unit)

    def look(self, vectors: Tensor, *, exactly: bool = False) -> GateEvaluation:
        part = self.part if exactly else self.quick
        found: GateEvaluation
        found, self.next = part.evaluate(vectors, self.mu, self.narrow, Centre(self.slopes, self.shares))
        self.evaluations += 1
        if part.dtype == torch.float64:
            self.inner = max(self.inner, found.dual)
            if found.primal < self.primal:
                self.primal, self.best = found.primal, self._full(vectors)
        self.last = found
        return found

    def restrict(self) -> None:
        """The problem on the working set, in both precisions."""
        self.part = self.problem.restricted(self.groups)
        single = self.run.tol >= _SINGLE and self.hard is None
        self.quick = self.part.cast(torch.float32) if single else self.part

    def _full(self, vectors: Tensor) -> Tensor:
        full = torch.zeros_like(self.best)
        full[self.groups[:, 0], self.groups[:, 1]] = vectors
        return full

    def solve(self) -> None:
        """Inside and outside in turns."""
        self.report()
        while not self.run.finished() and not self.run.stalled:
            self.solve_inside()
            self.look_outside()
            self.report()
            if self.hard is not None:
                self.look_at_cones()

    def look_at_cones(self) -> None:
        """Where the penalised problem is solved, or as well as it can be: its best point moved into the cones.

        If that is not good enough, violations weigh more from here on; multipliers and the feasible point stay.
        """
        from convex_head.solvers.cone_projection import into_cones

        solved = self.primal - self.dual <= self.run.tol * self.primal
        if self.run.gap <= self.run.tol or not (solved or self.run.stalled):
            return
        network = into_cones(self.hard, _prune(GateNetwork(self.problem.gates, self.best)), self.run.finished)
        self.run.report(primal=self.hard.objective(network), dual=self.dual, network=network, neurons=network.size)
        if self.run.gap <= self.run.tol or not solved:
            return
        self.problem.slack *= _SLACK_GROWTH
        self.run.stalled = self.problem.slack > _LAST_SLACK
        self.restrict()
        self.shares = self.shares / _SLACK_GROWTH
        self.best = network.vectors
        self.primal = self.problem.objective(network)
        vectors = self.best[self.groups[:, 0], self.groups[:, 1]]
        self.u = torch.where(vectors.norm(dim=-1, keepdim=True) > 0, _root(vectors), self.u)
        self.pairs.clear()

    # -- inside -----------------------------------------------------------------------------------------------

    def solve_inside(self) -> None:
        """Stages until the working set is solved well enough to look outside."""
        lost, self.inner = 0, 0.0
        everything = len(self.groups) == len(self.best.flatten(0, 1))
        while not self.run.finished():
            before = self.primal - self.inner
            self.descend()
            self.revive()
            left = self.primal - self.inner
            if everything:
                self.dual = max(self.dual, self.inner)
                self.report()
            elif left <= _INNER * max(self.run.tol * self.primal, self.primal - self.dual):
                return
            lost = lost + 1 if left > 0.99 * before and not self.solved else 0
            if lost >= _STALLED_STAGES or self.narrow < _LEAST_WIDTH:
                self.run.stalled = True
                return
            self.advance()

    def descend(self) -> None:
        """One stage, and what its points are worth.

        The moments of single points overshoot from step to step, and the longest of them scales the bound. At the mean
        of the last points most of that cancels; the best bound of a stage is often many times closer there.
        """
        recent: deque[Tensor] = deque(maxlen=_MEAN)
        self.look(_squared(self.u))
        metric, easier = self._metric(), self._easier()
        less = self.problem.reg - easier

        def objective(u: Tensor) -> tuple[float, Tensor]:
            recent.append(_squared(u))
            found = self.look(recent[-1])
            return found.smooth - less * float(u.square().sum()), _through_root(u, found.gradient) + 2 * easier * u

        def done(u: Tensor, gradient: Tensor) -> bool:
            found = self.last
            primal, inner = min(found.primal, self.primal), max(self.inner, found.dual)
            smooth = found.smooth - less * float(u.square().sum())
            self.solved = smooth - found.dual <= _SHARE * (primal - found.dual)
            return self.solved or primal - inner <= _INNER * self.run.tol * primal

        self.u = minimise(
            objective,
            self.u,
            converged=done,
            max_evaluations=_EVALUATIONS,
            stop=self.run.finished,
            metric=metric,
            pairs=self.pairs,
        )[0]
        ends = [_squared(self.u), torch.stack([*recent, _squared(self.u)]).mean(0)]
        bounds = [self.look(end, exactly=True).dual for end in ends]
        self.point = ends[bounds.index(max(bounds))]
        if self.point is ends[0]:
            self.look(self.point, exactly=True)
        norm = float(self.point.norm(dim=-1).sum())
        left = self.primal - self.last.dual
        self.solved = self.solved or self.last.smooth - less * norm - self.last.dual <= _SHARE * left

    def _easier(self) -> float:
        """A smaller reg: moments may then be longer than intended and yet within reg, for a known part of the gap."""
        if self.hard is not None:
            return float(self.problem.reg)
        norm = self.problem.reg * float(self.u.square().sum())
        return self.problem.reg * (1 - min(_EASE, _EASE_COST * self.run.tol * self.primal / max(norm, 1e-300)))

    def _metric(self) -> Callable[[Tensor], Tensor]:
        if self.problem.flip is None:
            return block_metric(self.part, self.u, self.mu, self.narrow, self.next)
        return shared_metric(self.part, self.u, self.mu, self.next, self.spectrum)

    def advance(self) -> None:
        """Centre the smoothing on the last maximisers, and shrink its widths."""
        self.slopes, self.shares = self.next.slopes, self.next.shares
        gap = (self.primal - self.inner) / max(1e-12, self.primal)
        if self.solved:
            self.mu = min(self.mu, max(_LAST_WIDTH, _SHRINK * self.mu, _MU_GAP * gap))
            self.narrow *= _SHRINK_NORMS

    def revive(self) -> None:
        """Set vectors off again that died although their moments are longer than reg."""
        moment = -self.last.gradient
        size = self.u.norm(dim=-1, keepdim=True)
        dead = (size < 1e-3 * size.max().clamp_min(1e-3)) & (moment.norm(dim=-1, keepdim=True) > self.problem.reg)
        self.u = torch.where(dead, 0.03 * size.max().clamp_min(1e-2) * _unit(moment), self.u)

    # -- outside ----------------------------------------------------------------------------------------------

    def look_outside(self) -> None:
        """Bound of the whole problem, and the vectors that it asks for."""
        problem, reg = self.problem, self.problem.reg
        vectors = self.point
        # Slopes, shares and gradient of this very point: a bound needs them of one piece.
        self.look(vectors, exactly=True)
        centre = Centre(self.slopes, None)
        found, _ = problem.evaluate(self._full(vectors), self.mu, self.narrow, centre, loss_only=True)
        sizes, moments = problem.support(-found.gradient.flatten(0, 1), reg)
        sizes, moments = sizes.view(problem.shape[:2]), moments.view(problem.shape)
        rows, columns = self.groups.unbind(1)
        inside = torch.minimum(sizes[rows, columns], self.last.gradient.norm(dim=-1))
        sizes[rows, columns] = inside
        self.dual = max(self.dual, problem.bound(found, float(sizes.max())))
        self.checks += 1
        outside = sizes.clone()
        outside[rows, columns] = 0
        wanted = (outside > reg * (1 + 0.1 * self.run.tol)).nonzero()
        order = outside[wanted[:, 0], wanted[:, 1]].argsort(descending=True)
        new = wanted[order[: max(_NEW, int(_GROWTH * len(rows)))]]
        size = self.u.norm(dim=-1)
        keep = (size.square() > _DEAD * size.max().square()) | (inside > 0.99 * reg) | (rows % len(problem.gates) == 0)
        keep |= problem.flip is not None
        if len(new) == 0 and bool(keep.all()):
            return
        start = 0.03 * size.max().clamp_min(1e-2) * _unit(moments[new[:, 0], new[:, 1]])
        self.groups = torch.cat([self.groups[keep], new])
        self.u = torch.cat([self.u[keep], start])
        self.restrict()
        self.pairs.clear()
        gap = (self.primal - self.dual) / max(1e-12, self.primal)
        self.mu = max(self.mu, min(_FIRST_WIDTH, _MU_GAP * gap))
        self.narrow = max(self.narrow, _NARROW_GAP * gap)
        if self.shares is not None:
            kept = self.shares[:, keep]
            self.shares = torch.cat([kept, kept.new_zeros(len(kept), len(new))], dim=1)

    def report(self) -> None:
        self.run.extra |= {"evaluations": self.evaluations, "checks": self.checks, "working_set": len(self.groups)}
        network = _prune(GateNetwork(self.problem.gates, self.best))
        primal = self.primal if self.hard is None else self.hard.objective(network)
        self.run.report(primal=primal, dual=self.dual, network=network, neurons=network.size)


def _through_root(u: Tensor, gradient: Tensor) -> Tensor:
    """Gradient with respect to u of a function of v = |u| u, from that with respect to v."""
    size = u.norm(dim=-1, keepdim=True)
    return size * gradient + (u * gradient).sum(-1, keepdim=True) / size.clamp_min(1e-300) * u


def _squared(u: Tensor) -> Tensor:
    """v = |u| u."""
    return u.norm(dim=-1, keepdim=True) * u


def _unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True).clamp_min(1e-300)


def _root(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True).clamp_min(1e-300).sqrt()


def _prune(network: GateNetwork) -> GateNetwork:
    size = network.vectors.norm(dim=-1, keepdim=True)
    return GateNetwork(network.gates, torch.where(size > 1e-9 * size.max(), network.vectors, 0.0))
