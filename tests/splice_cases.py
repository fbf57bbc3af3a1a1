"""Networks that several tests of the splice share."""

from __future__ import annotations

import pytest
from torch import nn

CLASSES = 11


class Small(nn.Module):
    """Convolution, batch norm, dropout and two linear layers; ``tail`` runs after the last of them."""

    def __init__(self, tail: nn.Module | None = None):
        super().__init__()
        self.fc2 = nn.Linear(8, CLASSES)  # registered first on purpose: order of execution is what counts
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.fc1 = nn.Linear(16, 8)
        self.tail = tail or nn.Identity()

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.relu(self.bn(self.conv(2 * x - 1))), 2)
        x = self.relu(self.fc1(self.drop(x.flatten(1))))
        return self.tail(self.fc2(x))


def tv_vit():
    vit = pytest.importorskip("torchvision.models").VisionTransformer
    return vit(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES)


def tv(name, **options):
    models = "torchvision.models"
    return lambda: pytest.importorskip(models).get_model(name, weights=None, num_classes=CLASSES, **options)
