"""The exact second-order cone program of a network on fixed gates, in CVXPY: the reference for small problems.

With the margins of problems/gates.py, D_ik the vector that acts on example i in form k, and one epigraph variable for
every norm and maximum:

    minimise  (1/n) sum_i loss(w_i) + reg sum_g |v_g| + (slack/n) sum_ig z_ig
    w_ik = xt_i'D_ik - r q_ik - sum_{p in U_i} u_ipk       |D_ik|_* <= q_ik
    u_ipk >= r N_pk - xt_i'D_pk,  u >= 0                   |D_pk|_* <= N_pk     (gated ReLU, gates that can flip)
    z_ig >= r c_g - (2 d_ip - 1) xt_i'v_g,  z >= 0         |v_g|_* <= c_g       (ReLU; slack = inf: z = 0)

Its multipliers are slopes, points of the ball, shares of flipped gates and weights of the constraints; pulled back into
their sets they give the moments m_g of problems/gates.py, hence a rigorous lower bound whatever the conic solver says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import cvxpy as cp
import numpy as np
import torch

from convex_head.errors import InfeasibleError
from convex_head.problems.gates import GateNetwork
from convex_head.solvers.base import Run, Solver
from convex_head.solvers.conic import pick_conic_solver, solve_conic

_ZERO = 1e-6
_ROWS = 20


class GatesSOCP(Solver):
    """CVXPY with an interior-point solver (Clarabel, or MOSEK where installed)."""

    name: ClassVar[str] = "socp"

    def _solve(self, problem: Any, run: Run) -> None:
        hard = getattr(problem, "slack", 0.0) == math.inf
        if hard:
            check_alive(problem, problem.zero().vectors, _ROWS * problem.d)
        start = problem.zero() if run.start is None else run.start
        run.report(primal=problem.objective(start), dual=0.0, network=start, neurons=start.size)
        program = _Program(problem)
        if not solve_conic(program.program, pick_conic_solver(None, 0), run):
            return
        vectors = np.stack([np.asarray(v.value) for v in program.vectors], axis=1)
        size = np.linalg.norm(vectors, axis=-1, keepdims=True)
        found = torch.from_numpy(np.where(size > _ZERO * max(1.0, size.max()), vectors, 0.0)).to(problem.gates)
        if hard:
            check_alive(problem, found, problem.n)
        network = GateNetwork(problem.gates, found)
        run.report(primal=problem.objective(network), dual=program.bound(), network=network, neurons=network.size)


@dataclass
class _Norm:
    """Constraint |rows of X|_* <= t with the multipliers of its points."""

    size: cp.Variable
    rows: cp.Expression
    constraints: list[Any]
    ball: str

    @staticmethod
    def of(rows: cp.Expression, ball: str) -> _Norm:
        size = cp.Variable(rows.shape[0])
        if ball == "linf":
            absolute = cp.Variable(rows.shape)
            return _Norm(size, rows, [rows <= absolute, -rows <= absolute, cp.sum(absolute, axis=1) <= size], ball)
        return _Norm(size, rows, [cp.SOC(size, rows, axis=1)], ball)

    def points(self, cap: np.ndarray) -> np.ndarray:
        """(rows, d) points of weight ``cap`` (rows,), already times the radius, inside their ball."""
        if self.ball == "linf":
            points = self.constraints[1].dual_value - self.constraints[0].dual_value
            return np.clip(points, -cap[:, None], cap[:, None])
        points = np.reshape(self.constraints[0].dual_value[1], self.rows.shape)
        size = np.linalg.norm(points, axis=1, keepdims=True)
        return points * np.minimum(1.0, cap[:, None] / np.maximum(size, 1e-300))


class _Program:
    """Variables, constraints and multipliers."""

    def __init__(self, problem: Any):
        self.problem = problem
        self.x, self.on = _numpy(problem.x), _numpy(problem.on)
        self.flip = None if problem.flip is None else _numpy(problem.flip)
        groups, functions, wide = problem.shape
        self.count = self.on.shape[1]
        self.signs = self._signs()
        self.vectors = [cp.Variable((groups, wide)) for _ in range(functions)]
        self.theta = [v[: self.count] - v[self.count :] if problem.signs == 2 else v for v in self.vectors]
        self.constraints: list[Any] = []
        margins = [self._margin(k) for k in range(self.signs.shape[1])]
        objective = self._loss(margins) + problem.reg * sum(cp.sum(cp.norm(v, axis=1)) for v in self.vectors)
        self.cones: list[tuple[_Norm, list[Any]]] = []
        if problem.signs == 2:
            objective = objective + self._penalty()
        self.program = cp.Problem(cp.Minimize(objective), self.constraints)

    def _signs(self) -> np.ndarray:
        """B (n, K, F)."""
        p = self.problem
        signs = torch.zeros(p.n, p.num_margins, p.num_functions, dtype=torch.float64)
        if p.pairwise:
            signs.scatter_(2, p.others.cpu()[..., None], -1)
            signs[torch.arange(p.n), :, p.labels.cpu()] = 1
        else:
            signs.diagonal(dim1=1, dim2=2).copy_(p.sign.cpu().double())
        return signs.numpy()

    def _margin(self, k: int) -> cp.Expression:
        p, sign = self.problem, self.signs[:, k]
        used = [f for f in range(p.num_functions) if sign[:, f].any()]
        form = sum((sign[:, f : f + 1] * self.on) @ self.theta[f] for f in used)
        margin = cp.sum(cp.multiply(self.x, form), axis=1)
        norm = None
        if p.radius > 0:
            norm = _Norm.of(form[:, :-1], p.ball)
            self.constraints += norm.constraints
            margin = margin - p.radius * norm.size
        self.norms = [*getattr(self, "norms", []), norm]
        return margin - self._flipped(k) if self.flip is not None else margin

    def _flipped(self, k: int) -> cp.Expression:
        """sum_p u_ipk."""
        p, sign = self.problem, self.signs[:, k]
        if not hasattr(self, "pair_norms"):
            self.pair_norms: dict[bytes, _Norm] = {}
            self.flipped: list[list[tuple[np.ndarray, np.ndarray, Any]]] = []
        assert self.flip is not None
        total: Any = 0
        pieces = []
        for pattern in np.unique(sign, axis=0):
            rows = np.flatnonzero((sign == pattern).all(axis=1))
            difference = sum(pattern[f] * self.theta[f] for f in np.flatnonzero(pattern))
            key = pattern.tobytes()
            if key not in self.pair_norms:
                self.pair_norms[key] = _Norm.of(difference[:, :-1], p.ball)
                self.constraints += self.pair_norms[key].constraints
            lost = cp.Variable((len(rows), self.count), nonneg=True)
            mask = self.flip[rows]
            short = p.radius * (mask @ cp.diag(self.pair_norms[key].size)) - cp.multiply(
                mask, self.x[rows] @ difference.T
            )
            constraint = short <= lost
            self.constraints.append(constraint)
            pieces.append((rows, pattern, constraint))
            spread = np.zeros((p.n, len(rows)))
            spread[rows, np.arange(len(rows))] = 1
            total = total + spread @ cp.sum(lost, axis=1)
        self.flipped.append(pieces)
        return total

    def _loss(self, margins: list[Any]) -> cp.Expression:
        p, count = self.problem, len(margins)
        joint = p._loss.joint and p.num_classes > 2
        hinge = [cp.Variable(p.n, nonneg=True) for _ in range(1 if joint else count)]
        self.hinges = [1 - margin <= hinge[0 if joint else k] for k, margin in enumerate(margins)]
        self.constraints += self.hinges
        self.share = p._loss.share(p.num_classes) / p.n
        self.joint = joint
        return self.share * sum(cp.sum(h) for h in hinge)

    def _penalty(self) -> Any:
        p = self.problem
        sides = _numpy(p.sides)
        sides = np.concatenate([sides, sides], axis=1)
        hard = p.slack == math.inf
        total: Any = 0
        for v in self.vectors:
            norm = _Norm.of(v[:, :-1], p.ball)
            short = p.radius * np.ones((p.n, 1)) @ cp.reshape(norm.size, (1, v.shape[0]), order="C") - cp.multiply(
                sides, self.x @ v.T
            )
            excess: Any = 0 if hard else cp.Variable((p.n, v.shape[0]), nonneg=True)
            constraint = short <= excess
            self.constraints += [*norm.constraints, constraint]
            self.cones.append((norm, [constraint, sides]))
            if not hard:
                total = total + p.slack / p.n * cp.sum(excess)
        return total

    def bound(self) -> float:
        """Rigorous lower bound of the optimum from the multipliers."""
        p = self.problem
        slopes = np.stack([np.maximum(h.dual_value, 0.0) for h in self.hinges], axis=1)
        mass = slopes.sum(axis=1, keepdims=True) if self.joint else slopes
        slopes = slopes * np.minimum(1.0, self.share / np.maximum(mass, 1e-300))
        theta = np.zeros((self.count, p.num_functions, p.d + 1))
        for k, norm in enumerate(self.norms):
            moment = slopes[:, k, None] * self.x
            if norm is not None:
                moment[:, :-1] += norm.points(p.radius * slopes[:, k])
            theta += np.einsum("np,nf,nd->pfd", self.on, self.signs[:, k], moment, optimize=True)
        if self.flip is not None:
            theta += self._flip_moments(slopes)
        moments = np.concatenate([theta, -theta]) if p.signs == 2 else theta
        for f, (norm, (constraint, sides)) in enumerate(self.cones):
            weight = np.clip(constraint.dual_value, 0.0, p.slack / p.n)
            moments[:, f] += np.einsum("ng,nd->gd", weight * sides, self.x)
            moments[:, f, :-1] += norm.points(p.radius * weight.sum(axis=0))
        largest = np.linalg.norm(moments, axis=-1).max()
        return float(slopes.sum() * min(1.0, p.reg / max(largest, 1e-300)))

    def _flip_moments(self, slopes: np.ndarray) -> np.ndarray:
        p, flip = self.problem, self.flip
        assert flip is not None
        theta = np.zeros((self.count, p.num_functions, p.d + 1))
        reach: dict[bytes, np.ndarray] = {key: np.zeros(self.count) for key in self.pair_norms}
        for k, pieces in enumerate(self.flipped):
            for rows, pattern, constraint in pieces:
                share = np.clip(constraint.dual_value, 0.0, slopes[rows, k, None]) * flip[rows]
                reach[pattern.tobytes()] += share.sum(axis=0)
                theta += np.einsum("np,f,nd->pfd", share, pattern, self.x[rows], optimize=True)
        for key, norm in self.pair_norms.items():
            theta[..., :-1] += np.einsum("pd,f->pfd", norm.points(p.radius * reach[key]), np.frombuffer(key))
        return theta


def check_alive(problem: Any, vectors: torch.Tensor, rows: int) -> None:
    """Raise InfeasibleError if hard constraints leave v = 0 for every sampled pattern.

    Sampled are all but the gate that is always on. Only where all their vectors are zero a second program asks, pattern
    by pattern, whether any v has (2 d_i - 1) xt_i'v > r |v|_* for the first ``rows`` examples.
    """
    count = len(problem.gates)
    if bool(vectors[1:count].any()) or bool(vectors[count + 1 :].any()):
        return
    x, sides = _numpy(problem.x[:rows]), _numpy(problem.sides[:rows])
    order = 1 if problem.ball == "linf" else 2
    for p in range(1, count):
        v = cp.Variable(x.shape[1])
        inside = cp.min(cp.multiply(sides[:, p], x @ v)) - problem.radius * cp.norm(v[:-1], order)
        program = cp.Problem(cp.Maximize(inside), [cp.norm(v) <= 1])
        program.solve(solver="CLARABEL")
        if program.value is not None and program.value > _ZERO:
            return
    raise InfeasibleError(
        f"hard constraints (slack=inf) must leave some v other than 0; found v = 0 as the only solution for all "
        f"{count - 1} sampled patterns: with {problem.n} examples one lies within radius {problem.radius:g} of every "
        "gate. Use slack=1, or a smaller radius."
    )


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
