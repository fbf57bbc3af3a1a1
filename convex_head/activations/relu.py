"""The ReLU activation, by convex optimisation over sampled sign patterns (problems/relu.py)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from convex_head.activations.base import Activation, Task, TrainingData, Weights
from convex_head.adversary.gates import ReluGeometry
from convex_head.problems.gates import GateNetwork
from convex_head.problems.patterns import sample_gates
from convex_head.problems.relu import FEASIBLE, ReluProblem
from convex_head.solvers import GATE_SOLVERS
from convex_head.validation import check_patterns, check_slack


class Relu(Activation):
    """Weights: directions (M, d+1) = v / sqrt|v|, readout (functions, M) = +-sqrt|v|, gates (P, d+1), pattern (M,).

    The last column of directions is the neuron's bias; gates and pattern say which convex model the network came from.

    Args:
        patterns: P, number of sampled sign patterns; None for a number by the number of examples.
        slack: weight of violated cone constraints; inf for hard ones.
        ball: "l2" or "linf", the shape of the feature ball.
    """

    name: ClassVar[str] = "relu"
    certificate: ClassVar[str] = "lower bound"
    adaptive_attacks: ClassVar[tuple[str, ...]] = ("soft-gate", "square")

    def __init__(self, patterns: Any = None, slack: Any = 1.0, ball: str = "l2"):
        self.patterns, self.slack, self.ball = check_patterns(patterns), check_slack(slack), ball
        # The cone program meets hard constraints to its own precision, group_descent to FEASIBLE.
        self.solvers = GATE_SOLVERS[::-1] if self.slack == math.inf else GATE_SOLVERS
        self.settings = {"patterns": self.patterns, "slack": self.slack, "ball": ball}

    def empty(self, in_features: int, functions: int) -> dict[str, Tensor]:
        return self._zeros(in_features, functions, 0, 0)

    def _zeros(self, in_features: int, functions: int, neurons: int, patterns: int) -> dict[str, Tensor]:
        return {
            "directions": torch.zeros(neurons, in_features + 1),
            "readout": torch.zeros(functions, neurons),
            "gates": torch.zeros(patterns, in_features + 1),
            "pattern": torch.zeros(neurons, dtype=torch.int64),
        }

    def sized_like(self, incoming: Weights, in_features: int, functions: int) -> dict[str, Tensor] | None:
        if not {"directions", "readout", "gates", "pattern"} <= incoming.keys():
            return None
        zeros = self._zeros(in_features, functions, len(incoming["directions"]), len(incoming["gates"]))
        return zeros if all(incoming[name].shape == value.shape for name, value in zeros.items()) else None

    def size(self, weights: Weights) -> int:
        return weights["directions"].shape[0]

    def forward(self, weights: Weights, z: Tensor) -> Tensor:
        return functional.linear(self._score(weights, z).relu(), weights["readout"])

    def soft_forward(self, weights: Weights, z: Tensor, temperature: float) -> Tensor:
        score = self._score(weights, z)
        return functional.linear(score * torch.sigmoid(score / temperature), weights["readout"])

    def _score(self, weights: Weights, z: Tensor) -> Tensor:
        return functional.linear(z, weights["directions"][:, :-1], weights["directions"][:, -1])

    def problem(
        self, data: TrainingData, task: Task, *, weights: Weights, start: Any = None, seed: int | None = None
    ) -> ReluProblem:
        z = data.standardised(self.name)
        gates = problem_gates(z, weights, self.patterns, start, seed)
        settings = {"num_classes": task.num_classes, "radius": task.radius, "reg": task.reg, "loss": task.loss}
        return ReluProblem(z, data.labels, gates, slack=self.slack, ball=self.ball, **settings)

    def network(self, weights: Weights) -> GateNetwork:
        readout, directions = weights["readout"].detach().double(), weights["directions"].detach().double()
        gates = weights["gates"].detach().double()
        vectors = directions.new_zeros(2 * len(gates), len(readout), directions.shape[1])
        function, neuron = (readout != 0).nonzero(as_tuple=True)
        alpha = readout[function, neuron]
        index = weights["pattern"][neuron] + len(gates) * (alpha < 0)
        vectors.index_put_((index, function), alpha.abs()[:, None] * directions[neuron], accumulate=True)
        return GateNetwork(gates, vectors)

    def deploy(self, network: GateNetwork, problem: ReluProblem, dtype: torch.dtype) -> dict[str, Tensor]:
        count, functions = len(network.gates), problem.num_functions
        index, function = (network.vectors != 0).any(-1).nonzero(as_tuple=True)
        if len(index) == 0:
            function = torch.arange(functions, device=network.vectors.device)
            index = torch.zeros_like(function)
        v = network.vectors[index, function]
        root = v.norm(dim=1).sqrt()
        readout = torch.zeros(functions, len(v), dtype=torch.float64, device=v.device)
        readout[function, torch.arange(len(v), device=v.device)] = torch.where(index < count, root, -root)
        return {
            "directions": (v / root.clamp_min(1e-300)[:, None]).to(dtype),
            "readout": readout.to(dtype),
            "gates": network.gates.to(dtype),
            "pattern": index % count,
        }

    def is_zero(self, weights: Weights) -> bool:
        return not bool(weights["readout"].any())

    def measure(self, weights: Weights, problem: ReluProblem) -> dict[str, Any]:
        network = self.network(weights)
        total, largest = problem.violations(network)
        difference = (problem.values(network) - problem.network_values(network)).abs().max()
        bound = self.geometry(weights, problem.num_classes).worst_case_margin(
            problem.x[:, :-1].double(), problem.labels, problem.radius
        )
        return {
            "patterns": len(network.gates),
            "violation_max": largest,
            "violation_mean": float(total.mean()),
            "constraints_hold": float((total <= max(FEASIBLE, problem.x.shape[1] * 1e-7)).double().mean()),
            "certified_share": float((bound > 0).double().mean()),
            "model_minus_network": float(difference),
        }

    def geometry(self, weights: Weights, num_classes: int) -> ReluGeometry:
        readout, directions = weights["readout"].detach().double(), weights["directions"].detach().double()
        width = max(1, int((readout != 0).sum(1).max()))
        padded = directions.new_zeros(len(readout), width, directions.shape[1])
        output = directions.new_zeros(len(readout), width)
        for function, row in enumerate(readout):
            neurons = row.nonzero().squeeze(1)
            padded[function, : len(neurons)] = directions[neurons]
            output[function, : len(neurons)] = row[neurons]
        return ReluGeometry(padded, output, num_classes, self.ball)


def problem_gates(z: Tensor, weights: Weights, patterns: int | None, start: Any, seed: int | None) -> Tensor:
    """Gates of a problem: those of the start, else newly drawn ones (with a seed), else the head's own."""
    if isinstance(start, GateNetwork) and start.gates.shape[1] == z.shape[1] + 1:
        return start.gates.to(z.device).double()
    if seed is not None:
        return sample_gates(z, patterns, seed, weights["gates"].dtype)
    return weights["gates"].detach().double()
