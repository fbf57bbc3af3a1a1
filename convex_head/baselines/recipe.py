"""What a training recipe is: an optimiser and one step of it. One recipe a file, all in ``RECIPES``.

A step minimises the mean cross-entropy of the batch,

    L(theta) = (1/B) sum_i -log softmax(f_theta(x_i))_{y_i},

by SGD with Nesterov momentum; subclasses change the inputs (PGD-AT), the loss (TRADES) or the step (SAM).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, ThreatModelError
from ..threat import ThreatModel

RECIPES: dict[str, type[Recipe]] = {}


@dataclass(frozen=True)
class Recipe:
    """Base of all recipes; its fields are the hyperparameters and are part of a checkpoint's key.

    Attributes:
        momentum: of SGD, in [0, 1); Nesterov where it is positive.
        weight_decay: of SGD.
    """

    momentum: float = 0.9
    weight_decay: float = 5e-4
    name: ClassVar[str] = ""
    needs_threat: ClassVar[bool] = False

    def optimizer(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """The optimiser that :meth:`step` drives."""
        return torch.optim.SGD(list(parameters), **self.sgd_options(lr))

    def sgd_options(self, lr: float) -> dict[str, Any]:
        """Keyword arguments of torch.optim.SGD."""
        return {
            "lr": lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "nesterov": self.momentum > 0,
        }

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel | None
    ) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and the logits (B, C) that the running accuracy is counted on."""
        logits = model(images)
        return F.cross_entropy(logits, labels), logits

    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | None,
    ) -> tuple[Tensor, Tensor]:
        """One update of the trainable parameters; returns the loss and logits before it."""
        loss, logits = self.loss(model, images, labels, threat)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), logits.detach()

    def require(self, threat: ThreatModel | None) -> ThreatModel:
        """The threat model of an adversarial recipe.

        Raises:
            ThreatModelError: there is none, or its norm is neither Linf nor L2.
        """
        if threat is None:
            raise ThreatModelError(
                f"recipe {self.name!r} trains against a threat and got none; pass threat=ThreatModel('Linf', '8/255')."
            )
        if threat.norm not in ("Linf", "L2"):
            raise ThreatModelError(
                f"recipe {self.name!r} covers Linf and L2; got {threat.norm!r}. Train with one of them."
            )
        return threat

    def describe(self) -> dict[str, Any]:
        """Name and hyperparameters, for checkpoints and records."""
        return {"recipe": self.name, **dataclasses.asdict(self)}


def register_recipe(cls: type[Recipe]) -> type[Recipe]:
    """Class decorator: make a recipe known to ``train`` under ``cls.name``."""
    RECIPES[cls.name] = cls
    return cls


def as_recipe(recipe: str | Recipe, threat: ThreatModel | None) -> Recipe:
    """The recipe object of that name, checked against the threat model.

    Raises:
        InputError: no recipe has that name.
        ThreatModelError: an adversarial recipe without a threat, or with a norm that PGD here does not cover.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise InputError(f"no training recipe is called {recipe!r}; choose one of {', '.join(RECIPES)}.")
        recipe = RECIPES[recipe]()
    if recipe.needs_threat:
        recipe.require(threat)
    return recipe
