"""Checks of what users pass in. Each rule has its own error; messages state rule, value found and next step."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convex_head.errors import (
    ClassCountError,
    CoefficientError,
    EmptyDataError,
    FeatureShapeError,
    FeatureTypeError,
    LabelRangeError,
    LabelShapeError,
    LabelTypeError,
    NonFiniteFeaturesError,
    RadiusError,
    RegularisationError,
    SettingError,
    SingleClassError,
)
from convex_head.rows import give_back, is_mapped
from convex_head.shards import Whole

# Rows checked together, so that features on disk need not fit into memory.
_ROWS = 65536


def check_features(features: Any, width: int | None = None) -> Tensor:
    """Return features as a detached (n, d) tensor of a floating dtype.

    Raises:
        FeatureTypeError: not real numbers.
        FeatureShapeError: not two axes, or not ``width`` columns.
        EmptyDataError: no rows.
        NonFiniteFeaturesError: NaN or infinity.
    """
    tensor = _as_tensor(features, "features", FeatureTypeError)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise FeatureTypeError(f"features must be real numbers; found dtype {tensor.dtype}. Convert them to float.")
    if tensor.ndim != 2:
        raise FeatureShapeError(
            f"features must have two axes (examples, features); found shape {tuple(tensor.shape)}. "
            "Flatten each example with features.reshape(n, -1)."
        )
    if tensor.shape[0] == 0:
        raise EmptyDataError(f"features must hold at least one example; found shape {tuple(tensor.shape)}. Pass data.")
    if width is not None and tensor.shape[1] != width:
        raise FeatureShapeError(
            f"features must have in_features = {width} columns; found {tensor.shape[1]}. "
            "Build the head with the width that the backbone produces."
        )
    if tensor.shape[1] == 0:
        raise FeatureShapeError("features must have at least one column; found 0. Pass data.")
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        tensor = tensor.double()
    finite = torch.empty(len(tensor), dtype=torch.bool, device=tensor.device)
    for start in range(0, len(tensor), _ROWS):
        finite[start : start + _ROWS] = torch.isfinite(tensor[start : start + _ROWS]).all(dim=1)
        give_back(features)
    if not bool(finite.all()):
        bad = (~finite).nonzero().squeeze(1)
        raise NonFiniteFeaturesError(
            f"features must be finite; found NaN or infinity in {len(bad)} of {len(finite)} rows, first in row "
            f"{int(bad[0])}. Remove these rows or mend the backbone."
        )
    return tensor


def check_labels(labels: Any, n: int, num_classes: int, *, training: Whole | None = None) -> Tensor:
    """Return labels as an (n,) int64 tensor in 0..num_classes-1.

    Raises:
        LabelTypeError: not integers.
        LabelShapeError: not one label an example.
        LabelRangeError: outside 0..num_classes-1.
        SingleClassError: ``training`` is given and only one class occurs in all of its shards.
    """
    tensor = _as_tensor(labels, "labels", LabelTypeError)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise LabelTypeError(f"labels must be integers; found dtype {tensor.dtype}. Use labels.long().")
    if tensor.shape != (n,):
        raise LabelShapeError(
            f"labels must have one entry for each of the {n} examples; found shape {tuple(tensor.shape)}. "
            "Pass class indices, not one-hot rows."
        )
    tensor = tensor.detach().long()
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high >= num_classes:
        raise LabelRangeError(
            f"labels must lie in 0..{num_classes - 1}; found {low}..{high}. Renumber the classes or raise num_classes."
        )
    if training is not None:
        present = torch.zeros(num_classes, device=tensor.device)
        present[tensor.unique()] = 1
        training.max(present)
        if present.sum() < 2:
            only = int(present.argmax())
            raise SingleClassError(
                f"training needs at least two classes; found only label {only}. Add examples of another."
            )
    return tensor


def check_radius(radius: Any) -> float:
    """Return a feature radius; RadiusError unless it is a finite number >= 0."""
    if not _is_number(radius) or not 0 <= radius < math.inf:
        raise RadiusError(f"radius must be a finite number >= 0; found {radius!r}. Use for example radius=0.5.")
    return float(radius)


def check_reg(reg: Any) -> float:
    """Return a regularisation weight; RegularisationError unless it is a finite number > 0."""
    if not _is_number(reg) or not 0 < reg < math.inf:
        raise RegularisationError(f"reg must be a finite number > 0; found {reg!r}. Use for example reg=1e-3.")
    return float(reg)


def check_coefficients(coefficients: Any) -> tuple[float, float, float]:
    """Return (a, b, c); CoefficientError unless they are three finite numbers with a > 0."""
    try:
        values = tuple(float(v) for v in coefficients)
    except (TypeError, ValueError):
        values = ()
    if len(values) != 3 or not all(math.isfinite(v) for v in values):
        raise CoefficientError(f"coefficients must be three finite numbers (a, b, c); found {coefficients!r}.")
    if values[0] <= 0:
        raise CoefficientError(
            f"the activation a t^2 + b t + c needs a > 0; found a = {values[0]:g}. Use for example (0.09, 0.5, 0.47)."
        )
    return values[0], values[1], values[2]


def check_patterns(patterns: Any) -> int | None:
    """Return a number of sampled sign patterns, or None; SettingError unless it is an integer >= 1."""
    if patterns is None:
        return None
    if not isinstance(patterns, (int, np.integer)) or isinstance(patterns, bool) or patterns < 1:
        raise SettingError(
            f"patterns must be an integer >= 1; found {patterns!r}. Use for example patterns=50, or leave it out."
        )
    return int(patterns)


def check_slack(slack: Any) -> float:
    """Return the weight of violated constraints; SettingError unless it is positive (inf: hard constraints)."""
    if not _is_number(slack) or not slack > 0:
        raise SettingError(
            f"slack must be a number > 0, or inf for hard constraints; found {slack!r}. Use for example slack=1."
        )
    return float(slack)


def check_flips(flips: Any) -> str:
    """Return "cover" or "ignore"; SettingError for anything else."""
    if flips not in ("cover", "ignore"):
        raise SettingError(f"flips must be 'cover' or 'ignore'; found {flips!r}. 'cover' is the certified one.")
    return str(flips)


def check_num_classes(num_classes: Any) -> int:
    """Return a number of classes; ClassCountError unless it is an integer >= 2."""
    if not isinstance(num_classes, (int, np.integer)) or isinstance(num_classes, bool) or num_classes < 2:
        raise ClassCountError(f"num_classes must be an integer >= 2; found {num_classes!r}.")
    return int(num_classes)


def check_in_features(in_features: Any) -> int:
    """Return a feature width; FeatureShapeError unless it is an integer >= 1."""
    if not isinstance(in_features, (int, np.integer)) or isinstance(in_features, bool) or in_features < 1:
        raise FeatureShapeError(f"in_features must be an integer >= 1; found {in_features!r}.")
    return int(in_features)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _as_tensor(values: Any, name: str, error: type[Exception]) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        # torch takes neither reversed arrays nor foreign byte orders, and warns of read-only memory: copy these.
        usable = array.flags.writeable or is_mapped(values)
        if not (array.dtype.isnative and usable and min(array.strides, default=0) >= 0):
            array = array.astype(array.dtype.newbyteorder("="), order="C")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError) as fault:
        raise error(f"{name} must be an array of numbers; found {type(values).__name__} ({fault}).") from fault
