"""Small problems whose bounds are repaired: their optima by the LMI SDP, a rough network, one near an optimum."""

from typing import Any

import torch
from sklearn.datasets import load_iris

from convex_head.adversary.margins import PackedNetwork
from convex_head.problems.dual import DualReport, OracleAnswer
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers.column_generation import ColumnGeneration
from convex_head.solvers.sdp import build


def clusters(n: int, d: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    x = centres[labels] + torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (x - x.mean(0)) / x.std(0), labels


def case(loss: str, radius: float, reg: float = 0.02) -> tuple[PolynomialProblem, float]:
    features, labels = load_iris(return_X_y=True)
    chosen = torch.randperm(150, generator=torch.Generator().manual_seed(0))[:24].numpy()
    x = ((features - features.mean(0)) / features.std(0))[chosen]
    settings: dict[str, Any] = {"num_classes": 3, "radius": radius, "reg": reg, "loss": loss}
    optimum = build(x, labels[chosen], **settings)[0].solve(solver="CLARABEL", canon_backend="SCIPY")
    return PolynomialProblem(torch.from_numpy(x), torch.from_numpy(labels[chosen]), **settings), optimum


def of_a_random_network(
    loss: str = "crammer_singer",
) -> tuple[PolynomialProblem, PackedNetwork, DualReport, OracleAnswer]:
    problem, _ = case(loss, 0.3)
    packed = problem.pack(problem.random_network(3, 0))
    report = problem.dual_point(packed, 5.0)
    assert report.rows is not None
    return problem, packed, report, problem.oracle(report.point)


def near_an_optimum(loss: str = "crammer_singer") -> tuple[PolynomialProblem, PackedNetwork, DualReport, OracleAnswer]:
    problem, _ = case(loss, 0.3)
    packed = problem.pack(ColumnGeneration().solve(problem, tol=3e-2).network)
    report = problem.dual_point(packed, 0.05)
    assert report.rows is not None
    return problem, packed, report, problem.oracle(report.point)
