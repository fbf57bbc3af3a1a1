"""extract_features refuses bad features, backbones and images by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from convex_head import errors
from convex_head.features import extract_features


@pytest.fixture
def net() -> nn.Module:
    return nn.Conv2d(1, 3, 3)


@pytest.fixture
def images():
    return torch.rand(10, 1, 5, 5)


def test_non_finite_features_name_the_image(tmp_path, net, images):
    images[6, 0, 2, 2] = float("nan")
    for cache_dir in (None, tmp_path):
        with pytest.raises(errors.NonFiniteFeaturesError, match="image 6 gives NaN"):
            extract_features(net, images, batch_size=4, cache_dir=cache_dir)
    assert list(tmp_path.iterdir()) == []


class Wrong(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.sum(), r"10 images gave torch.float32 \(\)"),
        (lambda x: x.flatten(), r"10 images gave torch.float32 \(250,\)"),
        (lambda x: x[:3], r"10 images gave torch.float32 \(3, 1, 5, 5\)"),
        (lambda x: (x, x), "10 images gave tuple"),
    ],
)
def test_backbones_that_give_no_vector_an_image(images, function, message):
    with pytest.raises(errors.FeatureShapeError, match=message):
        extract_features(Wrong(function), images)


def test_images_of_several_sizes():
    batches = [torch.rand(2, 1, 5, 5), torch.rand(2, 1, 6, 6)]
    with pytest.raises(errors.FeatureShapeError, match="found 25 and 36"):
        extract_features(nn.Flatten(), DataLoader(batches, batch_size=None))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.rand(0, 1, 5, 5), errors.EmptyDataError, "at least one image"),
        (torch.zeros(2, 1, 5, 5, dtype=torch.uint8), errors.ImageError, r"uint8.*255"),
        (torch.rand(5), errors.ImageError, r"\(n, \.\.\.\), got torch.float32 \(5,\)"),
        ([torch.rand(1, 5, 5)], errors.ImageError, "got list"),
        ("digits", errors.ImageError, "got str"),
    ],
)
def test_bad_images(net, data, error, message):
    with pytest.raises(error, match=message):
        extract_features(net, data)


def test_bad_batch_size(net, images):
    with pytest.raises(errors.InputError, match="at least 1, got 0"):
        extract_features(net, images, batch_size=0)
