"""Every rule on input has its own error, which states the rule, the value found and the next step."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from convex_head import errors, validation
from convex_head.errors import InputError
from convex_head.shards import Whole

GOOD = np.arange(12.0).reshape(4, 3)

BAD_FEATURES = [
    ([["a", "b"]], errors.FeatureTypeError, r"must be an array of numbers; found list"),
    ([[1.0], [1.0, 2.0]], errors.FeatureTypeError, r"must be an array of numbers; found list"),
    (None, errors.FeatureTypeError, r"must be an array of numbers; found NoneType"),
    (GOOD + 1j, errors.FeatureTypeError, r"must be real numbers; found dtype torch.complex128"),
    (GOOD > 1, errors.FeatureTypeError, r"must be real numbers; found dtype torch.bool"),
    (GOOD[0], errors.FeatureShapeError, r"two axes .* found shape \(3,\).*reshape\(n, -1\)"),
    (GOOD[None], errors.FeatureShapeError, r"found shape \(1, 4, 3\)"),
    (3.0, errors.FeatureShapeError, r"found shape \(\)"),
    (GOOD[:, :2], errors.FeatureShapeError, r"in_features = 3 columns; found 2"),
    (GOOD[:0], errors.EmptyDataError, r"at least one example; found shape \(0, 3\)"),
    (np.where(GOOD == 7, np.nan, GOOD), errors.NonFiniteFeaturesError, r"found NaN .* in 1 of 4 rows, first in row 2"),
    (np.where(GOOD > 6, -np.inf, GOOD), errors.NonFiniteFeaturesError, r"in 2 of 4 rows, first in row 2"),
]

BAD_LABELS = [
    ([0.0, 1.0, 2.0, 1.0], errors.LabelTypeError, r"must be integers; found dtype torch.float64.*labels.long\(\)"),
    ([True, False, True, True], errors.LabelTypeError, r"found dtype torch.bool"),
    (["a", "b", "a", "b"], errors.LabelTypeError, r"must be an array of numbers"),
    ([0, 1, 2], errors.LabelShapeError, r"each of the 4 examples; found shape \(3,\)"),
    (np.eye(4, 3, dtype=int), errors.LabelShapeError, r"found shape \(4, 3\).*not one-hot"),
    ([0, 1, 2, 3], errors.LabelRangeError, r"must lie in 0..2; found 0..3.*raise num_classes"),
    ([-1, 1, 2, 1], errors.LabelRangeError, r"found -1..2"),
    ([1, 1, 1, 1], errors.SingleClassError, r"at least two classes; found only label 1"),
]

BAD_NUMBERS = [
    (validation.check_radius, errors.RadiusError, r"radius must be a finite number >= 0; found ", (-0.1,)),
    (validation.check_reg, errors.RegularisationError, r"reg must be a finite number > 0; found ", (0, 0.0, -1.0)),
    (validation.check_num_classes, errors.ClassCountError, r"integer >= 2; found ", (1, 0, -3, 2.0)),
    (validation.check_in_features, errors.FeatureShapeError, r"integer >= 1; found ", (0, -3, 2.0)),
]


@pytest.mark.parametrize(("features", "error", "message"), BAD_FEATURES)
def test_bad_features(features: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        validation.check_features(features, 3)
    assert isinstance(caught.value, InputError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("labels", "error", "message"), BAD_LABELS)
def test_bad_labels(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        validation.check_labels(labels, 4, 3, training=Whole())


def test_one_class_is_allowed_outside_training() -> None:
    assert validation.check_labels([1, 1], 2, 3).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("check", "error", "message", "value"),
    [
        (check, error, message, value)
        for check, error, message, values in BAD_NUMBERS
        for value in (*values, float("nan"), float("inf"), True, "1", None, [1], 1j)
    ],
)
def test_bad_numbers(check: Any, error: type[Exception], message: str, value: Any) -> None:
    with pytest.raises(error, match=message):
        check(value)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ((0.0, 0.5, 0.5), r"needs a > 0; found a = 0"),
        ((-0.1, 0.5, 0.5), r"needs a > 0; found a = -0.1"),
        ((0.1, 0.5), r"three finite numbers \(a, b, c\); found \(0.1, 0.5\)"),
        ((0.1, 0.5, 0.5, 0.5), "three finite numbers"),
        ((0.1, float("nan"), 0.5), "three finite numbers"),
        ((float("inf"), 0.5, 0.5), "three finite numbers"),
        ("abc", "three finite numbers"),
        (0.1, "three finite numbers"),
        (None, "three finite numbers"),
    ],
)
def test_bad_coefficients(coefficients: Any, message: str) -> None:
    with pytest.raises(errors.CoefficientError, match=message):
        validation.check_coefficients(coefficients)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), 1, np.int64(1)])
def test_good_numbers(value: Any) -> None:
    assert validation.check_radius(value) == validation.check_reg(value) == float(value)
    assert validation.check_radius(0) == 0.0
    assert validation.check_num_classes(np.int32(3)) == 3 and validation.check_in_features(1) == 1
    assert validation.check_coefficients([value, -1, np.float32(0)]) == (float(value), -1.0, 0.0)


def frozen(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flags.writeable = False
    return values


@pytest.mark.parametrize(
    "features",
    [
        GOOD.tolist(),
        torch.from_numpy(GOOD).requires_grad_(),
        torch.from_numpy(GOOD).half(),
        GOOD.astype(np.uint8),
        GOOD.astype(np.float32),
        GOOD.astype(">f8"),
        np.asfortranarray(GOOD),
        GOOD[::-1][::-1],
        GOOD[::-1].copy()[::-1],
        np.pad(GOOD, 1)[1:-1, 1:-1],
        frozen(GOOD),
    ],
)
def test_good_features_of_every_kind(features: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = validation.check_features(features, 3)
    assert tensor.is_floating_point() and not tensor.requires_grad
    assert tensor.tolist() == GOOD.tolist()
    assert validation.check_features(GOOD.astype(np.float32)).dtype == torch.float32


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 2, 1],
        (0, 1, 2, 1),
        np.array([1, 2, 1, 0])[::-1],
        np.array([0, 1, 2, 1], dtype=np.uint8),
        torch.tensor([0, 1, 2, 1], dtype=torch.int32),
        np.array([0, 1, 2, 1], dtype=np.uint16),
        frozen(np.array([0, 1, 2, 1])),
    ],
)
def test_good_labels_of_every_kind(labels: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = validation.check_labels(labels, 4, 3, training=Whole())
    assert tensor.dtype == torch.int64 and tensor.tolist() == [0, 1, 2, 1]
