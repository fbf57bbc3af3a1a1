"""Distances to a quadratic's zero set: a 40-digit reference, rays, the S-lemma in CVXPY, and the ball's minimum."""

import cvxpy as cp
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convex_head.adversary.boundary import distance_to_zero, lower_bound
from convex_head.adversary.trust_region import minimise_over_ball

# (eigenvalues, gradient, value at the centre)
CASES = {
    "linear": ([0.0, 0.0], [3.0, -4.0], 10.0),
    "indefinite": ([-2.0, 0.5, 3.0], [0.4, -1.0, 2.0], 1.5),
    "negative definite": ([-3.0, -2.0, -1.0], [0.1, 0.2, -5.0], 2.0),
    "convex, reachable": ([1.0, 2.0, 5.0], [3.0, -2.0, 1.0], 2.0),
    "convex, just reachable": ([1.0, 2.0], [1.0, 0.0], 0.5 - 1e-9),
    "convex, tangent": ([1.0, 2.0], [1.0, 0.0], 0.5),
    "convex, unreachable": ([1.0, 2.0], [1.0, 0.0], 0.6),
    "singular, reachable through the null space": ([0.0, 2.0], [0.1, 1.0], 0.6),
    "singular, unreachable": ([0.0, 2.0], [0.0, 1.0], 0.6),
    "hard": ([-2.0, 0.5, 3.0], [0.0, 0.3, -0.4], 1.0),
    "hard, zero gradient": ([-2.0, 0.5], [0.0, 0.0], 4.0),
    "nearly hard": ([-2.0, 0.5, 3.0], [1e-10, 0.3, -0.4], 1.0),
    "orthogonal to the lowest, yet not hard": ([-0.1, 0.5, 3.0], [0.0, 9.0, -4.0], 1.0),
    "lowest repeated": ([-1.0, -1.0, 2.0], [0.3, -0.4, 1.0], 2.0),
    "hard, lowest repeated": ([-1.0, -1.0, 2.0], [0.0, 0.0, 1.0], 2.0),
    "on the boundary": ([-1.0, 1.0], [1.0, 1.0], 0.0),
    "beyond the boundary": ([-1.0, 1.0], [1.0, 1.0], -0.3),
    "constant": ([0.0, 0.0], [0.0, 0.0], 1.0),
    "far": ([-1e-6, 0.0], [1e-6, 1e-6], 1.0),
    "near": ([-1.0, 1.0], [1.0, 1.0], 1e-9),
    "large numbers": ([-1e8, 3e7], [1e9, -4e9], 1e10),
}


def reference(eigenvalues: object, gradient: object, value: float) -> float:
    """Smallest |e| with value + g'e + e'diag(l)e/2 <= 0: bisection over the multiplier in 40 digits."""
    with mpmath.workdps(40):
        pairs = [(mpmath.mpf(float(l)), mpmath.mpf(float(g))) for l, g in zip(eigenvalues, gradient, strict=True)]
        h0 = mpmath.mpf(float(value))
        if h0 <= 0:
            return 0.0

        def power(mu: mpmath.mpf, p: int) -> mpmath.mpf:
            if any(l + mu == 0 and g != 0 for l, g in pairs):
                return mpmath.inf
            return mpmath.fsum(g**2 / (l + mu) ** p for l, g in pairs if g != 0)

        def constraint(mu: mpmath.mpf) -> mpmath.mpf:
            return h0 - power(mu, 1) / 2 - mu * power(mu, 2) / 2

        low = max(mpmath.mpf(0), -min(l for l, _ in pairs))
        if low == 0 and h0 - power(low, 1) / 2 > 0:
            return float("inf")
        if low > 0 and power(low, 1) < mpmath.inf and constraint(low) >= 0:
            return float(mpmath.sqrt((2 * h0 - power(low, 1)) / low))
        high = low + 1
        while constraint(high) < 0:
            high = low + 2 * (high - low)
        for _ in range(260):
            mu = (low + high) / 2
            low, high = (mu, high) if constraint(mu) < 0 else (low, mu)
        return float(mpmath.sqrt(power(high, 2)))


def solve(eigenvalues: object, gradient: object, value: float, dtype: torch.dtype = torch.float64) -> float:
    tensors = (torch.tensor(np.asarray(v), dtype=dtype) for v in (eigenvalues, [gradient], [value]))
    return distance_to_zero(*tensors).item()


# In float32 rounding decides whether these are reached.
MARGINAL = ("convex, just reachable", "convex, tangent")


@pytest.mark.parametrize(
    ("name", "dtype", "tol"),
    [(name, torch.float64, 1e-7) for name in CASES]
    + [(name, torch.float32, 1e-3) for name in CASES if name not in MARGINAL],
)
def test_every_case(name: str, dtype: torch.dtype, tol: float) -> None:
    stored = [torch.tensor(v, dtype=dtype).double().numpy() for v in CASES[name]]
    # A just reachable or tangent boundary has a square-root singularity in the value.
    assert solve(*CASES[name], dtype) == pytest.approx(reference(*stored), rel=1e-4 if "tangent" in name else tol)


