"""The datasets that go by name, and the registry that a new one joins.

A dataset is one function, registered under its name, that returns the raw examples of a split:

    @register_dataset("my_digits")
    def _my_digits(split: str, data_dir: Path | None, download: bool) -> Examples:
        return Examples(images, labels, classes)

``images`` is float in [0, 1] or uint8, shape (n, c, h, w), or anything that gives such tensors when indexed
with a vector of positions (so that a folder of pictures need not fit in memory). Further keyword arguments of
the function become keyword arguments of :func:`convex_head.load_dataset`.
"""

from __future__ import annotations

import gzip
import importlib
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from convex_head.errors import DatasetFormatError, DatasetNotFoundError, MissingExtraError

SPLITS = ("train", "test")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DOWNLOADS = Path("~/.cache/convex_head/data")
# Spelling and order of the dataset's own documentation.
FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


class Source(Protocol):
    """What gives (k, c, h, w) images, float in [0, 1] or uint8, for a vector of k positions."""

    def __getitem__(self, positions: Tensor, /) -> Tensor: ...


class Examples(NamedTuple):
    """What a dataset's function returns; ``split`` only where it differs from the one asked for."""

    images: Source
    labels: Tensor
    classes: tuple[str, ...]
    split: str | None = None


REGISTRY: dict[str, Callable[..., Examples]] = {}


def register_dataset(name: str) -> Callable[[Callable[..., Examples]], Callable[..., Examples]]:
    """Decorator: make ``function(split, data_dir, download, **options) -> Examples`` loadable by name."""

    def register(function: Callable[..., Examples]) -> Callable[..., Examples]:
        REGISTRY[name] = function
        return function

    return register


def dataset_names() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(REGISTRY))


@register_dataset("digits")
def _digits(split: str, data_dir: Path | None, download: bool) -> Examples:
    """sklearn's 8x8 digits, (n, 1, 8, 8), /16; a stratified 75/25 split of random_state 0 (1347 and 450)."""
    raw = _sklearn("sklearn.datasets").load_digits()
    kept = _sklearn_split(raw.target, split)
    images = torch.as_tensor(raw.images[kept] / 16, dtype=torch.float32).unsqueeze(1)
    return Examples(images, raw.target[kept], tuple(str(digit) for digit in raw.target_names))


@register_dataset("breast_cancer")
def _breast_cancer(split: str, data_dir: Path | None, download: bool) -> Examples:
    """Wisconsin breast cancer as images of one row, (n, 1, 1, 30), so that image attacks take it.

    The split is that of digits (426 and 143); each feature is mapped to [0, 1] by the *train* split's
    minimum and maximum, and test values beyond them are clipped.
    """
    raw = _sklearn("sklearn.datasets").load_breast_cancer()
    train = raw.data[_sklearn_split(raw.target, "train")]
    kept = _sklearn_split(raw.target, split)
    low, high = train.min(axis=0), train.max(axis=0)
    scaled = ((raw.data[kept] - low) / (high - low)).clip(0, 1)
    images = torch.as_tensor(scaled, dtype=torch.float32).reshape(len(kept), 1, 1, -1)
    return Examples(images, raw.target[kept], tuple(str(label) for label in raw.target_names))


@register_dataset("fashion_mnist")
def _fashion_mnist(split: str, data_dir: Path | None, download: bool) -> Examples:
    """Fashion-MNIST (60,000 and 10,000), (n, 1, 28, 28), from idx files, gzipped or not."""
    prefix = "train" if split == "train" else "t10k"
    stems = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    found = _find_idx(stems, data_dir)
    if found is None and download:
        _torchvision_dataset("FashionMNIST", data_dir, split, download=True)
        found = _find_idx(stems, data_dir)
    if found is None:
        raise _not_found("fashion_mnist", data_dir, "install the Debian package dataset-fashion-mnist")
    images, labels = (read_idx(path) for path in found)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DatasetFormatError(
            f"{found[0]} must hold one image a label, got {images.shape} and {labels.shape}; fetch it again"
        )
    return Examples(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels), FASHION_MNIST_CLASSES)


@register_dataset("cifar10")
def _cifar10(split: str, data_dir: Path | None, download: bool) -> Examples:
    """CIFAR-10 (50,000 and 10,000), (n, 3, 32, 32); torchvision verifies the files' checksums."""
    return _cifar("cifar10", "CIFAR10", split, data_dir, download)


@register_dataset("cifar100")
def _cifar100(split: str, data_dir: Path | None, download: bool) -> Examples:
    """CIFAR-100 (50,000 and 10,000), (n, 3, 32, 32); torchvision verifies the files' checksums."""
    return _cifar("cifar100", "CIFAR100", split, data_dir, download)


