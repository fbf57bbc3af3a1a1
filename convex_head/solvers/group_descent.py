"""Group-norm problems on fixed gates at scale: L-BFGS on v = |u| u, smoothing that shrinks, a bound in every step.

The group norm is made smooth by the substitution v_g = |u_g| u_g, for which |v_g| = |u_g|^2 (the balanced weights of a
ReLU neuron, as reg |v| = min reg (|w|^2 + a^2) / 2). In u the smoothed problem of width mu is C^1 and L-BFGS applies;
its only new stationary points have u_g = 0 for a group whose moment m_g is longer than reg, and those are set off again
along m_g. Each gradient is also a dual point (problems/gates.py), so the relative gap is known all the time: a stage
ends when the smoothed problem is solved well enough for most of the gap to be due to the smoothing. Then the smoothing
of slopes and constraints is centred on their last values, the method of multipliers, and that of the norms narrows.

Large data start with mini-batches (Adam on u), then go on with all examples: only a pass over all of them gives a
bound.

Hard constraints are not for this solver: it approaches feasible points without reaching one.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from convex_head.errors import UnknownSolverError
from convex_head.problems.gates import GateEvaluation, GateNetwork
from convex_head.solvers.base import Run, Solver
from convex_head.solvers.lbfgs import minimise

_FIRST_WIDTH, _SHRINK, _LAST_WIDTH = 1.0, 0.3, 0.1
_SHRINK_NORMS, _LEAST_WIDTH = 0.4, 1e-12
_BATCH_WIDTH, _LEARNING_RATE = 0.1, 5e-3
# A stage ends once this share of the gap is left to the smoothed problem itself.
_SHARE = 0.3
_EVALUATIONS, _STALLED_STAGES = 150, 10


class GroupDescent(Solver):
    """L-BFGS on v = |u| u with a lower bound from every gradient.

    Args:
        batch: examples of a mini-batch of the first phase.
        epochs: passes over the data of the first phase.
        batches_above: number of examples from which on there is a first phase.
    """

    name: ClassVar[str] = "group_descent"

    def __init__(self, batch: int = 500, epochs: int = 3, batches_above: int = 5_000):
        self.batch, self.epochs, self.batches_above = batch, epochs, batches_above

    def _solve(self, problem: Any, run: Run) -> None:
        if getattr(problem, "slack", 0.0) == math.inf:
            raise UnknownSolverError("group_descent needs a finite slack; found inf. Use solver='socp', or slack=100.")
        start = problem.zero() if run.start is None else run.start
        state = _State(problem, run, start)
        first = state.look(start.vectors)
        state.report()
        u = _root(start.vectors) if run.start is not None else 0.1 * _unit(-first.gradient)
        if problem.n >= self.batches_above:
            u = self._mini_batches(problem, run, u)
        lost = 0
        while not run.finished():
            before = run.gap
            u = state.descend(u)
            state.report()
            u = state.revive(u)
            lost = lost + 1 if run.gap > 0.99 * before and not state.solved else 0
            run.stalled = lost >= _STALLED_STAGES or state.narrow < _LEAST_WIDTH
            if run.stalled:
                return
            state.advance()

    def _mini_batches(self, problem: Any, run: Run, u: Tensor) -> Tensor:
        """Adam on mini-batches of the smoothed problem."""
        generator = torch.Generator().manual_seed(run.seed)
        u = u.clone()
        first, second, steps = torch.zeros_like(u), torch.zeros_like(u), 0
        for _ in range(self.epochs):
            for rows in torch.randperm(problem.n, generator=generator).split(self.batch):
                if run.finished():
                    return u
                steps += 1
                part = problem.rows(rows.to(u.device))
                size = u.norm(dim=-1, keepdim=True)
                found, _ = part.evaluate(size * u, _BATCH_WIDTH, _BATCH_WIDTH, part.centre())
                gradient = _through_root(u, found.gradient) + 2 * problem.reg * u
                first = 0.9 * first + 0.1 * gradient
                second = 0.99 * second + 0.01 * gradient.square()
                scale = (second / (1 - 0.99**steps)).sqrt() + 1e-8
                u -= _LEARNING_RATE / (1 - 0.9**steps) * first / scale
        return u


class _State:
    """Best point and bound so far; L-BFGS stages."""

    def __init__(self, problem: Any, run: Run, start: GateNetwork):
        self.problem, self.run = problem, run
        self.best, self.primal = start, problem.objective(start)
        self.dual = 0.0
        self.mu, self.narrow = _FIRST_WIDTH, _FIRST_WIDTH
        self.centre = self.next_centre = problem.centre()
        self.solved = False
        self.last: GateEvaluation | None = None
        self.evaluations = 0
        moment = problem.x.double().mT @ problem.x.double() / problem.n
        eye = torch.eye(problem.d + 1, dtype=torch.float64, device=moment.device)
        self.metric = torch.linalg.inv(moment + 0.1 * eye)

    def look(self, vectors: Tensor) -> GateEvaluation:
        found: GateEvaluation
        found, self.next_centre = self.problem.evaluate(vectors, self.mu, self.narrow, self.centre)
        self.evaluations += 1
        self.dual = max(self.dual, found.dual)
        if found.primal < self.primal:
            self.primal, self.best = found.primal, GateNetwork(self.problem.gates, vectors.clone())
        self.last = found
        return found

    def descend(self, u: Tensor) -> Tensor:
        def objective(u: Tensor) -> tuple[float, Tensor]:
            size = u.norm(dim=-1, keepdim=True)
            found = self.look(size * u)
            return found.smooth, _through_root(u, found.gradient) + 2 * self.problem.reg * u

        def done(u: Tensor, gradient: Tensor) -> bool:
            assert self.last is not None
            found = self.last
            left = min(found.primal, self.primal) - found.dual
            self.solved = found.smooth - found.dual <= _SHARE * left
            return self.solved or self.gap() <= self.run.tol

        return minimise(
            objective,
            u,
            converged=done,
            max_evaluations=_EVALUATIONS,
            stop=self.run.finished,
            metric=lambda gradient: gradient @ self.metric,
        )[0]

    def advance(self) -> None:
        """Centre the smoothing on the last maximisers, and shrink its widths."""
        self.centre = self.next_centre
        self.mu = max(_LAST_WIDTH, _SHRINK * self.mu)
        if self.solved:
            self.narrow *= _SHRINK_NORMS

    def gap(self) -> float:
        return (self.primal - self.dual) / max(1e-12, self.primal)

    def revive(self, u: Tensor) -> Tensor:
        assert self.last is not None
        moment = -self.last.gradient
        size = u.norm(dim=-1, keepdim=True)
        dead = (size < 1e-3 * size.max().clamp_min(1e-3)) & (moment.norm(dim=-1, keepdim=True) > self.problem.reg)
        return torch.where(dead, 0.03 * size.max().clamp_min(1e-2) * _unit(moment), u)

    def report(self) -> None:
        self.run.extra["evaluations"] = self.evaluations
        network = _prune(self.best)
        self.run.report(primal=self.primal, dual=self.dual, network=network, neurons=network.size)


def _through_root(u: Tensor, gradient: Tensor) -> Tensor:
    """Gradient with respect to u of a function of v = |u| u, from that with respect to v."""
    size = u.norm(dim=-1, keepdim=True)
    return size * gradient + (u * gradient).sum(-1, keepdim=True) / size.clamp_min(1e-300) * u


def _unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True).clamp_min(1e-300)


def _root(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True).clamp_min(1e-300).sqrt()


def _prune(network: GateNetwork) -> GateNetwork:
    size = network.vectors.norm(dim=-1, keepdim=True)
    return GateNetwork(network.gates, torch.where(size > 1e-9 * size.max(), network.vectors, 0.0))
