"""Pre-activation residual networks (He et al. 2016, arXiv 1603.05027) on images in [0, 1].

A block computes x + conv(relu(bn(conv(relu(bn(x)))))); where the shape changes, the shortcut is a 1x1
convolution of relu(bn(x)). Normalisation with the data's mean and standard deviation is the first layer, so
that a pixel threat model and every attack library can be used on the network as it stands.

Cut points by name, in the order of the data: ``act`` (N, width, h, w) before the pooling, ``flatten``
(N, width) after it, ``fc`` the final linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError


class Normalize(nn.Module):
    """(x - mean) / std for each channel; mean and std are buffers and travel with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise InputError(f"normalisation needs one positive std per mean; got mean={mean}, std={std}.")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, added to the shortcut."""

    def __init__(self, width_in: int, width_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu1(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(hidden)
        return skip + self.conv2(self.relu2(self.bn2(self.conv1(hidden))))


class PatchStem(nn.Sequential):
    """Non-overlapping patches, each mapped linearly to ``width`` channels; resolution falls by ``patch``.

    Pixels are moved to channels first: on CPUs the gradient of a strided convolution of one channel takes longer
    than the rest of a small network.
    """

    def __init__(self, in_channels: int, width: int, patch: int):
        super().__init__(nn.PixelUnshuffle(patch), nn.Conv2d(in_channels * patch**2, width, 1, bias=False))


class PreActResNet(nn.Module):
    """Images (N, in_channels, H, W) in [0, 1] -> logits (N, num_classes).

    Args:
        depth_blocks: residual blocks of each stage; every stage after the first halves the resolution.
        widths: channels of each stage; the last one is the number of features.
        in_channels: channels of the images.
        num_classes: number of logits.
        mean: channel means of the training images; a single number serves every channel.
        std: channel standard deviations, positive.
        patch: side of the patches that the stem embeds; 1 is the usual 3x3 convolution.
        stem_width: channels of the stem; the first stage then halves the resolution too. None: ``widths[0]``.

    Raises:
        InputError: stages and widths differ in number, a std or ``patch`` is not positive.
    """

    def __init__(
        self,
        depth_blocks: Sequence[int],
        widths: Sequence[int],
        in_channels: int = 3,
        num_classes: int = 10,
        *,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
        patch: int = 1,
        stem_width: int | None = None,
    ):
        super().__init__()
        if patch < 1:
            raise InputError(f"patch is the side of a square of pixels, at least 1; got {patch}. Use for example 4.")
        if not widths or len(depth_blocks) != len(widths) or min(depth_blocks) < 1:
            raise InputError(
                f"every stage needs a width and at least one block; got depth_blocks={tuple(depth_blocks)}, "
                f"widths={tuple(widths)}."
            )
        self.normalize = Normalize(mean, std)
        width = stem_width or widths[0]
        self.stem: nn.Module
        if patch > 1:
            self.stem = PatchStem(in_channels, width, patch)
        else:
            self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        stages = []
        for index, (blocks, out) in enumerate(zip(depth_blocks, widths, strict=True)):
            strides = [1 if index == 0 and stem_width is None else 2] + [1] * (blocks - 1)
            inputs = [width] + [out] * (blocks - 1)
            stages.append(nn.Sequential(*(PreActBlock(i, out, s) for i, s in zip(inputs, strides, strict=True))))
            width = out
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.act(self.norm(self.stages(self.stem(self.normalize(images)))))
        return self.fc(self.flatten(self.pool(maps)))


def channel_statistics(images: Tensor) -> dict[str, tuple[float, ...]]:
    """``mean`` and ``std`` of the channels of images (N, C, H, W), as the networks take them."""
    flat = images.detach().double().transpose(0, 1).flatten(1)
    std = flat.std(dim=1).clamp_min(1e-3)
    return {"mean": tuple(flat.mean(dim=1).tolist()), "std": tuple(std.tolist())}


def preact_resnet18(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
    std: Sequence[float] = (0.247, 0.2435, 0.2616),
) -> PreActResNet:
    """PreAct ResNet-18 for 32x32 images, 512 features; mean and std default to those of CIFAR-10."""
    return PreActResNet(
        (2, 2, 2, 2),
        (64, 128, 256, 512),
        in_channels,
        num_classes,
        mean=mean[:in_channels],
        std=std[:in_channels],
    )


def preact_resnet_small(
    num_classes: int = 10,
    in_channels: int = 1,
    *,
    widths: Sequence[int] = (16, 32, 64),
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.25,),
) -> PreActResNet:
    """One block a stage: a network that two CPU cores train on 28x28 images in minutes."""
    return PreActResNet([1] * len(widths), widths, in_channels, num_classes, mean=mean, std=std)


def preact_resnet_tiny(
    num_classes: int = 10,
    in_channels: int = 1,
    *,
    widths: Sequence[int] = (32,),
    stem_width: int = 16,
    patch: int = 4,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.25,),
) -> PreActResNet:
    """Patches of 4x4 pixels, then one residual block: AutoAttack takes a quarter of a CPU second a surviving image."""
    blocks = [1] * len(widths)
    return PreActResNet(
        blocks, widths, in_channels, num_classes, mean=mean, std=std, patch=patch, stem_width=stem_width
    )
