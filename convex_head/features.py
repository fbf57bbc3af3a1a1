"""Features of a frozen backbone, computed once: in chunks, with progress, and kept on disk.

    features[i] = backbone(images[i]),    evaluation mode, no gradients, (n, d) float32 on the CPU.

What makes two extractions the same, and the files, are :mod:`convex_head.feature_cache`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from convex_head.console import messages, progress_bars
from convex_head.data import Dataset
from convex_head.errors import (
    EmptyDataError,
    FeatureShapeError,
    ImageError,
    InputError,
    NonFiniteFeaturesError,
)
from convex_head.feature_cache import CacheEntry, cache_key, update_with_tensor

Report = Callable[[int, int | None], None]


def extract_features(
    backbone: nn.Module,
    images: Tensor | Dataset | DataLoader,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    cache_dir: str | Path | None = None,
    progress: bool | Report = False,
) -> Tensor:
    """Features of all images.

    Args:
        backbone: images (N, ...) to features (N, d), or (N, c, h, w), which are flattened; for instance
            ``SplicedModel.backbone``. Its modes and its device are as before afterwards.
        images: (n, ...) tensor, a :class:`~convex_head.data.Dataset`, or a DataLoader of images or of pairs
            (images, labels). A DataLoader is read batch by batch, twice with a cache, so it must not shuffle.
        batch_size: images in one chunk; a DataLoader has its own.
        device: where to compute; None for where the backbone is.
        cache_dir: folder of the cache, made if missing; None for no cache.
        progress: True for a bar on the terminal, or a function called after each chunk with the number of
            images done and in all (None where a DataLoader does not tell).

    Returns:
        (n, d) float32 on the CPU, finite. From a cache it is a private map of the file: it is read as needed,
        and writing into the tensor does not change the file.

    Raises:
        EmptyDataError: there is no image.
        ImageError: images are not floating-point tensors.
        FeatureShapeError: the backbone does not give one vector an image, always of one width.
        NonFiniteFeaturesError: a feature is NaN or infinite.
        InputError: batch_size is not positive, or a DataLoader gives other images when it is read again.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}; 256 is usual")
    data = images.images if isinstance(images, Dataset) else images
    if not isinstance(data, (Tensor, DataLoader)):
        raise ImageError(f"images must be a tensor, a Dataset or a DataLoader, got {type(data).__name__}; convert them")
    with _frozen(backbone, device) as place:
        if cache_dir is None:
            with _reporting(progress, _size(data)) as report:
                return torch.cat(list(_compute(backbone, _batches(data, batch_size), place, report)))
        digest = _Digest()
        for _ in digest.follow(_batches(data, batch_size)):
            pass
        key = cache_key(backbone, digest.hexdigest(), place)
        entry = CacheEntry(Path(cache_dir).expanduser(), key)
        features = entry.read()
        if features is None:
            with _reporting(progress, digest.size) as report:
                batches = _unchanged(_batches(data, batch_size), digest.hexdigest())
                features = entry.write(_compute(backbone, batches, place, report), digest.size)
        return features


def _compute(
    backbone: nn.Module, batches: Iterator[Tensor], place: torch.device, report: Callable[[int], None]
) -> Iterator[Tensor]:
    """Checked (k, d) features of each batch."""
    dtype = next((p.dtype for p in backbone.parameters() if p.is_floating_point()), torch.float32)
    done, width = 0, None
    for images in batches:
        with torch.no_grad():
            features = backbone(images.to(place, dtype))
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != len(images):
            raise FeatureShapeError(
                f"the backbone must give one feature vector an image, {len(images)} images gave "
                f"{_describe(features)}; cut the network before its classifier"
            )
        features = features.flatten(1).float().cpu()
        width = features.shape[1] if width is None else width
        if features.shape[1] != width:
            raise FeatureShapeError(
                f"all features must have one width, found {width} and {features.shape[1]}; give images one size"
            )
        finite = features.isfinite().all(dim=1)
        if not finite.all():
            raise NonFiniteFeaturesError(
                f"features must be finite, image {done + int((~finite).nonzero()[0])} gives NaN or infinity; "
                "check the backbone's weights and that images are in [0, 1]"
            )
        done += len(images)
        report(done)
        yield features


def _batches(data: Tensor | DataLoader, batch_size: int) -> Iterator[Tensor]:
    """Non-empty batches of floating-point images."""
    empty = True
    for batch in data if isinstance(data, DataLoader) else data.split(batch_size):
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 2:
            raise ImageError(
                f"images must be floating-point batches (n, ...), got {_describe(images)}; divide bytes by 255"
            )
        if len(images):
            empty = False
            yield images
    if empty:
        raise EmptyDataError("there must be at least one image, got none; check the data")


class _Digest:
    """SHA-256 of images, however they are cut into batches."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._form = ""
        self.size = 0

    def follow(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """The batches, taken in as they pass."""
        for images in batches:
            form = repr((images.dtype, tuple(images.shape[1:])))
            if form != self._form:
                self._form = form
                self._hash.update(form.encode())
            update_with_tensor(self._hash, images)
            self.size += len(images)
            yield images

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _unchanged(batches: Iterator[Tensor], expected: str) -> Iterator[Tensor]:
    """The batches, and an error at their end if they are not those of the expected digest."""
    digest = _Digest()
    yield from digest.follow(batches)
    if digest.hexdigest() != expected:
        raise InputError(
            "a DataLoader must give the same images whenever it is read, this one does not; "
            "build it with shuffle=False and without random transforms, or pass cache_dir=None"
        )


def _size(data: Tensor | DataLoader) -> int | None:
    """Number of images, where it is known beforehand."""
    if not isinstance(data, DataLoader):
        return len(data)
    try:
        return len(data.sampler)  # type: ignore[arg-type]
    except TypeError:  # an iterable dataset
        return None


@contextlib.contextmanager
def _frozen(backbone: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Evaluation mode on a device, and all as it was afterwards."""
    tensors = (*backbone.parameters(), *backbone.buffers())
    home = tensors[0].device if tensors else torch.device("cpu")
    place = home if device is None else torch.device(device)
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        backbone.eval().to(place)
        yield place
    finally:
        backbone.to(home)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _reporting(progress: bool | Report, size: int | None) -> Iterator[Callable[[int], None]]:
    """What to call with the number of images done."""
    if callable(progress):
        yield lambda done: progress(done, size)
    elif not progress:
        yield lambda done: None
    else:
        whole = "" if size is None else f"/{size}"
        with progress_bars(messages()) as bars:
            task = bars.add_task("features", total=size, note="")
            yield lambda done: bars.update(task, completed=done, note=f"{done}{whole} images")


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
