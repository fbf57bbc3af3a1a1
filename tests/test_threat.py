"""ThreatModel against torch.linalg, CVXPY projections and its own text."""

from __future__ import annotations

import json
from fractions import Fraction

import cvxpy as cp
import numpy as np
import pytest
import torch

from convex_head.errors import ThreatModelError
from convex_head.threat import ThreatModel

ORDERS = {"Linf": float("inf"), "L2": 2.0, "L1": 1.0}


@pytest.mark.parametrize(
    ("norm", "spellings"),
    [
        ("Linf", ["Linf", "linf", "LINF", "inf", "l_inf", "L-inf", "Infinity"]),
        ("L2", ["L2", "l2", "l_2", "2"]),
        ("L1", ["L1", "l1", "1"]),
    ],
)
def test_norm_spellings(norm, spellings):
    assert [ThreatModel(spelling, 0.5).norm for spelling in spellings] == [norm] * len(spellings)


@pytest.mark.parametrize(
    ("eps", "value", "text"),
    [
        ("8/255", 8 / 255, "8/255"),
        (" 8 / 255 ", 8 / 255, "8 / 255"),
        (8 / 255, 8 / 255, "8/255"),
        (Fraction(8, 255), 8 / 255, "8/255"),
        (0.031, 0.031, "0.031"),
        ("0.50", 0.5, "0.50"),
        (0.2, 0.2, "0.2"),  # also 51/255 exactly
        (1, 1.0, "1"),
        (0, 0.0, "0"),
        (np.float64(0.5), 0.5, "0.5"),
        ("1e-3", 1e-3, "1e-3"),
        (1 / 3, 1 / 3, "85/255"),
        (0.123456789, 0.123456789, "0.123456789"),
    ],
)
def test_eps_value_and_text(eps, value, text):
    threat = ThreatModel("Linf", eps)
    assert threat.eps == value
    assert type(threat.eps) is float
    assert threat.eps_text == text
    assert float(Fraction(text.replace(" ", ""))) == pytest.approx(value, rel=1e-15)


def test_equality_is_by_value_and_0031_is_not_8_255():
    assert ThreatModel("linf", "8/255") == ThreatModel("Linf", 8 / 255)
    assert ThreatModel("Linf", "0.50") == ThreatModel("Linf", 0.5)
    assert hash(ThreatModel("Linf", "0.50")) == hash(ThreatModel("Linf", 0.5))
    assert ThreatModel("Linf", 0.031) != ThreatModel("Linf", "8/255")
    assert ThreatModel("Linf", 0.5) != ThreatModel("L2", 0.5)


BAD_EPS = ["", "x", "8/0", "1/2/3", "nan", "inf", "-1/255", -0.1, float("nan"), float("inf"), True, None, [1]]


@pytest.mark.parametrize("eps", BAD_EPS)
def test_bad_eps(eps):
    with pytest.raises(ThreatModelError, match=r"eps .*8/255"):
        ThreatModel("Linf", eps)


@pytest.mark.parametrize("norm", ["L3", "", "l", "0", None, "infty2"])
def test_bad_norm(norm):
    with pytest.raises(ThreatModelError, match="Linf, L2, L1"):
        ThreatModel(norm, 0.5)


def test_parse_and_str_are_inverse():
    threat = ThreatModel.parse("l_inf:8/255")
    assert (threat.norm, threat.eps_text, str(threat)) == ("Linf", "8/255", "Linf:8/255")
    assert ThreatModel.parse(str(threat)) == threat
    with pytest.raises(ThreatModelError, match="norm:eps"):
        ThreatModel.parse("Linf 8/255")


def test_dict_round_trip_through_json_keeps_the_text():
    threat = ThreatModel("L2", "0.50")
    back = ThreatModel.from_dict(json.loads(json.dumps(threat.to_dict())))
    assert back == threat
    assert back.eps_text == "0.50"


def test_contradicting_or_incomplete_record():
    with pytest.raises(ThreatModelError, match=r"'8/255' is 0\.0313.*eps is 0\.031"):
        ThreatModel.from_dict({"norm": "Linf", "eps": 0.031, "eps_text": "8/255"})
    with pytest.raises(ThreatModelError, match="missing \\['eps_text'\\]"):
        ThreatModel.from_dict({"norm": "Linf", "eps": 0.031})


@pytest.mark.parametrize("norm", ORDERS)
def test_distance_is_the_vector_norm(norm):
    x, x_adv = torch.rand(5, 3, 4, 2, generator=torch.Generator().manual_seed(0)), torch.rand(5, 3, 4, 2)
    expected = torch.linalg.vector_norm((x_adv - x).flatten(1), ord=ORDERS[norm], dim=1)
    torch.testing.assert_close(ThreatModel(norm, 0.1).distance(x, x_adv), expected)


def test_distance_of_different_shapes():
    with pytest.raises(ThreatModelError, match=r"\(2, 3\) and \(2, 4\)"):
        ThreatModel("L2", 1).distance(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("norm", ORDERS)
def test_projection_onto_the_ball_is_the_nearest_point(norm):
    """Far from the borders of [0, 1] the projection is the ball's; CVXPY solves it independently."""
    generator = torch.Generator().manual_seed(1)
    x = torch.full((4, 6), 0.5, dtype=torch.float64)
    x_adv = x + 0.4 * (torch.rand(4, 6, generator=generator, dtype=torch.float64) - 0.5)
    threat = ThreatModel(norm, 0.15)
    projected = threat.project(x, x_adv)
    for row in range(4):
        z = cp.Variable(6)
        ball = cp.norm(z - x[row].numpy(), "inf" if norm == "Linf" else int(norm[1])) <= threat.eps
        cp.Problem(cp.Minimize(cp.sum_squares(z - x_adv[row].numpy())), [ball]).solve(solver=cp.CLARABEL)
        np.testing.assert_allclose(projected[row].numpy(), z.value, atol=1e-5)


@pytest.mark.parametrize("norm", ORDERS)
def test_projection_stays_in_the_ball_and_in_the_unit_box(norm):
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(20, 1, 3, 3, generator=generator)
    x_adv = x + 2 * torch.randn(20, 1, 3, 3, generator=generator)
    threat = ThreatModel(norm, 0.3)
    projected = threat.project(x, x_adv)
    assert projected.shape == x.shape
    assert projected.min() >= 0 and projected.max() <= 1
    assert (threat.distance(x, projected) <= 0.3 + 1e-6).all()
    torch.testing.assert_close(threat.project(x, projected), projected)  # a feasible point does not move


@pytest.mark.parametrize("norm", ORDERS)
def test_projection_at_eps_zero_gives_the_clean_image(norm):
    x = torch.rand(3, 4)
    torch.testing.assert_close(ThreatModel(norm, 0).project(x, x + 1.0), x)
    torch.testing.assert_close(ThreatModel(norm, 0).project(x, x), x)
