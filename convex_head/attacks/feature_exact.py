"""The attack that knows the convex head: its exact worst feature, pulled back to pixels through the backbone.

For a spliced model f(x) = head(phi(x)) the head gives in closed form the worst point of a ball around a feature,

    t = argmin { margin of the head at g : |g - phi(x)| <= radius },

so the attack first descends on |phi(x + e) - t|^2, which leads the pixels in the direction that hurts the head
most, and from there on the exact margin f_y - max_k f_k of the whole model. The first restart begins at
the image, the others at random points of the threat set, each with its own t. What is left then meets f_y - f_k alone,
from the image with all steps, for the three strongest rivals k in turn: where the features cannot follow t, or the
margin changes its rival at every step, the attack is not weaker than plain targeted descent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convex_head.attacks.base import Attack
from convex_head.attacks.descent import descend, random_start
from convex_head.attacks.registry import register_attack
from convex_head.attacks.view import ModelView, margins, spliced_parts
from convex_head.errors import AttackError
from convex_head.threat import ThreatModel

_RIVALS = 3


@register_attack("feature-exact")
class FeatureExact(Attack):
    """Exact worst features, then the exact margin.

    Args:
        steps: gradient steps a restart, half of them towards the worst features.
        restarts: starting points.
    """

    def __init__(self, steps: int = 60, restarts: int = 3) -> None:
        if steps < 2 or restarts < 1:
            raise AttackError(f"feature-exact needs steps >= 2 and restarts >= 1; found {steps} and {restarts}.")
        self.name, self.steps, self.restarts = "feature-exact", steps, restarts
        self.cost = 2.0 * steps * (restarts + _RIVALS)

    def stages(self, model: ModelView, num_classes: int, threat: ThreatModel) -> tuple[Attack, ...]:
        self.check_norm(threat)
        _, head = spliced_parts(model, "worst_case_features", self.name)
        if getattr(head, "certificate", "exact") != "exact":
            raise AttackError(
                f"{self.name} needs a head whose worst case is exact; found one with a {head.certificate}. "
                "Use soft-gate and square, which join by themselves."
            )
        return (self,)

    def settings(self) -> dict[str, Any]:
        return {"steps": self.steps, "restarts": self.restarts}

    def perturb(self, model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
        backbone, head = spliced_parts(model, "worst_case_features", self.name)
        generator = torch.Generator().manual_seed(seed)
        found, left = images.clone(), torch.arange(len(images), device=images.device)
        for restart in range(self.restarts):
            x, y = images[left], labels[left]
            start = random_start(x, threat, generator) if restart else x
            near = self._pull(backbone, head, x, y, start, threat)

            def margin(points: Tensor, y: Tensor = y) -> Tensor:
                return margins(model(points), y)

            steps = self.steps - self.steps // 2
            best, value = descend(margin, x, near, threat, steps=steps, stop_below=0.0)
            found[left] = best
            left = left[value >= 0]
            if len(left) == 0:
                return found
        return self._targeted(model, images, labels, threat, found, left)

    def _targeted(
        self, model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, found: Tensor, left: Tensor
    ) -> Tensor:
        """Descent on f_y - f_k for the strongest rivals k, on the points that are ``left``."""
        with torch.no_grad():
            logits = model(images).scatter(1, labels.unsqueeze(1), -torch.inf)
        rivals = logits.topk(min(_RIVALS, logits.shape[1] - 1), dim=1).indices
        for rank in range(rivals.shape[1]):
            x, y, k = images[left], labels[left].unsqueeze(1), rivals[left, rank].unsqueeze(1)

            def difference(points: Tensor, y: Tensor = y, k: Tensor = k) -> Tensor:
                outputs = model(points)
                return (outputs.gather(1, y) - outputs.gather(1, k)).squeeze(1)

            best, value = descend(difference, x, x, threat, steps=self.steps, stop_below=0.0)
            found[left] = best
            left = left[value >= 0]
            if len(left) == 0:
                break
        return found

    def _pull(self, backbone: ModelView, head: Any, x: Tensor, y: Tensor, start: Tensor, threat: ThreatModel) -> Tensor:
        """Points whose features are as near to the worst ones around ``start`` as descent gets them."""
        # A head trained without a ball still has a worst direction; one standard unit shows it.
        radius = head.radius if head.radius > 0 else 1.0
        with torch.no_grad():
            target = head.worst_case_features(backbone(start), y, radius)

        def distance(points: Tensor) -> Tensor:
            # In the units of the ball: the head's own scale of each feature.
            return head.in_units(backbone(points) - target).flatten(1).square().sum(dim=1)

        return descend(distance, x, start, threat, steps=self.steps // 2)[0]
