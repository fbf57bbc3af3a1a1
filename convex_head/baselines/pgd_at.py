"""PGD adversarial training (Madry et al. 2018, arXiv 1706.06083, equation 2.1):

min_theta (1/B) sum_i max_{|e_i| <= eps} CE(f_theta(x_i + e_i), y_i), the maximum by a few PGD steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..threat import ThreatModel
from .pgd import maximise, random_start
from .recipe import Recipe, register_recipe


@register_recipe
@dataclass(frozen=True)
class PGDAdversarialTraining(Recipe):
    """Cross-entropy at the adversarial images alone.

    Attributes:
        steps: PGD steps; the authors take 7 on CIFAR-10.
        relative_step: step size as a multiple of eps; the authors' 2/8.
    """

    steps: int = 7
    relative_step: float = 0.25
    name: ClassVar[str] = "pgd_at"
    needs_threat: ClassVar[bool] = True

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel | None
    ) -> tuple[Tensor, Tensor]:
        """Loss and logits at the adversarial images."""
        threat = self.require(threat)
        adversarial = maximise(
            model,
            images,
            threat,
            lambda logits: F.cross_entropy(logits, labels, reduction="sum"),
            start=random_start(images, threat),
            steps=self.steps,
            step_size=self.relative_step * threat.eps,
        )
        return super().loss(model, adversarial, labels, threat)
