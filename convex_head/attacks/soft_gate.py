"""Backward pass differentiable approximation (BPDA, Athalye et al. 2018) for heads with hard gates.

A gated head f(z) = sum_p 1[g_p'z >= 0] z'theta_p is linear between gates: its gradient does not know that a step
flips one. Here the value is the head's own, the gradient is that of ``head.soft_forward(features, temperature)``, in
which the gate is a sigmoid of width ``temperature``:

    value(x) = m(head(phi(x))),   gradient(x) = d/dx m(soft_head(phi(x)))

with m = f_y - max_k f_k, once for each temperature, on what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convex_head.attacks.base import Attack
from convex_head.attacks.descent import descend, random_start
from convex_head.attacks.registry import register_attack
from convex_head.attacks.view import ModelView, margins, spliced_parts
from convex_head.errors import AttackError
from convex_head.threat import ThreatModel


@register_attack("soft-gate")
class SoftGate(Attack):
    """Descent on the margin with soft gates.

    Args:
        steps: gradient steps a temperature.
        temperatures: widths of the sigmoid, in units of g_p'z; the first run begins at the image, the
            others at random points.
    """

    def __init__(self, steps: int = 50, temperatures: Sequence[float] = (1.0, 0.3, 0.1)) -> None:
        if steps < 1 or not temperatures or min(temperatures) <= 0:
            raise AttackError(f"soft-gate needs steps >= 1 and positive temperatures; found {steps}, {temperatures}.")
        self.name, self.steps, self.temperatures = "soft-gate", steps, tuple(temperatures)
        self.cost = 2.0 * steps * len(self.temperatures)

    def stages(self, model: ModelView, num_classes: int, threat: ThreatModel) -> tuple[Attack, ...]:
        self.check_norm(threat)
        spliced_parts(model, "soft_forward", self.name)
        return (self,)

    def settings(self) -> dict[str, Any]:
        return {"steps": self.steps, "temperatures": list(self.temperatures)}

    def perturb(self, model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
        backbone, head = spliced_parts(model, "soft_forward", self.name)
        generator = torch.Generator().manual_seed(seed)
        found, left = images.clone(), torch.arange(len(images), device=images.device)
        for index, temperature in enumerate(self.temperatures):
            x, y = images[left], labels[left]

            def margin(points: Tensor, y: Tensor = y, temperature: float = temperature) -> Tensor:
                features = backbone(points)
                soft = margins(head.soft_forward(features, temperature), y)
                return soft + (margins(head(features), y) - soft).detach()

            start = random_start(x, threat, generator) if index else x
            best, value = descend(margin, x, start, threat, steps=self.steps, stop_below=0.0)
            found[left] = best
            left = left[value >= 0]
            if len(left) == 0:
                break
        return found