def test_rays_in_the_plane() -> None:
    """Along each of many directions the boundary is the root of a scalar quadratic."""
    rng = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 200_001)
    u = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    finite = 0
    for _ in range(20):
        eigenvalues, gradient, value = rng.normal(size=2), rng.normal(size=2), rng.uniform(0.1, 3)
        a, b = 0.5 * u**2 @ eigenvalues, u @ gradient
        discriminant = b**2 - 4 * a * value
        with np.errstate(invalid="ignore", divide="ignore"):
            root = 2 * value / (-b + np.sqrt(discriminant))  # the smallest positive root, if there is one
        root = root[(discriminant >= 0) & (root > 0)]
        shortest = root.min() if len(root) else np.inf
        distance = solve(eigenvalues, gradient, value)
        assert distance == pytest.approx(shortest, rel=1e-6)
        finite += np.isfinite(shortest)
    assert 10 < finite < 20


@pytest.mark.parametrize("name", ["linear", "indefinite", "negative definite", "convex, reachable", "hard"])
def test_s_lemma_as_a_semidefinite_program(name: str) -> None:
    """Largest t with |e|^2 - t + l h(e) >= 0 for all e, l >= 0."""
    eigenvalues, gradient, value = CASES[name]
    k = len(gradient)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(k, k)))[0]
    hessian, g = rotation @ np.diag(eigenvalues) @ rotation.T, rotation @ gradient
    t, l = cp.Variable(), cp.Variable(nonneg=True)
    corner = cp.reshape(l * value - t, (1, 1), order="C")
    block = cp.bmat([[np.eye(k) + 0.5 * l * hessian, 0.5 * l * g[:, None]], [0.5 * l * g[None], corner]])
    squared = cp.Problem(cp.Maximize(t), [block >> 0]).solve(solver="CLARABEL")
    assert solve(eigenvalues, gradient, value) == pytest.approx(np.sqrt(squared), rel=1e-4)


curvature = st.one_of(
    st.sampled_from([0.0, -1.0, 1.0, -1e-6, 1e-6]), st.floats(-100, 100).filter(lambda v: abs(v) > 1e-9)
)
slope = st.one_of(st.sampled_from([0.0, 1e-6]), st.floats(-100, 100).filter(lambda v: abs(v) > 1e-9))
quadratic = st.integers(1, 5).flatmap(
    lambda k: st.tuples(st.lists(curvature, min_size=k, max_size=k), st.lists(slope, min_size=k, max_size=k))
)
values = st.floats(1e-6, 100)


@settings(max_examples=150, deadline=None)
@given(quadratic, values)
def test_ball_just_inside_is_safe_and_just_outside_is_not(coefficients: tuple, value: float) -> None:
    distance = solve(*coefficients, value)
    eigenvalues, gradient = (torch.tensor(np.asarray(v), dtype=torch.float64) for v in coefficients)

    def worst(radius: float) -> float:
        return value + minimise_over_ball(eigenvalues, gradient[None], radius).value.item()

    def rounding(radius: float) -> float:
        size = value + float(gradient.norm()) * radius + float(eigenvalues.abs().max()) * radius**2
        return 1e-10 * size

    if np.isinf(distance):
        assert float(eigenvalues.min()) >= 0
        assert worst(1e6) > -rounding(1e6)
    else:
        assert worst(distance * (1 - 1e-6)) > -rounding(distance)
        assert worst(distance * (1 + 1e-6)) < rounding(distance)


@settings(max_examples=150, deadline=None)
@given(quadratic, values)
def test_the_cheap_bound_never_exceeds_the_distance(coefficients: tuple, value: float) -> None:
    eigenvalues, gradient = (torch.tensor(np.asarray(v), dtype=torch.float64) for v in coefficients)
    bound = lower_bound(eigenvalues.min(), gradient.norm(), torch.tensor(value, dtype=torch.float64)).item()
    assert 0 < bound <= solve(*coefficients, value) * (1 + 1e-7)


def test_the_cheap_bound_is_tight_for_linear_and_for_isotropic_quadratics() -> None:
    three = torch.tensor([0.0, -2.0, 5.0], dtype=torch.float64)
    bound = lower_bound(three, torch.ones_like(three), torch.full_like(three, 2.0))
    assert bound.tolist() == pytest.approx([2.0, 1.0, 2.0])
    assert solve([-2.0, -2.0], [0.6, 0.8], 2.0) == pytest.approx(1.0)


def test_batches_broadcast_like_single_problems() -> None:
    generator = torch.Generator().manual_seed(0)
    eigenvalues = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    eigenvalues[2] = eigenvalues[2].abs()
    gradient = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    value = torch.rand(3, 7, generator=generator, dtype=torch.float64) + 0.5
    value[0, 0], gradient[1, 1] = -1.0, 0.0
    batch = distance_to_zero(eigenvalues, gradient, value)
    assert bool(batch[2].isinf().any()) and batch[0, 0] == 0
    for g in range(3):
        for i in range(7):
            single = solve(eigenvalues[g], gradient[g, i], value[g, i])
            assert batch[g, i].item() == pytest.approx(single, rel=1e-7)
    assert distance_to_zero(eigenvalues[:, :0], gradient[..., :0], value)[0, :2].tolist() == [0.0, torch.inf]


def test_rounding_does_not_make_a_boundary_reachable() -> None:
    """A convex form whose flat directions and slopes carry only rounding noise has no boundary."""
    assert solve([1e-17, 1.0, 2.0], [1e-17, 1.0, 0.0], 1.0) == np.inf
    assert solve([-1e-17, 1.0, 2.0], [0.0, 1.0, 0.0], 1.0) == np.inf
