"""Cutting sets: the convex program with finitely many points an example, the exact oracle adding the next.

The master keeps a finite set P_ik of points of each ball and solves

    minimise  mean loss(w) + reg * sum_c (z4_c + z4'_c)   subject to   w_ik <= h_ik(p) for all p in P_ik,

a relaxation of the robust problem whose only matrix constraints are the 2F moments Z_c, Z'_c (conic.py).
The oracle returns the worst point of every ball for the master's network (one trust-region subproblem each);
those that violate their margin join P, those without a multiplier leave it. The network's exact objective is an
upper bound; the multipliers, as weights of their points, give the lower bound. Source: A. Mutapcic and S. Boyd,
"Cutting-set methods for robust convex optimization with pessimizing oracles", Optim. Methods Softw. 24 (2009).
"""

from __future__ import annotations

from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch

from convex_head.problems.base import Network
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers.base import Run, Solver
from convex_head.solvers.conic import (
    certify,
    form_signs,
    moment_variables,
    network_of,
    pick_conic_solver,
    quadratic_coefficients,
    report_start,
    robust_objective,
    solve_conic,
    values_at,
)


@dataclass(frozen=True)
class Cuts:
    """Points p of the balls: ``points`` (P, d) and the flat margin index ``owner`` (P,) = i K + k of each."""

    points: np.ndarray
    owner: np.ndarray

    def keep(self, rows: np.ndarray) -> Cuts:
        """The cuts at these positions."""
        return Cuts(self.points[rows], self.owner[rows])

    def add(self, points: np.ndarray, owner: np.ndarray) -> Cuts:
        """These cuts and more."""
        return Cuts(np.concatenate([self.points, points]), np.concatenate([self.owner, owner]))


class CuttingSet(Solver):
    """See the module docstring.

    Args:
        conic_solver: CVXPY's name of a conic solver, or None for MOSEK or CLARABEL.
        max_iterations: bound on master problems.
        rank_tol: eigenvalues of Z below this share of the largest are the conic solver's noise.
    """

    name = "cutting_set"

    def __init__(self, conic_solver: str | None = None, max_iterations: int = 100, rank_tol: float = 1e-7):
        self.conic_solver = conic_solver
        self.max_iterations = max_iterations
        self.rank_tol = rank_tol

    def _solve(self, problem: PolynomialProblem, run: Run) -> None:
        conic_solver = pick_conic_solver(self.conic_solver, 0)
        signs = form_signs(problem.labels.cpu().numpy(), problem.num_classes, problem.loss)
        report_start(problem, run)
        features = problem.features.cpu().numpy()
        count = problem.n * problem.num_margins
        cuts = Cuts(np.repeat(features, problem.num_margins, axis=0), np.arange(count))
        if run.start is not None:
            _, points = problem.worst_case(run.start)
            cuts = cuts.add(points.reshape(count, -1).cpu().numpy(), np.arange(count))
        for _ in range(self.max_iterations):
            master = Master(problem, cuts, signs)
            if run.finished() or not solve_conic(master.program, conic_solver, run):
                return
            network = network_of(master.positive, master.negative, problem, self.rank_tol)
            primal = problem.objective(network)
            dual = certify(problem, signs, master.multipliers())
            run.report(primal=primal, dual=dual, network=network, neurons=network.size)
            run.extra["points"] = len(cuts.points)
            found = _violated(problem, network, master.margin_values(), run.tol * run.primal)
            if len(found.owner) == 0:
                run.stalled = not run.finished()
                return
            cuts = cuts.keep(master.active(count)).add(found.points, found.owner)


class Master:
    """The program with the points of ``cuts``: ``program``, and after it is solved its parts as arrays."""

    def __init__(self, problem: PolynomialProblem, cuts: Cuts, signs: np.ndarray):
        n, num_forms, num_functions = signs.shape
        self._problem, self._cuts = problem, cuts
        self.positive, self.negative, constraints = moment_variables(num_functions, problem.d)
        quadratics = quadratic_coefficients(self.positive, self.negative, problem.coefficients)
        self._margins = cp.Variable((n, num_forms))
        rows = signs.reshape(-1, num_functions)[cuts.owner]
        values = values_at(cuts.points, rows) @ quadratics
        self._bound = cp.vec(self._margins, order="C")[cuts.owner] <= values
        objective = robust_objective(self._margins, self.positive, self.negative, problem.loss, problem.reg)
        self.program = cp.Problem(cp.Minimize(objective), [*constraints, self._bound])

    def margin_values(self) -> np.ndarray:
        """(n K,) the margins w_ik that the master believes."""
        return np.asarray(self._margins.value).reshape(-1)

    def active(self, always: int) -> np.ndarray:
        """Positions of the first ``always`` cuts, which bound every margin, and of those with a multiplier."""
        weights = np.asarray(self._bound.dual_value)
        return np.flatnonzero((weights > 1e-4 / self._problem.n) | (np.arange(len(weights)) < always))

    def multipliers(self) -> np.ndarray:
        """(n, K, d+1, d+1) moments of the steps to the points, weighted by their bounds' multipliers."""
        problem, cuts = self._problem, self._cuts
        weights = np.maximum(np.asarray(self._bound.dual_value), 0.0)
        centres = problem.features.cpu().numpy()[cuts.owner // problem.num_margins]
        steps = np.concatenate([cuts.points - centres, np.ones((len(weights), 1))], axis=1)
        outer = np.einsum("pa,pb->pab", steps, steps).reshape(len(weights), -1)
        shape = (problem.n * problem.num_margins, len(weights))
        gather = sp.csr_array((weights, (cuts.owner, np.arange(len(weights)))), shape=shape)
        size = problem.d + 1
        return (gather @ outer).reshape(problem.n, problem.num_margins, size, size)


def _violated(problem: PolynomialProblem, network: Network, margins: np.ndarray, slack: float) -> Cuts:
    """Worst points whose value is below the margin that the master believes, where the hinge sees it.

    Violations that all lie below a tenth of ``slack`` cannot keep the gap open.
    """
    worst, points = problem.worst_case(network)
    value = worst.reshape(-1).cpu().numpy()
    owner = np.flatnonzero(value < np.minimum(margins, 1.0) - 0.1 * slack)
    chosen = points.reshape(-1, problem.d)[torch.from_numpy(owner).to(points.device)]
    return Cuts(chosen.cpu().numpy(), owner)
