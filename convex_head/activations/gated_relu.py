"""The gated ReLU activation: f = sum_p 1[g_p'zt >= 0] zt'theta_p with fixed gates (problems/gated_relu.py)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from convex_head.activations.base import Activation, Task, TrainingData, Weights
from convex_head.activations.relu import problem_gates
from convex_head.adversary.gates import GatedGeometry
from convex_head.problems.gated_relu import GatedReluProblem
from convex_head.problems.gates import GateNetwork
from convex_head.solvers import GATE_SOLVERS
from convex_head.validation import check_flips, check_patterns


class GatedRelu(Activation):
    """Weights: gates (P, d+1), theta (P, functions, d+1); the last column belongs to the constant 1.

    Args:
        patterns: P, number of sampled gates; None for a number by the number of examples.
        flips: "cover": gates that can flip in the ball are counted in; "ignore": the published formula.
        ball: "l2" or "linf", the shape of the feature ball.
    """

    name: ClassVar[str] = "gated_relu"
    certificate: ClassVar[str] = "lower bound"
    solvers: tuple[str, ...] = GATE_SOLVERS
    adaptive_attacks: ClassVar[tuple[str, ...]] = ("soft-gate", "square")

    def __init__(self, patterns: Any = None, flips: Any = "cover", ball: str = "l2"):
        self.patterns, self.flips, self.ball = check_patterns(patterns), check_flips(flips), ball
        self.settings = {"patterns": self.patterns, "flips": self.flips, "ball": ball}

    def empty(self, in_features: int, functions: int) -> dict[str, Tensor]:
        return self._zeros(in_features, functions, 0)

    def _zeros(self, in_features: int, functions: int, patterns: int) -> dict[str, Tensor]:
        return {
            "gates": torch.zeros(patterns, in_features + 1),
            "theta": torch.zeros(patterns, functions, in_features + 1),
        }

    def sized_like(self, incoming: Weights, in_features: int, functions: int) -> dict[str, Tensor] | None:
        if not {"gates", "theta"} <= incoming.keys():
            return None
        zeros = self._zeros(in_features, functions, len(incoming["gates"]))
        return zeros if all(incoming[name].shape == value.shape for name, value in zeros.items()) else None

    def size(self, weights: Weights) -> int:
        return weights["gates"].shape[0]

    def forward(self, weights: Weights, z: Tensor) -> Tensor:
        score = self._score(weights, z)
        return self._combine(weights, z, (score >= 0).to(score.dtype))

    def soft_forward(self, weights: Weights, z: Tensor, temperature: float) -> Tensor:
        return self._combine(weights, z, torch.sigmoid(self._score(weights, z) / temperature))

    def _score(self, weights: Weights, z: Tensor) -> Tensor:
        return functional.linear(z, weights["gates"][:, :-1], weights["gates"][:, -1])

    def _combine(self, weights: Weights, z: Tensor, gate: Tensor) -> Tensor:
        theta = weights["theta"]
        parts = functional.linear(z, theta[..., :-1].flatten(0, 1), theta[..., -1].flatten())
        return (parts.unflatten(1, theta.shape[:2]) * gate.unsqueeze(-1)).sum(1)

    def problem(
        self, data: TrainingData, task: Task, *, weights: Weights, start: Any = None, seed: int | None = None
    ) -> GatedReluProblem:
        z = data.standardised(self.name)
        gates = problem_gates(z, weights, self.patterns, start, seed)
        settings = {"num_classes": task.num_classes, "radius": task.radius, "reg": task.reg, "loss": task.loss}
        return GatedReluProblem(z, data.labels, gates, flips=self.flips, ball=self.ball, **settings)

    def network(self, weights: Weights) -> GateNetwork:
        return GateNetwork(weights["gates"].detach().double(), weights["theta"].detach().double())

    def deploy(self, network: GateNetwork, problem: GatedReluProblem, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"gates": network.gates.to(dtype), "theta": network.vectors.to(dtype)}

    def is_zero(self, weights: Weights) -> bool:
        return not bool(weights["theta"].any())

    def measure(self, weights: Weights, problem: GatedReluProblem) -> dict[str, Any]:
        network = self.network(weights)
        bound = self.geometry(weights, problem.num_classes).worst_case_margin(
            problem.x[:, :-1].double(), problem.labels, problem.radius
        )
        counted = problem.margins(network).amin(1)
        return {
            "patterns": len(network.gates),
            "violation_max": float((counted - bound).max().clamp_min(0)),
            "violation_mean": float((counted - bound).clamp_min(0).mean()),
            "certified_share": float((bound > 0).double().mean()),
        }

    def geometry(self, weights: Weights, num_classes: int) -> GatedGeometry:
        network = self.network(weights)
        return GatedGeometry(network.gates, network.vectors, num_classes, self.ball)
