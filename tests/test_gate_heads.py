"""Heads with ReLU and gated ReLU activation: fit, deploy, files, attacks, bad settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from torch import Tensor, nn

from convex_head import ConvexRobustHead, ThreatModel, errors, evaluate, replace_head
from convex_head.activations import ACTIVATIONS
from convex_head.attacks.adaptive import adaptive_attacks
from convex_head.attacks.certified_margins import CertifiedMargins
from convex_head.solvers import Status

CASES: list[tuple[str, dict[str, Any]]] = [
    ("relu", {"slack": 0.5}),
    ("gated_relu", {"flips": "cover"}),
    ("gated_relu", {"flips": "ignore", "ball": "linf"}),
]
_FITTED: dict[str, ConvexRobustHead] = {}


def iris(n: int) -> tuple[Tensor, Tensor]:
    features, labels = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(150)[:n]
    features = (features - features.mean(0)) / features.std(0)
    return torch.tensor(features[order]), torch.tensor(labels[order])


def fitted(activation: str, changes: dict[str, Any], classes: int = 3) -> ConvexRobustHead:
    key = f"{activation}{changes}{classes}"
    if key not in _FITTED:
        head = ConvexRobustHead(4, classes, activation=activation, patterns=5, radius=0.2, reg=0.02, **changes)
        x, y = data(classes)
        _FITTED[key] = head.fit(x, y, tol=5e-2)
    return _FITTED[key]


def data(classes: int = 3) -> tuple[Tensor, Tensor]:
    x, y = iris(60)
    return 3 * x + 1, y if classes == 3 else (y > 0).long()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("activation", "changes"), CASES)
def test_fit_deploy_and_save(activation: str, changes: dict[str, Any], classes: int, tmp_path: Path) -> None:
    head = fitted(activation, changes, classes)
    x, y = data(classes)
    result = head.result_
    assert result is not None and result.status is Status.CONVERGED and result.gap <= 5e-2
    problem = head.problem(x, y)
    assert result.primal == pytest.approx(problem.objective(head.network()), rel=1e-6)
    assert float((head(x).argmax(1) == y).double().mean()) > 0.85
    assert head.certificate == "lower bound" and 0 <= result.extra["certified_share"] <= 1
    # What is deployed is what was measured: f of the network on the training data.
    logits = head(x.double())
    values = logits[:, 1:] - logits[:, :1] if classes == 2 else logits
    model = problem.network_values if activation == "relu" else problem.values
    torch.testing.assert_close(values.double(), model(head.network()), atol=1e-4, rtol=1e-4)
    bound, worst = head.worst_case_margin(x, y), head.worst_case_features(x, y)
    assert bool((bound <= head.worst_case_margin(worst, y, 0.0) + 1e-6).all())
    distance = head.distance_to_boundary(x, y)
    assert bool(((distance > head.radius) == (bound > 0))[(distance - head.radius).abs() > 1e-6].all())
    again = ConvexRobustHead.load(head.save(tmp_path / "head.safetensors"))
    fresh = ConvexRobustHead(4, classes, activation=activation, patterns=5, radius=0.2, reg=0.02, **changes)
    fresh.load_state_dict(head.state_dict(), strict=True)
    for other in (again, fresh):
        assert torch.equal(other(x), head(x)) and torch.equal(other.worst_case_margin(x, y), bound)
    assert repr(again) == repr(head) and again.problem(x, y).objective(again.network()) == pytest.approx(result.primal)
    for name, value in changes.items():
        assert getattr(again, name) == value


def test_relu_reports_violations_and_hard_ones_have_none() -> None:
    x, y = iris(16)
    settings: dict[str, Any] = {"activation": "relu", "patterns": 8, "radius": 0.1, "reg": 0.02}
    hard = ConvexRobustHead(4, 3, slack=math.inf, **settings).double().fit(x, y, tol=1e-2)
    soft = ConvexRobustHead(4, 3, slack=0.05, **settings).double().fit(x, y, tol=1e-2, solver="socp")
    assert hard.result_ is not None and soft.result_ is not None and hard.result_.solver == "socp"
    found, loose = hard.result_.extra, soft.result_.extra
    assert found["violation_max"] <= 1e-5 and found["model_minus_network"] <= 1e-4 and found["constraints_hold"] == 1
    scalable = ConvexRobustHead(4, 3, slack=math.inf, **settings).double().fit(x, y, tol=5e-2, solver="group_descent")
    assert scalable.result_ is not None and scalable.result_.converged
    assert scalable.result_.extra["violation_max"] <= 1e-5 and scalable.result_.extra["model_minus_network"] <= 1e-4
    assert loose["violation_max"] > 1e-3 and loose["violation_mean"] > 0
    # Without violations no neuron changes its sign in a training ball: the bound is the margin that was trained on.
    margin = hard.problem(x, y).margins(hard.network()).amin(1)
    torch.testing.assert_close(hard.worst_case_margin(x, y), margin, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", [0, 2, 3, 5])
def test_hard_constraints_at_scale_end_feasible(seed: int) -> None:
    """The penalty alone leaves a point next to the cones with these gates, and stalls; more seeds, the same."""
    x, y = iris(48)
    settings: dict[str, Any] = {"activation": "relu", "patterns": 8, "radius": 0.1, "reg": 0.02, "slack": math.inf}
    head = ConvexRobustHead(4, 3, **settings).double()
    head.fit(x, y, tol=5e-2, solver="group_descent", seed=seed)
    assert head.result_ is not None and head.result_.converged and head.result_.extra["violation_max"] <= 1e-5


def test_warm_start_keeps_the_gates() -> None:
    head = fitted("gated_relu", {"flips": "cover"})
    x, y = data()
    warm = ConvexRobustHead(4, 3, activation="gated_relu", patterns=9, radius=0.25, reg=0.02)
    warm.fit(x, y, tol=5e-2, start=head.network(), seed=7)
    assert torch.equal(warm.gates, head.gates)
    with pytest.raises(errors.StartError, match="start must be a network of shape"):
        ConvexRobustHead(4, 2, activation="gated_relu").fit(x, (y > 0).long(), start=head.network())


def test_soft_forward_tends_to_the_head() -> None:
    for activation, changes in CASES:
        head = fitted(activation, changes)
        x = data()[0]
        far = (head.soft_forward(x, 1.0) - head(x)).abs().max()
        assert float((head.soft_forward(x, 1e-9) - head(x)).abs().max()) < 1e-4 < float(far)
    with pytest.raises(errors.SettingError, match="soft_forward needs an activation with gates; found 'polynomial'"):
        x, y = data()
        ConvexRobustHead(4, 3, reg=0.1, radius=0.1).fit(x, y, tol=0.3).soft_forward(x, 1.0)


def test_evaluation_adds_soft_gates_and_square_by_itself() -> None:
    head = fitted("gated_relu", {"flips": "cover"})
    x, y = data()
    low, high = x.min(), x.max()
    model = replace_head(nn.Sequential(Scaled(float(low), float(high)), nn.Linear(4, 3)), head, at="1")
    images = ((x - low) / (high - low)).float().reshape(-1, 1, 2, 2)
    threat = ThreatModel("Linf", 0.02)
    assert [a.name for a in adaptive_attacks(model, threat, ())] == ["soft-gate", "square"]
    record = evaluate(model, (images[:4], y[:4]), threat, ["apgd-ce"], progress=False)
    assert {"apgd-ce", "soft-gate", "square"} <= {name.partition("(")[0] for name in record.attacks}
    with pytest.raises(
        errors.AttackError, match=r"feature-exact needs a head whose worst case is exact; found .*lower"
    ):
        evaluate(model, (images[:4], y[:4]), threat, ["feature-exact"], progress=False)
    with pytest.raises(errors.AttackError, match="CertifiedMargins needs a head whose worst case is exact"):
        CertifiedMargins(model)


class Scaled(nn.Module):
    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.net = nn.Flatten()

    def forward(self, images: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * self.net(images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu", "patterns": 0}, "patterns must be an integer >= 1; found 0"),
        ({"activation": "relu", "patterns": 2.5}, "patterns must be an integer >= 1; found 2.5"),
        ({"activation": "relu", "slack": 0}, "slack must be a number > 0, or inf .*; found 0"),
        ({"activation": "relu", "slack": math.nan}, "slack must be a number > 0, or inf .*; found nan"),
        ({"activation": "gated_relu", "flips": "maybe"}, "flips must be 'cover' or 'ignore'; found 'maybe'"),
        ({"activation": "relu", "ball": "l1"}, "ball must be 'l2' or 'linf'; found 'l1'"),
        ({"ball": "linf"}, "'polynomial' has the settings coefficients.*; found ball='linf'"),
        ({"patterns": 3}, "found patterns=3"),
        ({"activation": "gated_relu", "slack": 1.0}, "found slack=1.0"),
        ({"activation": "relu", "coefficients": (1, 1, 1)}, r"found coefficients=\(1, 1, 1\)"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.SettingError, match=message):
        ConvexRobustHead(4, 3, **changes)


def test_infeasible_hard_constraints_are_named_and_leave_the_head_alone() -> None:
    x, y = iris(150)
    head = ConvexRobustHead(4, 3, activation="relu", slack=math.inf, patterns=3, radius=1.0)
    with pytest.raises(errors.InfeasibleError, match=r"v = 0 as the only solution .* Use slack=1"):
        head.fit(x, y)
    assert not head.is_fitted and head.result_ is None
    with pytest.raises(errors.UnknownSolverError, match="auto or one of socp, group_descent; found 'sdp'"):
        head.fit(x, y, solver="sdp")


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"polynomial"}))
def test_unfitted_and_compiled(activation: str) -> None:
    with pytest.raises(errors.NotFittedError):
        ConvexRobustHead(4, 3, activation=activation)(torch.zeros(1, 4))
    head = fitted(activation, dict(CASES)[activation] if activation == "relu" else {"flips": "cover"})
    x = data()[0].float()
    torch.testing.assert_close(torch.export.export(head, (x,)).module()(x), head(x))
