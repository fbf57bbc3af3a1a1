"""ConvexRobustHead: what fit stores, exact margins and distances by brute force."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from convex_head import ConvexRobustHead, activations
from convex_head.errors import ConvergenceWarning
from convex_head.solvers import Progress, Status
from convex_head.solvers.column_generation import ColumnGeneration


def data(n: int, d: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clusters in raw units: every feature has its own offset and scale."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(n) % classes
    clusters = 1.5 * rng.normal(size=(classes, d))[labels] + rng.normal(size=(n, d))
    return 3.0 + clusters * np.logspace(-1, 1, d), labels


def fitted(classes: int, d: int = 4, n: int = 60, **kwargs: Any) -> ConvexRobustHead:
    settings = {"radius": 0.3, "reg": 0.01} | kwargs
    dtype = settings.pop("dtype", torch.float64)
    return ConvexRobustHead(d, classes, **settings).to(dtype).fit(*data(n, d, classes), tol=0.02)


@pytest.fixture(scope="module", params=[2, 3, 5])
def head(request: pytest.FixtureRequest) -> ConvexRobustHead:
    return fitted(request.param)


def margins(head: ConvexRobustHead, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logit[label] minus the best other logit, from the head's forward pass."""
    logits = head(x).double()
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - logits.scatter(1, labels[:, None], -math.inf).amax(1)


def sampled_ball(head: ConvexRobustHead, x: torch.Tensor, radius: float, count: int, seed: int = 0) -> torch.Tensor:
    """(count, d) raw feature vectors in the standardised ball around one vector, half of them on its sphere."""
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(count, x.shape[-1], generator=generator, dtype=torch.float64)
    e *= radius / e.norm(dim=1, keepdim=True)
    e[::2] *= torch.rand(len(e[::2]), 1, generator=generator, dtype=torch.float64)
    return x + e * head.scale.double()


def batch(head: ConvexRobustHead, n: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    features, labels = data(n, head.in_features, head.num_classes, seed=1)
    return torch.from_numpy(features), torch.from_numpy(labels)


# -- exactness ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [None, 0.0, 0.8])
def test_worst_case_is_attained_in_the_ball_and_never_beaten(head: ConvexRobustHead, radius: float | None) -> None:
    x, labels = batch(head)
    r = head.radius if radius is None else radius
    worst = head.worst_case_margin(x, labels, radius)
    points = head.worst_case_features(x, labels, radius)
    assert worst.dtype == torch.float64 and points.dtype == x.dtype and points.shape == x.shape
    torch.testing.assert_close(margins(head, points, labels), worst)
    assert float(((points - x) / head.scale).norm(dim=1).max()) <= r * (1 + 1e-9) + 1e-12
    for i in range(len(x)):
        ball = sampled_ball(head, x[i], r, 500)
        assert float(margins(head, ball, labels[i].expand(500)).min()) >= float(worst[i]) - 1e-9


def test_distance_agrees_with_the_worst_case_margin_on_both_sides(head: ConvexRobustHead) -> None:
    x, _ = batch(head)
    distance = head.distance_to_boundary(x)
    labels = head(x).argmax(1)
    torch.testing.assert_close(head.distance_to_boundary(x, labels), distance)
    assert bool((distance > 0).all()) and bool(distance.isfinite().any())
    for i in distance.isfinite().nonzero().squeeze(1).tolist():
        one = (x[i : i + 1], labels[i : i + 1])
        assert head.worst_case_margin(*one, radius=float(distance[i]) * (1 - 1e-6)).item() > 0
        assert head.worst_case_margin(*one, radius=float(distance[i]) * (1 + 1e-6)).item() <= 0
    other = (labels + 1) % head.num_classes
    assert head.distance_to_boundary(x, other).tolist() == [0.0] * len(x)


def test_distance_by_a_polar_grid() -> None:
    head = fitted(3, d=2)
    x, _ = batch(head, 5)
    labels = head(x).argmax(1)
    angle = torch.linspace(0, 2 * math.pi, 361, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], dim=1) * head.scale
    radii = torch.linspace(0, 6, 601, dtype=torch.float64)
    for i, distance in enumerate(head.distance_to_boundary(x, labels).tolist()):
        grid = (x[i] + radii[:, None, None] * circle).view(-1, 2)
        lost = (margins(head, grid, labels[i].expand(len(grid))) <= 0).view(len(radii), -1).any(1)
        nearest = float(radii[lost][0]) if bool(lost.any()) else math.inf
        assert distance == pytest.approx(nearest, abs=0.02) or distance > 6


