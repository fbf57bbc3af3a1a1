"""What a training run has done so far: epochs, seconds, and examples through the backbone and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Epoch:
    """One line of the history: mean loss, share of right answers on the recipe's inputs, last lr, seconds."""

    epoch: int
    loss: float
    accuracy: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class TrainingRecord:
    """What a training cost.

    Attributes:
        recipe: name and hyperparameters.
        seconds: wall-clock of the epochs, over all resumed parts.
        forwards: images passed through the backbone (``model.backbone`` where it exists, else the model).
        backwards: images whose backbone pass was differentiated; zero for a head on frozen features
            that needs no attack.
        history: one :class:`Epoch` an epoch.
    """

    recipe: dict[str, Any]
    seconds: float
    forwards: int
    backwards: int
    history: tuple[Epoch, ...]


@dataclass
class Tally:
    """A forward hook that counts examples through a module and back."""

    forwards: int = 0
    backwards: int = 0

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.forwards += len(output)
        if output.requires_grad:
            output.register_hook(self._count_backward)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@dataclass
class TrainingState:
    """Where a run stands; everything a resumed run needs besides the weights."""

    epoch: int = 0
    seconds: float = 0.0
    history: list[Epoch] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
