"""Labelled images by name: tensors in [0, 1], the same examples on every machine.

Splits are "train" and "test". Nothing is downloaded unless ``download=True`` says so. The datasets
themselves, and how to add one, are in :mod:`convex_head.data_sources`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from convex_head.data_sources import REGISTRY, SPLITS, dataset_names, register_dataset
from convex_head.errors import (
    EmptyDataError,
    ImageError,
    ImageRangeError,
    InputError,
    LabelRangeError,
    LabelShapeError,
    LabelTypeError,
    SubsetError,
    UnknownDatasetError,
)

__all__ = ["Dataset", "as_pair", "load_dataset", "register_dataset"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images; unpacks as the pair ``images, labels``.

    Attributes:
        images: (n, c, h, w) float32 in [0, 1].
        labels: (n,) int64 in 0..num_classes-1.
        name: the registered name.
        split: "train", "test", or "all" for a folder without splits.
        classes: the class names in the order of the labels.

    Raises:
        EmptyDataError, ImageError, ImageRangeError, LabelShapeError, LabelTypeError, LabelRangeError: an
            attribute is not as stated.
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    name: str
    split: str
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = _checked_pair(self.images, self.labels)
        if images.ndim != 4:
            raise ImageError(f"images must be (n, c, h, w), got shape {tuple(images.shape)}; reshape them")
        if labels.max() >= len(self.classes):
            raise LabelRangeError(
                f"labels must be below the number of classes {len(self.classes)}, found {int(labels.max())}; "
                "name every class"
            )
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return self.labels.numel()

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.images, self.labels))

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each occurs."""
        return len(self.classes)

    def subset(self, indices: Tensor | np.ndarray | list[int]) -> Dataset:
        """The examples at the given positions, in that order.

        Args:
            indices: integers in -n..n-1.

        Raises:
            SubsetError: a position does not exist or is not an integer.
        """
        positions = torch.as_tensor(indices)
        if positions.ndim != 1 or positions.is_floating_point() or positions.dtype == torch.bool:
            raise SubsetError(
                f"indices must be a vector of integers, got {positions.dtype} {tuple(positions.shape)}; pass positions"
            )
        if positions.numel() and not (-len(self) <= positions.min() and positions.max() < len(self)):
            raise SubsetError(
                f"indices must be below the {len(self)} examples of {self.name}, "
                f"found {int(positions.min())}..{int(positions.max())}; drop those"
            )
        return Dataset(self.images[positions], self.labels[positions], self.name, self.split, self.classes)

    def take(self, n: int, seed: int | None = None) -> Dataset:
        """A fixed subset of ``n`` examples: the first n, or with a seed a stratified draw.

        The draw keeps the proportions of the classes, depends on the seed alone, and is nested: the first
        100 of ``take(1000, seed)`` are ``take(100, seed)``.

        Raises:
            SubsetError: n is not in 1..len(self).
        """
        return self.subset(_draw(self.labels, n, seed))


def load_dataset(
    name: str,
    *,
    split: str = "test",
    data_dir: str | Path | None = None,
    n: int | None = None,
    seed: int | None = None,
    download: bool = False,
    **options: Any,
) -> Dataset:
    """Load a dataset by name.

    Args:
        name: "digits", "breast_cancer", "fashion_mnist", "cifar10", "cifar100", "folder", or a name given to
            :func:`register_dataset`.
        split: "train" or "test".
        data_dir: local folder with the dataset's files (digits and breast_cancer need none).
        n, seed: the subset :meth:`Dataset.take` describes; None for all examples.
        download: allow torchvision to fetch missing files, into ``data_dir`` or a cache in the home folder.
        **options: further arguments of the dataset ("folder" takes ``resize``, a side length in pixels).

    Raises:
        UnknownDatasetError: no such name.
        SubsetError: no such split, or n is not in 1..number of examples.
        DatasetNotFoundError: the files are not on this machine; says how to get them.
        DatasetFormatError: a file is damaged.
        MissingExtraError: scikit-learn or torchvision is not installed.
    """
    if name not in REGISTRY:
        raise UnknownDatasetError(f"no dataset is named {name!r}; known names: {', '.join(dataset_names())}")
    if split not in SPLITS:
        raise SubsetError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    folder = None if data_dir is None else Path(data_dir).expanduser()
    raw = REGISTRY[name](split, folder, download, **options)
    labels = torch.as_tensor(raw.labels).long()
    positions = torch.arange(labels.numel()) if n is None else _draw(labels, n, seed)
    images = raw.images[positions]
    if images.dtype == torch.uint8:
        images = images.float() / 255
    return Dataset(images.float(), labels[positions], name, raw.split or split, tuple(raw.classes))


