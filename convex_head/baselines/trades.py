"""TRADES (Zhang et al. 2019, arXiv 1901.08573, equation 5):

min_theta (1/B) sum_i [ CE(f(x_i), y_i) + beta max_{|e_i| <= eps} KL( f(x_i) || f(x_i + e_i) ) ].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..threat import ThreatModel
from .modes import evaluation_mode
from .pgd import maximise
from .recipe import Recipe, register_recipe


@register_recipe
@dataclass(frozen=True)
class Trades(Recipe):
    """Clean cross-entropy plus a penalty on how far the output moves in the ball.

    Attributes:
        beta: weight of the penalty, 1/lambda in the paper; 6 is the authors' choice on CIFAR-10.
        steps: ascent steps on the divergence.
        relative_step: step size as a multiple of eps; the authors' 0.007 / 0.031.
    """

    beta: float = 6.0
    steps: int = 10
    relative_step: float = 0.25
    name: ClassVar[str] = "trades"
    needs_threat: ClassVar[bool] = True

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel | None
    ) -> tuple[Tensor, Tensor]:
        """The TRADES objective and the clean logits."""
        threat = self.require(threat)
        with torch.no_grad(), evaluation_mode(model):
            target = F.softmax(model(images), dim=1)
        adversarial = maximise(
            model,
            images,
            threat,
            lambda logits: F.kl_div(F.log_softmax(logits, dim=1), target, reduction="sum"),
            # The divergence has a stationary point at e = 0, so the authors start 0.001 randn away from it.
            start=images + 0.001 * torch.randn_like(images),
            steps=self.steps,
            step_size=self.relative_step * threat.eps,
        )
        logits = model(images)
        divergence = F.kl_div(F.log_softmax(model(adversarial), dim=1), F.softmax(logits, dim=1), reduction="batchmean")
        return F.cross_entropy(logits, labels) + self.beta * divergence, logits
