"""The control heads on frozen features: multinomial logistic regression and a two-layer ReLU network.

    linear:  min_{W,b} (1/n) sum_i CE(W z_i + b, y_i) + (reg/2) |W|_F^2      strictly convex in W
    mlp:     logits = W2 relu(W1 z + b1) + b2, trained by any recipe of this package

with z = (x - mean) / std, constant features having scale 1. Both are ordinary modules on raw features x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import (
    ClassCountError,
    EmptyDataError,
    FeatureShapeError,
    LabelRangeError,
    NonFiniteFeaturesError,
    RegularisationError,
)


def linear_head(
    features: Tensor,
    labels: Tensor,
    num_classes: int | None = None,
    *,
    reg: float = 1e-4,
    max_iter: int = 500,
    tol: float = 1e-7,
) -> nn.Linear:
    """Fit a linear classifier by full-batch L-BFGS in float64, standardisation folded into its weights.

    Args:
        features: (n, d) finite numbers.
        labels: (n,) integers 0..C-1.
        num_classes: C; default: the largest label plus one.
        reg: ridge weight on standardised features, positive.
        max_iter: L-BFGS iterations at most.
        tol: stop at this largest entry of the gradient.

    Returns:
        nn.Linear(d, C) in the dtype and on the device of ``features``.

    Raises:
        EmptyDataError, FeatureShapeError, NonFiniteFeaturesError, LabelRangeError, ClassCountError,
        RegularisationError: on the arguments.
    """
    classes = _check(features, labels, num_classes)
    if not 0 < reg < float("inf"):
        raise RegularisationError(f"reg must be positive and finite; got {reg}. Try 1e-4.")
    mean, std = _moments(features)
    z, y = (features.double() - mean) / std, labels.to(features.device, torch.int64)
    weight = torch.zeros(classes, z.shape[1], dtype=torch.float64, device=z.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=z.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        history_size=20,
        tolerance_grad=tol,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(z @ weight.T + bias, y) + 0.5 * reg * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(objective)
    head = nn.Linear(z.shape[1], classes, device=features.device, dtype=features.dtype)
    with torch.no_grad():
        head.weight.copy_(weight / std)
        head.bias.copy_(bias - (weight / std) @ mean)
    return head


class MLPHead(nn.Module):
    """Two-layer ReLU head: features (N, d) -> logits (N, C), standardising inside.

    Args:
        in_features: d.
        num_classes: C.
        hidden: width of the hidden layer.
        features: (n, d) training features that set the standardisation; without them it is the identity.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, in_features: int, num_classes: int, *, hidden: int = 256, features: Tensor | None = None):
        super().__init__()
        mean, std = torch.zeros(in_features), torch.ones(in_features)
        if features is not None:
            if features.ndim != 2 or features.shape[1] != in_features:
                raise FeatureShapeError(f"features must be (n, {in_features}); got {tuple(features.shape)}.")
            mean, std = _moments(features)
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())
        self.hidden = nn.Linear(in_features, hidden)
        self.relu = nn.ReLU()
        self.out = nn.Linear(hidden, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(self.relu(self.hidden((features - self.mean) / self.std)))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in float64; a constant feature has scale 1."""
    x = features.detach().double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    constant = std <= 1e-12 * x.abs().amax(dim=0).clamp_min(1e-300)
    return mean, torch.where(constant, torch.ones_like(std), std)


def _check(features: Tensor, labels: Tensor, num_classes: int | None) -> int:
    if len(features) == 0:
        raise EmptyDataError("fitting a head needs at least one example; got none.")
    if features.ndim != 2 or labels.shape != (len(features),):
        raise FeatureShapeError(
            f"features must be (n, d) with labels (n,); got {tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if not torch.isfinite(features).all():
        raise NonFiniteFeaturesError("features hold NaN or infinity; check the backbone's output.")
    low, high = int(labels.min()), int(labels.max())
    classes = high + 1 if num_classes is None else num_classes
    if classes < 2:
        raise ClassCountError(f"a classifier needs at least two classes; got {classes}.")
    if low < 0 or high >= classes:
        raise LabelRangeError(f"labels must lie in 0..{classes - 1}; found {low}..{high}.")
    return classes