def as_pair(data: Any, *, n: int | None = None, seed: int | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of whatever a caller calls data, checked.

    Args:
        data: a dataset name, a :class:`Dataset`, a pair (images, labels) of tensors or arrays, or a
            DataLoader over such pairs (read once, in its order).
        n, seed: the subset :meth:`Dataset.take` describes; None for all examples.
        **options: further arguments of :func:`load_dataset`, where data is a name.

    Returns:
        images (n, ...) float32 in [0, 1], labels (n,) int64.

    Raises:
        InputError: data is none of these, or options come with data that is not a name.
        EmptyDataError, ImageError, ImageRangeError, LabelShapeError, LabelTypeError, LabelRangeError: what is
            broken.
    """
    if isinstance(data, str):
        images, labels = load_dataset(data, n=n, seed=seed, **options)
        return images, labels
    if options:
        raise InputError(f"{', '.join(sorted(options))} applies to a dataset name only; load the data first")
    if isinstance(data, DataLoader):
        data = _read_loader(data)
    elif isinstance(data, Dataset):
        data = (data.images, data.labels)
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise InputError(
            "data must be a dataset name, a pair (images, labels), a Dataset or a DataLoader, "
            f"got {type(data).__name__}; pass (images, labels)"
        )
    images, labels = _checked_pair(*data)
    if n is not None:
        positions = _draw(labels, n, seed)
        images, labels = images[positions], labels[positions]
    return images, labels


def _draw(labels: Tensor, n: int, seed: int | None) -> Tensor:
    """Positions of :meth:`Dataset.take`."""
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 1 <= n <= labels.numel():
        raise SubsetError(f"n must be an integer in 1..{labels.numel()}, the number of examples, got {n!r}")
    if seed is None:
        return torch.arange(n)
    # Shuffle, then order by each example's quantile within its class: every prefix is stratified.
    order = np.random.default_rng(seed).permutation(labels.numel())
    shuffled = labels.numpy(force=True)[order]
    quantile = np.empty(len(order))
    for label in np.unique(shuffled):
        members = np.flatnonzero(shuffled == label)
        quantile[members] = (np.arange(len(members)) + 0.5) / len(members)
    return torch.from_numpy(order[np.argsort(quantile, kind="stable")[:n]])


def _read_loader(loader: DataLoader) -> tuple[Tensor, Tensor]:
    """All batches of a DataLoader of pairs."""
    batches = []
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise InputError(
                f"a DataLoader must give pairs (images, labels), got {type(batch).__name__}; fix its dataset"
            )
        batches.append(batch)
    if not batches:
        raise EmptyDataError("data must hold at least one example, the DataLoader gave none; fix its dataset")
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def _checked_pair(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """float32 images (n, ...) and int64 labels (n,), or a named error."""
    try:
        images = torch.as_tensor(images)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ImageError(f"images must be a tensor or an array: {error}; stack them") from error
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LabelTypeError(f"labels must be integers: {error}; pass class indices") from error
    if images.ndim < 2:
        raise ImageError(f"images must be a batch (n, ...), got shape {tuple(images.shape)}; add a dimension")
    if not images.is_floating_point():
        raise ImageError(f"images must be floating point, got {images.dtype}; pass images.float() / 255")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise LabelTypeError(f"labels must be integers, got {labels.dtype}; pass class indices, labels.long()")
    if labels.ndim != 1:
        raise LabelShapeError(f"labels must be a vector (n,), got shape {tuple(labels.shape)}; pass class indices")
    if len(images) != len(labels):
        raise LabelShapeError(f"there must be one label an image, got {len(images)} images, {len(labels)} labels")
    if images.numel() == 0:
        raise EmptyDataError(
            f"data must hold at least one example, got images of shape {tuple(images.shape)}; add some"
        )
    if labels.min() < 0:
        raise LabelRangeError(f"labels must be 0..num_classes-1, found {int(labels.min())}; remap them")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ImageRangeError(
            f"images must be in [0, 1], found {low:.4g}..{high:.4g}; rescale them, normalise inside the model"
        )
    return images.float(), labels.long()
