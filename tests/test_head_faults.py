"""ConvexRobustHead refuses bad settings, data and arguments by name, and a fit that raises changes nothing."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from convex_head import ConvexRobustHead, errors
from convex_head.adversary.certify import RobustGeometry
from convex_head.errors import ConvergenceWarning, NotFittedError
from convex_head.problems.base import Network
from convex_head.solvers import Progress, Status


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"in_features": 0}, errors.FeatureShapeError, "in_features must be an integer >= 1; found 0"),
        ({"num_classes": 1}, errors.ClassCountError, "num_classes must be an integer >= 2; found 1"),
        ({"radius": -0.1}, errors.RadiusError, "radius must be a finite number >= 0; found -0.1"),
        ({"reg": 0.0}, errors.RegularisationError, r"reg must be a finite number > 0; found 0\.0"),
        ({"coefficients": (0.0, 1, 1)}, errors.CoefficientError, "needs a > 0; found a = 0"),
        ({"activation": "tanh"}, errors.UnknownActivationError, "activation must be .*polynomial.*; found 'tanh'"),
        ({"loss": "hinge"}, errors.UnknownLossError, "loss must be one of .*; found 'hinge'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ConvexRobustHead(**{"in_features": 3, "num_classes": 3, **settings})


GOOD = 3.0 + np.random.default_rng(0).normal(size=(12, 3))
LABELS = np.arange(12) % 3
NAN = np.where(np.arange(36).reshape(12, 3) == 4, np.nan, GOOD)
BAD_DATA = [
    (NAN, LABELS, errors.NonFiniteFeaturesError, "1 of 12 rows, first in row 1"),
    (GOOD[:, :2], LABELS, errors.FeatureShapeError, "in_features = 3 columns; found 2"),
    (GOOD[0], LABELS, errors.FeatureShapeError, "two axes"),
    (GOOD[:0], LABELS[:0], errors.EmptyDataError, "at least one example"),
    (GOOD.astype(complex), LABELS, errors.FeatureTypeError, "real numbers"),
    (GOOD, LABELS + 1, errors.LabelRangeError, "must lie in 0..2; found 1..3"),
    (GOOD, LABELS[:5], errors.LabelShapeError, "each of the 12 examples"),
    (GOOD, LABELS.astype(float), errors.LabelTypeError, "must be integers"),
]


@pytest.mark.parametrize(("features", "labels", "error", "message"), BAD_DATA)
@pytest.mark.parametrize("method", ["fit", "worst_case_margin", "worst_case_features", "distance_to_boundary"])
def test_bad_data_is_refused_by_every_method(
    method: str, features: Any, labels: Any, error: type[Exception], message: str
) -> None:
    head = fitted_three()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    with pytest.raises(error, match=message):
        getattr(head, method)(features, labels)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


_CACHE: list[ConvexRobustHead] = []


def fitted_three() -> ConvexRobustHead:
    if not _CACHE:
        _CACHE.append(ConvexRobustHead(3, 3, radius=0.3, reg=0.05).fit(GOOD, LABELS))
    return _CACHE[0]


@pytest.mark.parametrize("method", ["worst_case_margin", "worst_case_features"])
def test_bad_query_radius(method: str) -> None:
    with pytest.raises(errors.RadiusError, match="radius must be a finite number >= 0; found nan"):
        getattr(fitted_three(), method)(GOOD, LABELS, radius=math.nan)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"solver": "adam"}, errors.UnknownSolverError, "solver must be auto or one of .*; found 'adam'"),
        ({"tol": 0}, errors.ToleranceError, "tol must be a positive finite number; found 0"),
        ({"max_seconds": -1}, errors.ToleranceError, "max_seconds must be a positive finite number; found -1"),
    ],
)
def test_bad_fit_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ConvexRobustHead(3, 3).fit(GOOD, LABELS, **arguments)


@pytest.mark.parametrize(
    "start",
    [
        Network(torch.eye(4).double(), torch.ones(4).double(), torch.zeros(4, dtype=torch.int64)),
        Network(torch.eye(3).double(), torch.ones(3).double(), torch.tensor([0, 1, 3])),
    ],
    ids=["width", "function"],
)
def test_a_start_of_another_shape_is_refused(start: Network) -> None:
    with pytest.raises(errors.StartError, match=r"start must be a network on 3 features and 3 functions; found"):
        ConvexRobustHead(3, 3).fit(GOOD, LABELS, start=start)


def test_one_class_only_is_refused_for_training_alone() -> None:
    with pytest.raises(errors.SingleClassError, match="at least two classes; found only label 2"):
        ConvexRobustHead(3, 3).fit(GOOD, np.full(12, 2))
    assert fitted_three().worst_case_margin(GOOD, np.full(12, 2)).shape == (12,)


def test_unfitted_heads_say_so() -> None:
    head = ConvexRobustHead(3, 3)
    assert not head.is_fitted and head.result_ is None
    for call in (
        lambda: head(torch.zeros(1, 3)),
        lambda: head.worst_case_margin(GOOD, LABELS),
        lambda: head.worst_case_features(GOOD, LABELS),
        lambda: head.distance_to_boundary(GOOD),
        head.network,
    ):
        with pytest.raises(NotFittedError, match=r"the head has no weights yet; found 0 neurons\. Call fit, load"):
            call()


@pytest.mark.parametrize("fault", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_fit_that_raises_leaves_the_head_as_it_was(fault: BaseException) -> None:
    def callback(line: Progress) -> None:
        raise fault

    fresh = ConvexRobustHead(3, 3)
    if isinstance(fault, RuntimeError):
        with pytest.raises(RuntimeError, match="boom"):
            fresh.fit(GOOD, LABELS, callback=callback)
        assert not fresh.is_fitted and fresh.result_ is None
        head = fitted_three()
        state, result = {k: v.clone() for k, v in head.state_dict().items()}, head.result_
        with pytest.raises(RuntimeError, match="boom"):
            head.fit(2 * GOOD, LABELS, callback=callback)
        assert head.result_ is result
        assert all(torch.equal(v, state[k]) for k, v in head.state_dict().items())
    else:
        with pytest.warns(ConvergenceWarning, match="interrupted"):
            fresh.fit(GOOD, LABELS, tol=1e-9, callback=callback)
        assert fresh.is_fitted and fresh.result_ is not None and fresh.result_.status is Status.INTERRUPTED


def test_result_is_a_frozen_record() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        fitted_three().result_.gap = 0.0  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e200])
def test_features_of_any_size_fit_or_are_refused_by_name(scale: float) -> None:
    """float32 heads hold features up to 1e38; whatever happens, no NaN is deployed."""
    head = ConvexRobustHead(3, 3, radius=0.3, reg=0.05)
    if scale == 1e200:
        with pytest.raises(errors.FeatureRangeError, match="Rescale"):
            head.fit(scale * GOOD, LABELS)
        assert not head.is_fitted
    else:
        # Two heads within 1e-4 of one optimum; at the usual tolerance rounding alone may lead to different ones.
        head.fit(scale * GOOD, LABELS, tol=1e-4)
        usual = ConvexRobustHead(3, 3, radius=0.3, reg=0.05).fit(GOOD, LABELS, tol=1e-4)
        torch.testing.assert_close(
            head(torch.from_numpy(scale * GOOD)), usual(torch.from_numpy(GOOD)), atol=0.02, rtol=0
        )


@pytest.mark.parametrize("elements", [300, 2_000_000])
def test_small_certificate_calls_use_one_thread(monkeypatch, elements):
    """Threads are capped during the call for small work only, and are as before afterwards."""
    head = ConvexRobustHead(10, 2, reg=0.1).fit(torch.randn(30, 10), torch.arange(30) % 2, tol=0.5)
    seen = []
    for name in ("worst_case_margin", "worst_case_point", "distance_to_boundary"):
        monkeypatch.setattr(RobustGeometry, name, lambda self, z, *rest: seen.append(torch.get_num_threads()) or z)
    x, before = torch.zeros(elements // 10, 10), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        head.worst_case_margin(x, torch.zeros(len(x), dtype=torch.int64))
        head.worst_case_features(x, torch.zeros(len(x), dtype=torch.int64))
        head.distance_to_boundary(x)
        assert seen == [1 if elements < 1_000_000 else 2] * 3 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
