"""Gated ReLU without adversary: this package's solver, pyscnn and CVXPY on one squared-loss problem.

    pip install pyscnn
    python -m benchmarks.solvers_relu
    python -m benchmarks.solvers_relu --quick

    F = (1/2n) sum_i (y_i - sum_p d_ip xt_i'theta_p)^2 + reg sum_p |theta_p|        y = +-1, radius 0, the same gates

pyscnn (A. Mishkin, A. Sahiner, M. Pilanci, "Fast convex optimization for two-layer ReLU networks", ICML 2022) solves it
by accelerated proximal gradient (R-FISTA). The package's heads have margin losses; for this comparison the squared loss
stands here, in a problem that its group_descent takes as it is. With slopes s_i, m_p = sum_i d_ip s_i xt_i and
max_p |m_p| <= reg, sum_i s_i y_i - (n/2) s_i^2 is a lower bound. Every F is computed by the same code from the vectors.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor

from benchmarks.common import Column, Record, arguments, load_average, publish
from convex_head.errors import MissingExtraError
from convex_head.problems.gated_relu import GatedReluProblem
from convex_head.problems.gates import Centre, GateEvaluation, GateNetwork
from convex_head.problems.patterns import sample_gates
from convex_head.solvers.group_descent import GroupDescent
from convex_head.solvers.result import relative_gap

NAME = "solvers_relu"
TOL = 1e-3


@dataclass(frozen=True)
class SquaredEvaluation(GateEvaluation):
    """``mass`` is sum s y, ``square`` n sum s^2 at the slopes."""

    square: float


class SquaredLoss(GatedReluProblem):
    """The problem of the module's docstring."""

    def __init__(self, x: Tensor, y: Tensor, gates: Tensor, reg: float):
        super().__init__(x, y, gates, flips="ignore", num_classes=2, radius=0.0, reg=reg, loss="crammer_singer")
        self.target = (2 * y - 1).double()

    def objective(self, network: GateNetwork) -> float:
        wrong = self.values(network)[:, 0] - self.target
        return float(0.5 * wrong.square().mean() + self.reg * network.norm)

    def evaluate(
        self, vectors: Tensor, mu: float, narrow: float, centre: Centre, *, loss_only: bool = False
    ) -> tuple[SquaredEvaluation, Centre]:
        """Nothing is smoothed: the loss is smooth, and there is no ball."""
        theta = self._spread(vectors)[:, 0]
        wrong = (self.on * (self.x @ theta.mT)).sum(1) - self.target
        gradient = ((self.on * wrong[:, None]).mT @ self.x / self.n)[:, None]
        if self.groups is not None:
            gradient = gradient[self.groups[:, 0], self.groups[:, 1]]
        value = float(0.5 * wrong.square().mean() + self.reg * theta.norm(dim=1).sum())
        linear, square = -float((wrong * self.target).mean()), float(wrong.square().mean())
        found = SquaredEvaluation(value, gradient, value, 0.0, linear, square)
        return replace(found, dual=self.bound(found, float(gradient.norm(dim=-1).max()))), centre

    def bound(self, found: GateEvaluation, largest: float) -> float:
        """At the best multiple of the slopes -wrong / n that keeps all moments within reg."""
        assert isinstance(found, SquaredEvaluation)
        scale = min(max(found.mass, 0.0) / max(found.square, 1e-300), self.reg / max(largest, 1e-300))
        return scale * found.mass - 0.5 * scale**2 * found.square

    def loss_curvature(self, slopes: Tensor, mu: float) -> Tensor:
        """One everywhere."""
        return self.x.new_ones(self.n, 1)


def by_group_descent(problem: SquaredLoss) -> Tensor:
    """This package."""
    return GroupDescent().solve(problem, tol=TOL, max_seconds=300).network.vectors[:, 0]


def by_cvxpy(problem: SquaredLoss) -> Tensor:
    """CVXPY with Clarabel."""
    theta = cp.Variable((len(problem.gates), problem.d + 1))
    on, x = problem.on.numpy(), problem.x.numpy()
    f = cp.sum(cp.multiply(on, x @ theta.T), axis=1)
    loss = cp.sum_squares(f - problem.target.numpy()) / (2 * problem.n)
    cp.Problem(cp.Minimize(loss + problem.reg * cp.sum(cp.norm(theta, axis=1)))).solve(solver="CLARABEL")
    return torch.from_numpy(np.asarray(theta.value))


