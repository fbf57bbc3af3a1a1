"""The polynomial activation: f = readout @ s(directions @ z), s(t) = a t^2 + b t + c. Everything about it is exact."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from convex_head.activations.base import Activation, Task, TrainingData, Weights
from convex_head.adversary.certify import RobustGeometry
from convex_head.problems.base import Network
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.rows import is_mapped
from convex_head.solvers import POLYNOMIAL_SOLVERS
from convex_head.validation import check_coefficients

DEFAULT_COEFFICIENTS = (0.09, 0.5, 0.47)
# Passes run in float32 above so many numbers; above the second so many where that is what the features come in and the
# gap to reach is far above what it moves.
_FLOAT32_ABOVE, _OWN_FLOAT32_ABOVE, _COARSE = 30_000_000, 1_000_000, 1e-3


class Polynomial(Activation):
    """Weights: directions (m, d) with unit rows, readout (functions, m).

    Args:
        coefficients: (a, b, c), a > 0; None for the least-squares fit to a ReLU.
    """

    name: ClassVar[str] = "polynomial"
    certificate: ClassVar[str] = "exact"
    solvers: tuple[str, ...] = POLYNOMIAL_SOLVERS
    adaptive_attacks: ClassVar[tuple[str, ...]] = ("feature-exact",)

    def __init__(self, coefficients: Any = None):
        self.coefficients = check_coefficients(DEFAULT_COEFFICIENTS if coefficients is None else coefficients)
        self.settings = {"coefficients": self.coefficients}

    def empty(self, in_features: int, functions: int) -> dict[str, Tensor]:
        return {"directions": torch.zeros(0, in_features), "readout": torch.zeros(functions, 0)}

    def sized_like(self, incoming: Weights, in_features: int, functions: int) -> dict[str, Tensor] | None:
        directions, readout = (incoming.get(name) for name in ("directions", "readout"))
        if directions is None or readout is None or directions.ndim != 2:
            return None
        neurons = directions.shape[0]
        if directions.shape[1] != in_features or readout.shape != (functions, neurons):
            return None
        return {"directions": torch.zeros(neurons, in_features), "readout": torch.zeros(functions, neurons)}

    def size(self, weights: Weights) -> int:
        return weights["directions"].shape[0]

    def forward(self, weights: Weights, z: Tensor) -> Tensor:
        a, b, c = self.coefficients
        t = functional.linear(z, weights["directions"])
        return functional.linear((a * t + b) * t + c, weights["readout"])

    def problem(
        self, data: TrainingData, task: Task, *, weights: Weights, start: Any = None, seed: int | None = None
    ) -> PolynomialProblem:
        numbers = data.shard.total(data.features.shape[0]) * data.features.shape[1]
        # Of several processes all take one dtype.
        is_double = data.shard.any(not str(data.features.dtype).endswith("float32") or task.tol < _COARSE)
        return PolynomialProblem(
            data.features,
            data.labels,
            num_classes=task.num_classes,
            radius=task.radius,
            reg=task.reg,
            loss=task.loss,
            coefficients=self.coefficients,
            dtype=torch.float32 if numbers > (_FLOAT32_ABOVE if is_double else _OWN_FLOAT32_ABOVE) else torch.float64,
            mean=data.mean,
            scale=data.scale,
            whitening=data.whitening,
            stream=is_mapped(data.features),
            shard=data.shard,
        )

    def network(self, weights: Weights) -> Network:
        """One neuron for every non-zero readout weight."""
        readout = weights["readout"].detach().double()
        function, neuron = (readout != 0).nonzero(as_tuple=True)
        return Network(weights["directions"].detach().double()[neuron], readout[function, neuron], function)

    def deploy(self, network: Network, problem: PolynomialProblem, dtype: torch.dtype) -> dict[str, Tensor]:
        if network.size == 0:
            network = problem.zero_network()
        device = network.directions.device
        readout = torch.zeros(problem.num_functions, network.size, dtype=dtype, device=device)
        readout[network.function, torch.arange(network.size, device=device)] = network.weights.to(dtype)
        return {"directions": network.directions.to(dtype), "readout": readout}

    def is_zero(self, weights: Weights) -> bool:
        return not bool(weights["readout"].any())

    def geometry(self, weights: Weights, num_classes: int) -> RobustGeometry:
        return RobustGeometry(self.network(weights), num_classes, self.coefficients)
