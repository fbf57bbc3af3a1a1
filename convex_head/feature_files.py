"""Features and labels from NumPy files, without pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convex_head.errors import FeatureFileError


def read_features(
    path: Path, labels: Path | None = None, *, stream: bool = False, part: tuple[int, int] = (0, 1)
) -> tuple[Tensor | np.ndarray, Tensor, int]:
    """(n, d) features, (n,) labels and the number of classes.

    Args:
        path: .npz with arrays "features" and "labels", or .npy with the features.
        labels: .npy of labels; needed with a .npy of features.
        stream: leave the features of a .npy on disk, as a numpy.memmap.
        part: (i, k): the i-th of k parts of the rows; the classes are those of all.

    Raises:
        FeatureFileError: a file is missing, damaged, needs pickle, or lacks an array; or a .npz is to be streamed.
    """
    if stream and path.suffix != ".npy":
        raise FeatureFileError(f"features that stay on disk are a .npy file; found {path}. Write it with numpy.save.")
    if path.suffix == ".npz":
        with _open(path) as archive:
            missing = {"features", "labels"} - set(archive.files)
            if missing:
                raise FeatureFileError(
                    f"{path} needs the arrays features and labels; missing {sorted(missing)}, it has {archive.files}."
                )
            pair = _array(archive, "features", path), _array(archive, "labels", path)
    elif labels is None:
        raise FeatureFileError(f"{path} holds no labels; pass --labels labels.npy, or a .npz with both.")
    else:
        pair = _open(path, mapped=True), _open(labels)
    features, targets = pair
    if features.ndim != 2 or targets.size == 0 or not np.issubdtype(targets.dtype, np.integer):
        raise FeatureFileError(
            f"{path}: features are an (n, d) array and labels integers; found {features.shape} {features.dtype} "
            f"and {targets.shape} {targets.dtype}."
        )
    index, count = part
    rows = slice(len(features) * index // count, len(features) * (index + 1) // count)
    mine = features[rows] if stream else torch.from_numpy(np.array(features[rows]))
    return mine, torch.from_numpy(targets[rows].astype(np.int64)), int(targets.max()) + 1


def _open(path: Path, mapped: bool = False) -> Any:
    try:
        return np.load(path, allow_pickle=False, mmap_mode="r" if mapped else None)
    except (OSError, ValueError, EOFError) as error:
        raise FeatureFileError(
            f"cannot read {path}: {error}; write it with numpy.savez(path, features=..., labels=...)."
        ) from error


def _array(archive: Any, name: str, path: Path) -> np.ndarray:
    try:
        return np.asarray(archive[name])
    except ValueError as error:
        raise FeatureFileError(f"{path}: the array {name} cannot be read without pickle ({error}).") from error