@register_dataset("folder")
def _folder(split: str, data_dir: Path | None, download: bool, *, resize: int | None = None) -> Examples:
    """Pictures in one folder a class, as RGB.

    They lie in <data_dir>/<split>/<class>/, or in <data_dir>/<class>/ and then are taken whole. ``resize``
    scales the shorter side to that many pixels and crops the centre square; without it, all have one size.
    """
    datasets = _torchvision("torchvision.datasets")
    if data_dir is None or not data_dir.is_dir():
        raise DatasetNotFoundError(f"folder needs data_dir with one subfolder a class, got {data_dir}; pass one")
    has_splits = any((data_dir / name).is_dir() for name in SPLITS)
    root = data_dir / split if has_splits else data_dir
    try:
        pictures = datasets.ImageFolder(str(root))
    except FileNotFoundError as error:
        raise DatasetNotFoundError(f"no <class>/<picture> under {root}; arrange pictures so ({error})") from error
    labels = torch.tensor(pictures.targets)
    return Examples(_Pictures(pictures, resize), labels, tuple(pictures.classes), split if has_splits else "all")


class _Pictures:
    """A torchvision ImageFolder as a :class:`Source` of uint8 images; reads only what it is asked for."""

    def __init__(self, pictures: Any, resize: int | None):
        self.pictures = pictures
        self.resize = resize

    def __getitem__(self, positions: Tensor, /) -> Tensor:
        functional = _torchvision("torchvision.transforms.functional")
        images: list[Tensor] = []
        for position in positions.tolist():
            try:
                image = self.pictures[position][0]
            except OSError as error:
                raise DatasetFormatError(f"a picture cannot be read ({error}); replace or remove it") from error
            if self.resize is not None:
                image = functional.center_crop(functional.resize(image, self.resize), self.resize)
            images.append(functional.pil_to_tensor(image))
            if images[-1].shape != images[0].shape:
                raise DatasetFormatError(
                    f"pictures must share one size, found {tuple(images[0].shape[1:])} and "
                    f"{tuple(images[-1].shape[1:])} in {self.pictures.samples[position][0]}; pass resize"
                )
        return torch.stack(images)


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, gzipped or not.

    The format of MNIST's files: two zero bytes, the type 0x08, the number of dimensions (one byte), each
    dimension as a big-endian int32, then the bytes themselves.

    Raises:
        DatasetFormatError: another magic number, or more or fewer bytes than the header says.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DatasetFormatError(f"{path} is a damaged gzip file ({error}); fetch it again") from error
    start = 4 + 4 * content[3] if len(content) >= 4 else 0
    if content[:3] != b"\0\0\x08" or not 4 < start <= len(content):
        raise DatasetFormatError(
            f"an idx file of bytes starts with 0x000008, then sizes; {path} with 0x{content[:4].hex()}; fetch it again"
        )
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    if len(content) != start + math.prod(shape):
        raise DatasetFormatError(
            f"{path} declares shape {shape}, {start + math.prod(shape)} bytes, but has {len(content)}; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _find_idx(stems: tuple[str, str], data_dir: Path | None) -> tuple[Path, ...] | None:
    """The files with these stems, in the first folder that has them all."""
    roots = [DEBIAN_FASHION_MNIST, DOWNLOADS.expanduser()] if data_dir is None else [data_dir]
    for folder in (place for root in roots for place in (root, root / "FashionMNIST" / "raw")):
        candidates = [[folder / stem, folder / f"{stem}.gz"] for stem in stems]
        found = [next((path for path in paths if path.is_file()), None) for paths in candidates]
        if None not in found:
            return tuple(path for path in found if path is not None)
    return None


def _cifar(name: str, class_name: str, split: str, data_dir: Path | None, download: bool) -> Examples:
    raw = _torchvision_dataset(class_name, data_dir, split, download)
    if raw is None:
        raise _not_found(name, data_dir, f"put the batches of its python version into {DOWNLOADS}")
    images = torch.from_numpy(raw.data).permute(0, 3, 1, 2)
    return Examples(images, torch.tensor(raw.targets), tuple(raw.classes))


def _torchvision_dataset(class_name: str, data_dir: Path | None, split: str, download: bool) -> Any:
    """torchvision's dataset of that name; None where its intact files are missing and not to be fetched."""
    dataset_class = getattr(_torchvision("torchvision.datasets"), class_name)
    root = DOWNLOADS.expanduser() if data_dir is None else data_dir
    if root.name == getattr(dataset_class, "base_folder", None):
        root = root.parent
    try:
        return dataset_class(str(root), train=split == "train", download=download)
    except (OSError, RuntimeError) as error:
        if download:
            raise DatasetNotFoundError(
                f"downloading {class_name} to {root} failed ({error}); copy the files there by hand"
            ) from error
        return None


def _not_found(name: str, data_dir: Path | None, local: str) -> DatasetNotFoundError:
    where = "the usual folders" if data_dir is None else str(data_dir)
    return DatasetNotFoundError(
        f"{name} was not found (intact) in {where}; three ways to get it: (1) {local}; (2) pass data_dir, "
        "the folder with its original files; (3) pass download=True to let torchvision fetch it"
    )


def _sklearn_split(labels: np.ndarray, split: str) -> np.ndarray:
    """Positions of the stratified 75/25 split with random_state 0."""
    split_at = _sklearn("sklearn.model_selection").train_test_split
    train, test = split_at(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    return train if split == "train" else test


def _sklearn(module: str) -> Any:
    return _import_extra(module, "bench")


def _torchvision(module: str) -> Any:
    return _import_extra(module, "vision")


def _import_extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"this dataset needs {module.partition('.')[0]}, which cannot be imported ({error}); "
            f"pip install '.[{extra}]' in the checkout"
        ) from error
