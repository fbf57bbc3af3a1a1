"""Sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412), with pytorch_optimizer's SAM.

    min_theta max_{|e| <= rho} L(theta + e),    e = rho grad L / |grad L|  to first order (their equation 2),

two gradients a step. Batch-norm statistics are updated in the first pass only, as the authors do: those of
theta + e belong to no network that is ever deployed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..errors import MissingExtraError
from ..threat import ThreatModel
from .recipe import Recipe, register_recipe


@register_recipe
@dataclass(frozen=True)
class SAM(Recipe):
    """SGD at the gradient of the worst nearby weights.

    Attributes:
        rho: l2 radius of the neighbourhood in weight space; 0 is SGD.
    """

    rho: float = 0.05
    name: ClassVar[str] = "sam"

    def optimizer(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """pytorch_optimizer.SAM around SGD.

        Raises:
            MissingExtraError: pytorch_optimizer is not installed.
        """
        return _library().SAM(list(parameters), torch.optim.SGD, rho=self.rho, **self.sgd_options(lr))

    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | None,
    ) -> tuple[Tensor, Tensor]:
        """One two-gradient step; returns the loss and logits at theta."""
        library, sam = _library(), cast(Any, optimizer)
        loss, logits = self.loss(model, images, labels, threat)
        sam.zero_grad()
        loss.backward()
        sam.first_step(zero_grad=True)
        library.disable_running_stats(model)
        try:
            self.loss(model, images, labels, threat)[0].backward()
        finally:
            library.enable_running_stats(model)
        sam.second_step(zero_grad=True)
        return loss.detach(), logits.detach()


def _library() -> Any:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise MissingExtraError(
            "SAM needs the package pytorch_optimizer, which is not installed; pip install '.[bench]' in the checkout."
        ) from error
    return pytorch_optimizer
