"""The data sets of :mod:`benchmarks.solvers`, standardised, each with a held-out part.

    breast_cancer   sklearn, rows permuted by numpy's default_rng(0), standardised with the first 200: 455 and 114 rows
    digits          sklearn, rows permuted by numpy's default_rng(0), standardised with the first 1437: 1437 and 360
    features        Fashion-MNIST through the CIFAR-10 ResNet-18 of benchmarks/transfer.py, 512 features, float32,
                    standardised with the rows that are fitted on: 50,000 training images and 10,000 test images

The training images are the first of a permutation by torch's generator with seed 5. Their features take minutes of all
cores; they are kept as .npy files and a file with enough rows is used as it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from benchmarks.common import Record
from benchmarks.transfer import CUT, Pipeline, pretrained
from convex_head import load_dataset, replace_head
from convex_head.console import messages
from convex_head.features import extract_features
from convex_head.statistics import wilson_interval

PARTS = ("breast_cancer", "digits", "features")
TRAIN = {"breast_cancer": 455, "digits": 1437, "features": 50_000}
TEST = {"breast_cancer": 114, "digits": 360, "features": 10_000}
_WIDTH = 512
_BATCH = 250
_SEED = 5


@dataclass(frozen=True)
class Split:
    """Rows to fit on and rows held out.

    Attributes:
        x, y: (n, d) features, float64 or float32, and (n,) labels.
        test_x, test_y: the same, held out.
        num_classes: C.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int


def load(part: str, n: int, d: int, tests: int, folder: Path) -> Split:
    """The first n rows, d features and ``tests`` held-out rows of a data set; features are kept in ``folder``."""
    if part == "features":
        return _features(n, d, tests, folder)
    source, rows, standard = (load_breast_cancer, 455, 200) if part == "breast_cancer" else (load_digits, 1437, 1437)
    values, labels = source(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = torch.from_numpy(values[order]), torch.from_numpy(labels[order])
    x = _standardised(x, x[:standard])[:, :d].contiguous()
    held = slice(rows, rows + tests)
    return Split(x[:rows][:n], y[:rows][:n], x[held], y[held], len(set(labels.tolist())))


def held_out(correct: dict[str, Tensor]) -> Record:
    """Share, 95 % Wilson interval and n of each named boolean tensor, for a record."""
    found: Record = {}
    for name, right in correct.items():
        count, n = int(right.sum()), len(right)
        low, high = wilson_interval(count, n)
        found |= {"test_n": n, name: count / n, f"{name}_low": low, f"{name}_high": high}
    return found


def _standardised(x: Tensor, reference: Tensor) -> Tensor:
    mean, std = reference.mean(0), reference.std(0, correction=0)
    return (x - mean) / torch.where(std > 0, std, torch.ones_like(std))


def _features(n: int, d: int, tests: int, folder: Path) -> Split:
    labels = {split: load_dataset("fashion_mnist", split=split).labels for split in ("train", "test")}
    order = torch.randperm(len(labels["train"]), generator=torch.Generator().manual_seed(_SEED))
    x = backbone_features(folder, "train", order[:n])[:, :d].double()
    test_x = backbone_features(folder, "test", torch.arange(tests))[:, :d].double()
    return Split(
        _standardised(x, x).float().contiguous(),
        labels["train"][order[:n]],
        _standardised(test_x, x).float().contiguous(),
        labels["test"][:tests],
        10,
    )


def backbone_features(folder: Path, split: str, rows: Tensor) -> Tensor:
    """(len(rows), 512) float32 features of these images of Fashion-MNIST, in this order.

    Args:
        folder: where they are kept, as fashion_mnist_resnet18_<split>.npy; a file with fewer rows is replaced.
        split: train or test.
        rows: the images; always the first of one order for each split, so that longer files hold shorter ones.
    """
    path = folder / f"fashion_mnist_resnet18_{split}.npy"
    if path.exists():
        kept = np.load(path, mmap_mode="r")
        if kept.dtype == np.float32 and kept.ndim == 2 and kept.shape[1] == _WIDTH and len(kept) >= len(rows):
            return torch.from_numpy(np.array(kept[: len(rows)]))
    messages().print(f"features of {len(rows)} {split} images, into {path}")
    images = load_dataset("fashion_mnist", split=split).images[rows]
    backbone = replace_head(Pipeline(pretrained()), nn.Identity(), at=CUT).backbone
    found = extract_features(backbone, images, batch_size=_BATCH, progress=True)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, found.numpy())
    os.replace(part, path)
    return found
