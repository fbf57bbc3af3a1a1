"""Networks that violate hard cone constraints a little, moved into the cones (CVXPY).

A penalty solves hard constraints up to its tolerance, so that its points are next to the cones and not in them. Each
vector has a cone of its own,

    (2 d_ip - 1) xt_i'v >= r |v|_*        for every example i,

and its nearest point there is a small program. Cones are convex and the objective is continuous on them: what is lost
is in the order of the violation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import cvxpy as cp
import numpy as np
import torch

from convex_head.problems.gates import GateNetwork
from convex_head.problems.relu import FEASIBLE, ReluProblem

# Shares of FEASIBLE: what programs allow, and from where on a vector is moved. The rest is for the conic solver's own
# tolerance and for rounding.
_ALLOWED, _MOVED = 0.25, 0.5


def into_cones(problem: ReluProblem, network: GateNetwork, stop: Callable[[], bool]) -> GateNetwork:
    """The network with every vector that violates a constraint replaced by the nearest one that does not.

    A vector whose program has no answer becomes zero, which violates nothing.

    Args:
        problem: whose examples and gates make the constraints; its slack does not count.
        network: any network on its gates.
        stop: asked before every program; vectors that are left then stay as they are.
    """
    vectors, x = network.vectors.clone(), problem.x.double().cpu().numpy()
    sides = problem.sides.double().cpu().numpy()
    for group, function in (problem.largest_violations(network) > _MOVED * FEASIBLE).nonzero().tolist():
        if stop():
            break
        cone = sides[:, group % sides.shape[1], None] * x
        vectors[group, function] = torch.from_numpy(_nearest(vectors[group, function], cone, problem)).to(vectors)
    return GateNetwork(network.gates, vectors)


def _nearest(vector: torch.Tensor, cone: np.ndarray, problem: ReluProblem) -> np.ndarray:
    """The point of the cone next to a vector (d + 1,), or zero."""
    v = cp.Variable(len(vector))
    size = cp.norm(v[:-1], 1 if problem.ball == "linf" else 2)
    inside = cone @ v >= problem.radius * size - _ALLOWED * FEASIBLE
    program = cp.Problem(cp.Minimize(cp.sum_squares(v - vector.double().cpu().numpy())), [inside])
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            program.solve(solver="CLARABEL")
    except cp.SolverError:
        return np.zeros(len(vector))
    return np.zeros(len(vector)) if v.value is None else np.asarray(v.value)
