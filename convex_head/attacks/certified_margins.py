"""The head's exact worst-case margins as logits, so that any attack can be turned on the certificate itself.

For a spliced model with features z = phi(x) and a radius r, output k is

    m_k(x) = min { f_k(g) - max_{j != k} f_j(g) : |g - z| <= r }

which is positive for at most one k: the class that is certified in the whole feature ball. A last output, zero, stands
for "not certified", so that an attack breaks a point exactly when it finds an image in the pixel ball whose label is no
longer certified. By Danskin's theorem the gradient of m_k is that of f_k - max_j f_j at the minimiser, held fixed
relative to z.

    adversary = pyautoattack.AutoAttack(CertifiedMargins(model), norm="Linf", eps=8 / 255,
                                        version="custom", attacks=["apgd-ce", "square"])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convex_head.attacks.view import ModelView, margins, spliced_parts
from convex_head.errors import AttackError


class CertifiedMargins(nn.Module):
    """Images (n, c, h, w) to worst-case margins and a zero (n, classes + 1), differentiable with respect to the images.

    Args:
        model: a spliced model whose head has ``worst_case_features``.
        radius: of the feature ball, in the head's units; the head's own if None.

    Raises:
        AttackError: the model has no such head.
    """

    def __init__(self, model: nn.Module, radius: float | None = None) -> None:
        super().__init__()
        _, head = spliced_parts(ModelView(model, ()), "worst_case_features", "CertifiedMargins")
        if getattr(head, "certificate", "exact") != "exact":
            raise AttackError(
                f"CertifiedMargins needs a head whose worst case is exact; found one with a {head.certificate}. "
                "Use head.worst_case_margin on the features for its bound."
            )
        self.inner, self.radius = model, radius

    def forward(self, images: Tensor) -> Tensor:
        """(n, classes + 1): worst-case margins, then the zero of "not certified"."""
        backbone, head = self.inner.get_submodule("backbone"), self.inner.get_submodule("head")
        features = backbone(images)
        columns = []
        for label in range(head(features[:1]).shape[1]):
            labels = torch.full((len(images),), label, device=images.device)
            with torch.no_grad():
                step = head.worst_case_features(features, labels, self.radius) - features  # type: ignore[operator]
            columns.append(margins(head(features + step), labels))
        return torch.stack([*columns, torch.zeros_like(columns[0])], dim=1)