def test_margins_shrink_with_the_radius(head: ConvexRobustHead) -> None:
    x, labels = batch(head)
    values = torch.stack([head.worst_case_margin(x, labels, r) for r in (0.0, 0.1, 0.5, 2.0)])
    assert bool((values.diff(dim=0) < 0).all())
    torch.testing.assert_close(values[0], margins(head, x, labels))


def test_order_and_batching_do_not_matter(head: ConvexRobustHead) -> None:
    x, labels = batch(head)
    worst, points = head.worst_case_margin(x, labels), head.worst_case_features(x, labels)
    distance = head.distance_to_boundary(x, labels)
    for i in range(0, len(x), 7):
        one = (x[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(head.worst_case_margin(*one), worst[i : i + 1])
        torch.testing.assert_close(head.worst_case_features(*one), points[i : i + 1])
        torch.testing.assert_close(head.distance_to_boundary(*one), distance[i : i + 1])


def test_unreachable_classes_are_infinitely_far() -> None:
    head = ConvexRobustHead(2, 2, standardize=False, coefficients=(1.0, 0.0, 1.0)).double()
    head.load_state_dict(
        {
            "directions": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
            "readout": torch.tensor([[1.0, 1.0]]),
            "mean": torch.zeros(2),
            "scale": torch.ones(2),
        }
    )  # f = |x|^2 + 2
    x = torch.tensor([[0.5, -1.0], [3.0, 0.0]], dtype=torch.float64)
    assert head(x).argmax(1).tolist() == [1, 1]
    assert head.distance_to_boundary(x).tolist() == [math.inf, math.inf]
    assert head.worst_case_margin(x, [1, 1], 1.0).tolist() == pytest.approx([2 + (1.25**0.5 - 1) ** 2, 6.0])
    assert head.worst_case_margin(x, [1, 1], 2.0).tolist() == pytest.approx([2.0, 3.0])


# -- fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("classes", "loss"), [(2, "crammer_singer"), (3, "multi_margin"), (3, "one_vs_rest")])
def test_certificate_is_measured_on_the_deployed_weights(classes: int, loss: str, dtype: torch.dtype) -> None:
    features, labels = data(60, 4, classes)
    head = ConvexRobustHead(4, classes, radius=0.3, reg=0.01, loss=loss).to(dtype)
    assert head.fit(features, labels, tol=0.02) is head
    result = head.result_
    assert result is not None and result.status is Status.CONVERGED and result.gap <= 0.02
    assert head.directions.dtype == head.readout.dtype == head.mean.dtype == head.scale.dtype == dtype
    problem = head.problem(features, labels)
    assert result.primal == pytest.approx(problem.objective(head.network()), rel=1e-12)
    assert result.gap == pytest.approx((result.primal - result.dual) / result.primal, rel=1e-9)
    assert result.neurons == head.directions.shape[0] == head.network().size
    # By hand: robust loss of the exact margins of the logits, plus the regularisation.
    if classes == 2:
        worst = head.worst_case_margin(features, labels)
        expected = (1 - worst).clamp_min(0).mean() + 0.01 * head.readout.double().abs().sum()
        assert result.primal == pytest.approx(float(expected), rel=1e-9)
    assert float((head(torch.from_numpy(features)).argmax(1) == torch.from_numpy(labels)).double().mean()) > 0.6


@pytest.mark.parametrize(
    ("given", "tol", "passes"),
    [
        (torch.float32, 0.05, torch.float32),
        (torch.float32, 9e-4, torch.float64),
        (torch.float64, 0.05, torch.float64),
    ],
)
def test_large_data_in_single_precision_are_passed_in_it(
    given: torch.dtype, tol: float, passes: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the gap to reach is far above what that moves: objective and bound are those of double precision."""
    monkeypatch.setattr(activations.polynomial, "_OWN_FLOAT32_ABOVE", 800)
    features, labels = (torch.from_numpy(part) for part in data(90, 9, 3))
    used, solve = [], ColumnGeneration.solve
    monkeypatch.setattr(
        ColumnGeneration, "solve", lambda self, convex, **rest: (used.append(convex), solve(self, convex, **rest))[1]
    )
    head = ConvexRobustHead(9, 3, radius=0.3, reg=0.02).fit(features.to(given), labels, tol=tol)
    assert [convex.dtype for convex in used] == [passes]
    exact = head.problem(features.to(given), labels)
    assert exact.dtype == torch.float64 and head.result_ is not None
    assert head.result_.primal == pytest.approx(exact.objective(head.network()), rel=1e-6)
    best = ColumnGeneration().solve(exact, tol=1e-5)
    assert head.result_.dual <= best.primal * (1 + 1e-6) and head.result_.gap <= tol


def test_converged_is_said_only_with_the_gap(recwarn: pytest.WarningsRecorder) -> None:
    features, labels = data(40, 3, 2)
    for tol in (0.3, 1e-2, 1e-3):
        head = ConvexRobustHead(3, 2, radius=0.3, reg=0.02).fit(features, labels, tol=tol)
        assert head.result_ is not None and head.result_.converged and head.result_.gap <= tol
    assert not [w for w in recwarn if issubclass(w.category, ConvergenceWarning)]
    with pytest.warns(ConvergenceWarning, match=r"max_time.*as deployed \(torch.float32\); tol = 1e-09") as caught:
        head.fit(features, labels, tol=1e-9, max_seconds=0.2)
    assert caught[0].filename == __file__ and len(caught) == 1
    assert head.result_.status is Status.MAX_TIME and head.result_.gap > 1e-9


@pytest.mark.parametrize("kind", ["numpy", "float32", "tensor", "lists"])
def test_arrays_and_tensors_give_the_same_head(kind: str) -> None:
    features, labels = data(30, 3, 3)
    features = features.astype(np.float32).astype(np.float64)
    converted = {
        "numpy": (features, labels),
        "float32": (features.astype(np.float32), labels.astype(np.uint8)),
        "tensor": (torch.from_numpy(features).requires_grad_(), torch.from_numpy(labels).int()),
        "lists": (features.tolist(), labels.tolist()),
    }[kind]
    heads = [ConvexRobustHead(3, 3, radius=0.3, reg=0.02).double().fit(*xy) for xy in ((features, labels), converted)]
    assert torch.equal(heads[0].directions, heads[1].directions)
    margin = heads[0].worst_case_margin(features, labels)
    torch.testing.assert_close(heads[1].worst_case_margin(*converted), margin)


@pytest.mark.parametrize("standardize", [True, False])
def test_standardisation_and_its_units(standardize: bool) -> None:
    features, labels = data(40, 3, 2)
    features = np.hstack([features, np.full((40, 1), 0.1)])
    head = ConvexRobustHead(4, 2, radius=0.2, reg=0.02, standardize=standardize).double().fit(features, labels)
    if standardize:
        np.testing.assert_allclose(head.mean, features.mean(0))
        np.testing.assert_allclose(head.scale, [*features[:, :3].std(0), 1.0])
    else:
        assert head.mean.tolist() == [0.0] * 4 and head.scale.tolist() == [1.0] * 4
    z = head.standardised(torch.from_numpy(features))
    a, b, c = head.coefficients
    t = z @ head.directions.T
    f = (a * t**2 + b * t + c) @ head.readout[0]
    torch.testing.assert_close(head(torch.from_numpy(features)), torch.stack([-f / 2, f / 2], dim=1))
    points = head.worst_case_features(features, labels)
    assert float((head.standardised(points) - z).norm(dim=1).max()) == pytest.approx(0.2, rel=1e-9)


def test_standardised_heads_do_not_see_the_units() -> None:
    features, labels = data(40, 3, 3)
    heads = [ConvexRobustHead(3, 3, radius=0.3, reg=0.02).double().fit(x, labels) for x in (features, 64 * features)]
    torch.testing.assert_close(heads[0](torch.from_numpy(features)), heads[1](torch.from_numpy(64 * features)))
    margins = [h.worst_case_margin(x, labels) for h, x in zip(heads, (features, 64 * features), strict=True)]
    torch.testing.assert_close(*margins)


def test_missing_classes_and_seeds_and_warm_starts() -> None:
    features, labels = data(40, 3, 2)
    head = ConvexRobustHead(3, 4, radius=0.3, reg=0.02).fit(features, 3 * labels, seed=5)
    again = ConvexRobustHead(3, 4, radius=0.3, reg=0.02).fit(features, 3 * labels, seed=5)
    assert torch.equal(head.directions, again.directions)
    assert set(head(torch.from_numpy(features)).argmax(1).tolist()) <= {0, 3}
    warm = ConvexRobustHead(3, 4, radius=0.3, reg=0.02).fit(features, 3 * labels, start=head.network())
    assert warm.result_ is not None and head.result_ is not None
    assert warm.result_.primal == pytest.approx(head.result_.primal, rel=0.02)
    assert warm.result_.extra["evaluations"] < head.result_.extra["evaluations"]


def test_callback_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[Progress] = []
    head = ConvexRobustHead(3, 2, radius=0.3, reg=0.02).fit(*data(40, 3, 2), progress=True, callback=lines.append)
    assert head.result_ is not None and tuple(lines) == head.result_.history
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 and f"objective {lines[-1].primal:.4g}" in shown[0]
    head.fit(*data(40, 3, 2), progress=False)
    assert capsys.readouterr() == ("", "")
