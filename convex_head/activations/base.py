"""What a head must know of its activation: settings, weights, formula, training problem, certificates.

One subclass a file. It keeps no tensors: the head owns these, and hands them over by name.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from convex_head.errors import SettingError
from convex_head.rows import is_mapped
from convex_head.shards import Whole

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What every training problem needs beside data: classes, feature radius, regularisation, loss.

    ``tol`` is the relative gap that it is solved to, 0 where that is not known.
    """

    num_classes: int
    radius: float
    reg: float
    loss: str
    tol: float = 0.0

    @property
    def functions(self) -> int:
        """Functions to learn: one for two classes, else one a class."""
        return 1 if self.num_classes == 2 else self.num_classes


class Geometry(Protocol):
    """Robustness queries of fixed weights, in standardised float64 features (n, d)."""

    def worst_case_margin(self, x: Tensor, labels: Tensor, radius: float) -> Tensor:
        """(n,) smallest margin in each ball, or a lower bound of it."""
        ...

    def worst_case_point(self, x: Tensor, labels: Tensor, radius: float) -> Tensor:
        """(n, d) a point of each ball with the smallest margin known."""
        ...

    def distance_to_boundary(self, x: Tensor, labels: Tensor) -> Tensor:
        """(n,) distance to where another class wins, or a lower bound of it."""
        ...


@dataclass(frozen=True)
class TrainingData:
    """What a head is trained on.

    Attributes:
        features: (n, d) tensor, or a numpy.memmap, not standardised.
        labels: (n,) int64, on the device of the computation.
        mean, scale: (d,) of the standardisation (x - mean) / scale.
        whitening: (d, d) what standardised features are multiplied by; None for nothing.
        shard: the part of the rows that this process holds.
    """

    features: Any
    labels: Tensor
    mean: Tensor
    scale: Tensor
    whitening: Tensor | None = None
    shard: Whole = field(default_factory=Whole)

    def standardised(self, activation: str) -> Tensor:
        """(n, d) float64, for an activation that needs all rows in memory.

        Raises:
            SettingError: they are on disk or shared by processes.
        """
        if is_mapped(self.features) or self.shard.size > 1:
            raise SettingError(
                "features on disk and several processes need activation='polynomial'; "
                f"found {activation!r}. Load the features into memory, or change the activation."
            )
        mean, scale = (value.to(self.features.device).double() for value in (self.mean, self.scale))
        z = (self.features.double() - mean) / scale
        return z if self.whitening is None else z @ self.whitening.to(z)


class Activation(abc.ABC):
    """One activation.

    Attributes:
        name: public name.
        certificate: "exact" or "lower bound": what the geometry's margins and distances are.
        solvers: names of the solvers of its problem; the first is what "auto" picks.
        adaptive_attacks: attacks that evaluation must not leave out for such a head.
        settings: its own constructor arguments, as given or by default.
    """

    name: ClassVar[str]
    certificate: ClassVar[str]
    solvers: tuple[str, ...]
    adaptive_attacks: ClassVar[tuple[str, ...]]
    settings: dict[str, Any]

    @abc.abstractmethod
    def empty(self, in_features: int, functions: int) -> dict[str, Tensor]:
        """The weights of an unfitted head, by name."""

    @abc.abstractmethod
    def sized_like(self, incoming: Weights, in_features: int, functions: int) -> dict[str, Tensor] | None:
        """Zero weights of the sizes of ``incoming``; None where these are not weights of such a head."""

    @abc.abstractmethod
    def size(self, weights: Weights) -> int:
        """Number of neurons; 0 for an unfitted head."""

    @abc.abstractmethod
    def forward(self, weights: Weights, z: Tensor) -> Tensor:
        """f (n, functions) of standardised features z (n, d)."""

    def soft_forward(self, weights: Weights, z: Tensor, temperature: float) -> Tensor | None:
        """f with soft gates of that width; None where there is no gate."""
        return None

    @abc.abstractmethod
    def problem(
        self, data: TrainingData, task: Task, *, weights: Weights, start: Any = None, seed: int | None = None
    ) -> Any:
        """The training problem.

        Args:
            data: features, labels and standardisation.
            task: classes, radius, reg, loss.
            weights: of the head; where random gates belong to the problem, these are its gates unless a seed is given.
            start: a warm start; its gates go before those of a seed.
            seed: draws what is random, for a new fit.

        Raises:
            SettingError: the data are on disk or shared by processes, and this activation needs them in memory.
        """

    @abc.abstractmethod
    def network(self, weights: Weights) -> Any:
        """The deployed network, float64, in the form that the problem measures."""

    @abc.abstractmethod
    def deploy(self, network: Any, problem: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights of a solved problem's network, rounded to ``dtype``."""

    @abc.abstractmethod
    def is_zero(self, weights: Weights) -> bool:
        """The network is the zero function."""

    def measure(self, weights: Weights, problem: Any) -> dict[str, Any]:
        """Further measurements of the deployed weights on the training data, for ``result_.extra``."""
        return {}

    @abc.abstractmethod
    def geometry(self, weights: Weights, num_classes: int) -> Geometry:
        """Robustness queries of these weights."""