def by_pyscnn(problem: SquaredLoss, tol: float) -> Tensor:
    """pyscnn's R-FISTA on the CPU, float64, features as they are; ``tol`` of the squared subgradient.

    Raises:
        MissingExtraError: pyscnn is not installed.
    """
    try:
        parts = {name: import_module(f"scnn.{name}") for name in ("models", "solvers", "regularizers", "metrics")}
        optimize = import_module("scnn.optimize").optimize_model
    except ImportError as problem_found:
        raise MissingExtraError(
            f"pyscnn does not import ({problem_found}); run: pip install pyscnn."
        ) from problem_found
    model = parts["models"].ConvexGatedReLU(problem.gates.numpy().T)
    solver = parts["solvers"].RFISTA(model, tol=tol)
    fitted, _ = optimize(
        model,
        solver,
        parts["metrics"].Metrics(),
        problem.x.numpy(),
        problem.target.numpy(),
        regularizer=parts["regularizers"].NeuronGL1(problem.reg),
        return_convex=True,
        unitize_data=False,
        dtype="float64",
    )
    # pyscnn sorts the gates: each of its vectors goes to the gate of ours that is the same.
    theta = torch.from_numpy(np.asarray(fitted.parameters[0])).reshape(len(problem.gates), -1).double()
    return theta[torch.cdist(problem.gates, torch.from_numpy(fitted.G.T).double()).argmin(1)]


def measure(name: str, problem: SquaredLoss, solve: Any) -> tuple[Record, GateEvaluation]:
    """Time one solver and compute F and the bound at what it returns."""
    began = time.perf_counter()
    theta = solve(problem)
    seconds = time.perf_counter() - began
    found, _ = problem.evaluate(theta[:, None], 0.0, 0.0, problem.centre())
    return {"solver": name, "n": problem.n, "patterns": len(problem.gates), "reg": problem.reg, "seconds": seconds,
            "objective": found.primal, "load": load_average()}, found  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run all solvers and publish."""
    options = arguments(NAME, __doc__, argv)
    features, labels = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)
    x, y = torch.tensor(features), torch.tensor(labels)
    records: list[Record] = []
    for patterns in (5,) if options.quick else (20, 100):
        for reg in (1e-2,) if options.quick else (1e-2, 1e-3):
            problem = SquaredLoss(x, y, sample_gates(x, patterns, 0), reg)
            rows, bound = [], 0.0
            solvers = {
                "group_descent": by_group_descent,
                "pyscnn, default": lambda p: by_pyscnn(p, 1e-6),
                "pyscnn, 1e-10": lambda p: by_pyscnn(p, 1e-10),
                "cvxpy, clarabel": by_cvxpy,
            }
            for name, solve in solvers.items():
                row, found = measure(name, problem, solve)
                rows.append(row)
                bound = max(bound, found.dual)
            # One bound for all: the best that any point proved.
            records += [row | {"bound": bound, "gap": relative_gap(row["objective"], bound)} for row in rows]
    columns = [
        Column("solver", "solver"),
        Column("patterns", "P + 1", str),
        Column("reg", "reg", "{:g}".format),
        Column("objective", "F", "{:.6f}".format),
        Column("gap", "gap to the bound", "{:.1e}".format),
        Column("seconds", "s", "{:.2f}".format),
    ]

    def draw(plt: Any) -> None:
        for name in dict.fromkeys(row["solver"] for row in records):
            part = [row for row in records if row["solver"] == name]
            plt.scatter([r["seconds"] for r in part], [max(r["gap"], 1e-9) for r in part], label=name)
        plt.gca().set(xscale="log", yscale="log", xlabel="seconds", ylabel="relative gap to the best bound")
        plt.legend()

    publish(options, "Gated ReLU, squared loss, radius 0", records, records, columns, draw)


if __name__ == "__main__":
    main()
