"""Fully corrective column generation: the default solver.

Repeat: minimise the smoothed problem over the neurons that the network has (L-BFGS on v_j = sqrt|alpha_j| u_j, in
which the problem is smooth and unconstrained), read slopes and worst-case points off that minimum, ask the exact
oracle for the best neuron anywhere on the sphere, and either stop - its value proves that no wider network is
better - or go on: with a narrower smoothing where smoothing makes the gap, with the oracle's neurons added where a
missing neuron does. Neurons that have shrunk to nothing are dropped.

Every outer iteration yields a rigorous bound (problems/polynomial.py) and an exact objective, after the best scaling of
the output weights: margins are linear in them, so the scaling costs no further worst case.

Source: fully corrective Frank-Wolfe with a convex-gauge oracle (M. Jaggi, ICML 2013, section 3; F. Bach, JMLR 18
(2017)), smoothing with continuation (Y. Nesterov, 2005).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork
from convex_head.problems.base import Network
from convex_head.problems.polynomial import OracleAnswer
from convex_head.solvers.base import Run, Solver
from convex_head.solvers.lbfgs import minimise

_FIRST_WIDTH = 0.3
_WARM_WIDTH = 0.03
_SHRINK = 0.3
_NEW_SHARE = 1e-3
_NARROWEST = 1e-9
_FIRST_ACCURACY = 0.03
_SMOOTHING_SHARE = 0.6


class ColumnGeneration(Solver):
    """See the module docstring.

    Args:
        neurons: neurons of each sign and function to start from.
        max_iterations: bound on outer iterations.
        inner_evaluations: bound on evaluations of one inner minimisation.
    """

    name = "column_generation"

    def __init__(self, neurons: int = 4, max_iterations: int = 100, inner_evaluations: int = 1000):
        self.neurons = neurons
        self.max_iterations = max_iterations
        self.inner_evaluations = inner_evaluations

    def _solve(self, problem: Any, run: Run) -> None:
        warm = run.start is not None and run.start.size > 0
        network = run.start if warm else problem.random_network(self.neurons, run.seed)
        mu = _WARM_WIDTH if warm else _FIRST_WIDTH
        accuracy = _FIRST_ACCURACY
        for _ in range(self.max_iterations):
            network, converged = self._correct(problem, network, mu, accuracy, run)
            report = problem.dual_point(problem.pack(network), mu)
            answer = problem.oracle(report.point)
            scaled = replace(network, weights=network.weights * report.scale)
            run.report(primal=report.primal, dual=answer.dual, network=scaled, neurons=network.size)
            if run.finished() or mu < _NARROWEST:
                run.stalled = not run.finished()
                return
            if report.smoothing > _SMOOTHING_SHARE * run.tol * report.primal:
                mu *= _SHRINK
            elif converged:
                accuracy *= _SHRINK
            if converged:
                network = self._add(network, answer, problem.reg * (1 + 0.5 * accuracy))

    def _correct(self, problem: Any, network: Network, mu: float, accuracy: float, run: Run) -> tuple[Network, bool]:
        """Minimise the smoothed problem over the neurons of ``network``; also says whether to ``accuracy``."""
        reached = False
        packed = problem.pack(network)

        def objective(vectors: Tensor) -> tuple[float, Tensor]:
            point = problem.evaluate(PackedNetwork.of(vectors, packed.signs), mu)
            return point.smoothed, point.gradient

        def converged(vectors: Tensor, gradient: Tensor) -> bool:
            scale = 2 * problem.reg
            square = vectors.square().sum(-1)
            growth = -(vectors * gradient).sum(-1) / square.clamp_min(1e-30)
            nonlocal reached
            stationary = float(gradient.norm()) <= accuracy * scale * float(square.sum().sqrt())
            reached = stationary and float(growth.amax()) <= accuracy * scale
            return reached

        vectors, evaluations = minimise(
            objective,
            packed.vectors,
            converged=converged,
            max_evaluations=self.inner_evaluations,
            stop=run.out_of_time,
            metric=problem.metric(),
        )
        run.extra["evaluations"] = run.extra.get("evaluations", 0) + evaluations
        return _prune(PackedNetwork.of(vectors, packed.signs).unpack()), reached

    def _add(self, network: Network, answer: OracleAnswer, reg: float) -> Network:
        """Add the neurons that violate the bound, each with a small share of the network's norm."""
        function, sign = (answer.bounds > reg).nonzero(as_tuple=True)
        signs = torch.where(sign == 0, 1.0, -1.0).to(network.weights)
        weight = _NEW_SHARE * float(network.norm) / max(1, len(sign))
        return Network(
            torch.cat([network.directions, answer.directions[function, sign]]),
            torch.cat([network.weights, weight * signs]),
            torch.cat([network.function, function]),
        )


def _prune(network: Network) -> Network:
    keep = network.weights.abs() > 1e-8 * network.norm
    return Network(network.directions[keep], network.weights[keep], network.function[keep])
