"""Margin losses: projections against CVXPY, smoothing bounds, slopes against differences, torch's own losses."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convex_head.errors import UnknownLossError
from convex_head.problems.losses import LOSSES, MarginLoss, get_loss, project_simplex

losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def margins_of(logits: torch.Tensor, labels: torch.Tensor, loss: MarginLoss) -> torch.Tensor:
    """The margins that a loss takes, without perturbation, from logits (n, C)."""
    one_hot = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    if not loss.pairwise:
        return torch.where(one_hot, logits, -logits)
    return logits.gather(1, labels[:, None]) - logits[~one_hot].view(len(labels), -1)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_projection_is_the_nearest_point_of_the_set(k: int) -> None:
    y = np.random.default_rng(k).normal(size=(12, k)) * np.logspace(-1, 1.5, 12)[:, None]
    s = cp.Variable(y.shape)
    cp.Problem(cp.Minimize(cp.sum_squares(s - y)), [s >= 0, cp.sum(s, axis=1) <= 1]).solve(
        solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
    )
    projected = project_simplex(torch.from_numpy(y)).numpy()
    np.testing.assert_allclose(projected, s.value, atol=1e-5)
    assert projected.min() >= 0 and projected.sum(1).max() <= 1 + 1e-12


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([-2.0, 0.0, 0.25, 0.5, 1.0, 3.0]) | st.floats(-1e3, 1e3), min_size=1, max_size=6))
def test_projection_satisfies_the_variational_inequality(y: list[float]) -> None:
    """<y - s, v - s> <= 0 for every vertex v of the set; ties and points on its faces included."""
    row = torch.tensor(y, dtype=torch.float64)
    s = project_simplex(row[None])[0]
    assert bool((s >= 0).all()) and float(s.sum()) <= 1 + 1e-12
    vertices = torch.cat([torch.zeros_like(row)[None], torch.eye(len(row), dtype=torch.float64)])
    assert float(((row - s) * (vertices - s)).sum(1).max()) <= 1e-9 * (1 + float(row.abs().max()))


@losses
@pytest.mark.parametrize("mu", [1e-6, 0.03, 1.0, 20.0])
def test_smoothing_stays_within_its_width(loss: MarginLoss, mu: float) -> None:
    generator = torch.Generator().manual_seed(0)
    margins = 2 * torch.randn(200, 3, generator=generator, dtype=torch.float64)
    smooth, slopes = loss.smoothed(margins, 4, mu)
    hard = loss.value(margins, 4)
    assert bool((smooth <= hard + 1e-12).all()) and bool((hard - mu / 2 <= smooth + 1e-12).all())
    share = loss.share(4)
    assert float(slopes.min()) >= 0 and float(slopes.max()) <= share + 1e-12
    if loss.joint:
        assert float(slopes.sum(1).max()) <= 1 + 1e-12
    # Slopes are a point of the loss's set: they support the hard loss from below, with equality without smoothing.
    support = (slopes * (1 - margins)).sum(1)
    assert bool((support <= hard + 1e-12).all())
    if mu == 1e-6:
        torch.testing.assert_close(support, hard, atol=2e-6, rtol=0)


@losses
@pytest.mark.parametrize("classes", [2, 4])
def test_slopes_are_the_gradient(loss: MarginLoss, classes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    margins = torch.randn(50, 1 if classes == 2 else classes - 1, generator=generator, dtype=torch.float64)
    _, slopes = loss.smoothed(margins, classes, 0.3)
    for k in range(margins.shape[1]):
        step = torch.zeros_like(margins)
        step[:, k] = 1e-6
        up, down = (loss.smoothed(margins + t * step, classes, 0.3)[0] for t in (1, -1))
        torch.testing.assert_close(-(up - down) / 2e-6, slopes[:, k], atol=1e-6, rtol=0)
    assert 0 < int((slopes == 0).sum()) < slopes.numel()


@pytest.mark.parametrize("classes", [3, 10])
def test_values_are_those_of_the_textbook(classes: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(64, classes, generator=generator, dtype=torch.float64)
    labels = torch.arange(64) % classes
    values = {name: loss.value(margins_of(logits, labels, loss), classes) for name, loss in LOSSES.items()}
    expected = torch.nn.MultiMarginLoss(reduction="none")(logits, labels)
    torch.testing.assert_close(values["multi_margin"], expected)
    signs = 2.0 * torch.nn.functional.one_hot(labels, classes) - 1
    torch.testing.assert_close(values["one_vs_rest"], (1 - signs * logits).clamp_min(0).mean(1))
    best = logits.masked_fill(signs > 0, -torch.inf).amax(1)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(values["crammer_singer"], (1 - own + best).clamp_min(0))


@losses
def test_two_classes_mean_the_hinge(loss: MarginLoss) -> None:
    margins = torch.linspace(-2, 3, 11, dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss.value(margins, 2), (1 - margins[:, 0]).clamp_min(0))
    smooth, slopes = loss.smoothed(margins, 2, 0.5)
    z = 1 - margins[:, 0]
    expected = torch.where(z > 0.5, z - 0.25, z.clamp_min(0).square())
    torch.testing.assert_close(smooth, expected)
    torch.testing.assert_close(slopes[:, 0], (z / 0.5).clamp(0, 1))


@pytest.mark.parametrize("base", [0.0, 0.9999, 1.0, -5.0])
@pytest.mark.parametrize("mu", [0.1, 1e-2, 1e-3, 1e-4])
def test_slopes_of_single_precision_are_in_the_set(mu: float, base: float) -> None:
    """A bound takes them for a point of the simplex, so they may not sum up to more than 1 where many margins tie."""
    loss = LOSSES["crammer_singer"]
    for spread in (0.0, 0.1 * mu, mu, 10 * mu):
        generator = torch.Generator().manual_seed(0)
        margins = (base + spread * torch.rand(20, 999, generator=generator)).float()
        value, slopes = loss.smoothed(margins, 1000, mu)
        expected, exact = loss.smoothed(margins.double(), 1000, mu)
        assert slopes.double().sum(1).amax() <= 1 + 1e-6
        torch.testing.assert_close(slopes.double().sum(1), exact.sum(1), rtol=0, atol=2e-3)
        torch.testing.assert_close(value.double(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("width", [0.0, 0.2, 10.0])
def test_near_margins_have_the_whole_loss(loss: MarginLoss, width: float) -> None:
    margins = 0.5 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = loss.near(margins, width)
    assert near.shape[1] < 30 or not loss.joint or width > 1
    torch.testing.assert_close(loss.value(near, 31), loss.value(margins, 31))
    for mu in (width, 0.5 * width):
        if mu > 0:
            torch.testing.assert_close(loss.smoothed(near, 31, mu)[0], loss.smoothed(margins, 31, mu)[0])


def test_near_margins_hide_no_fault() -> None:
    loss, margins = LOSSES["crammer_singer"], torch.tensor([[torch.nan, 0.5, 3, 3, 3], [0.1, 2, 2, 2, 2]])
    torch.testing.assert_close(loss.value(loss.near(margins, 0.0), 6), loss.value(margins, 6), equal_nan=True)


def test_unknown_loss_is_named() -> None:
    with pytest.raises(UnknownLossError, match=r"one of crammer_singer, multi_margin, one_vs_rest; found 'hinge'"):
        get_loss("hinge")
