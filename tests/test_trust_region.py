"""Ball and sphere minima against a 40-digit reference, the LMI in CVXPY, brute force, and the laws they obey."""

import cvxpy as cp
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convex_head.adversary.trust_region import minimise_blurred, minimise_over_ball, minimise_over_sphere

CASES = {
    "interior": ([1.0, 2.0, 5.0], [0.3, -0.2, 0.1], 1.0),
    "convex, on the sphere": ([1.0, 2.0, 5.0], [3.0, -2.0, 1.0], 0.5),
    "indefinite": ([-2.0, 0.5, 3.0], [0.4, -1.0, 2.0], 0.7),
    "negative definite": ([-3.0, -2.0, -1.0], [0.1, 0.2, -5.0], 2.0),
    "hard": ([-2.0, 0.5, 3.0], [0.0, 0.3, -0.4], 1.0),
    "hard, zero gradient": ([-2.0, 0.5], [0.0, 0.0], 1.5),
    "orthogonal to the lowest, yet not hard": ([-2.0, 0.5, 3.0], [0.0, 9.0, -4.0], 1.0),
    "nearly hard": ([-2.0, 0.5, 3.0], [1e-11, 0.3, -0.4], 1.0),
    "hard, lowest repeated": ([-1.0, -1.0, -1.0, 2.0], [0.0, 0.0, 0.0, 1.0], 0.9),
    "lowest repeated": ([-1.0, -1.0, 2.0], [0.3, -0.4, 1.0], 0.9),
    "nearly repeated": ([-1.0, -1.0 + 1e-13, 2.0], [1e-9, -1e-9, 1.0], 0.9),
    "zero Hessian": ([0.0, 0.0, 0.0], [1.0, -2.0, 2.0], 0.25),
    "zero everything": ([0.0, 0.0], [0.0, 0.0], 1.0),
    "singular, interior": ([0.0, 1.0, 2.0], [0.0, 0.1, 0.1], 1.0),
    "singular, gradient in the null space": ([0.0, 1.0, 2.0], [1e-3, 0.1, 0.1], 1.0),
    "exactly on the sphere without multiplier": ([1.0, 1.0], [0.6, 0.8], 1.0),
    "scales apart": ([-1e-6, 1e6], [1e-4, 1e5], 1.0),
    "large": ([-1e8, 3e7], [1e10, -4e9], 30.0),
    "small": ([-1e-8, 3e-9], [1e-12, -4e-12], 1e-3),
    "one coordinate": ([-1.0], [0.0], 2.0),
    "no ball": ([-1.0, 1.0], [1.0, 1.0], 0.0),
}


def reference(eigenvalues: list[float], gradient: list[float], radius: float, sphere: bool = False) -> float:
    """Minimum by bisection of the secular equation in 40 digits; every case of the theory written out."""
    with mpmath.workdps(40):
        pairs = [(mpmath.mpf(float(l)), mpmath.mpf(float(g))) for l, g in zip(eigenvalues, gradient, strict=True)]
        r = mpmath.mpf(float(radius))
        if r == 0:
            return 0.0

        def length(mu: mpmath.mpf) -> mpmath.mpf:
            if any(l + mu == 0 and g != 0 for l, g in pairs):
                return mpmath.inf
            return mpmath.sqrt(mpmath.fsum((g / (l + mu)) ** 2 for l, g in pairs if g != 0))

        lowest = min(l for l, _ in pairs)
        low = -lowest if sphere else max(mpmath.mpf(0), -lowest)
        mu = low
        if length(low) > r:
            high = low + mpmath.sqrt(mpmath.fsum(g**2 for _, g in pairs)) / r
            for _ in range(200):
                mu = (low + high) / 2
                low, high = (mu, high) if length(mu) > r else (low, mu)
        quotient = mpmath.fsum(g**2 / (l + mu) for l, g in pairs if g != 0)
        return float(-(quotient + mu * r**2) / 2)


def solve(
    eigenvalues: object, gradient: object, radius: float, dtype: torch.dtype = torch.float64, at=minimise_over_ball
):
    return at(torch.tensor(eigenvalues, dtype=dtype), torch.tensor(np.asarray([gradient]), dtype=dtype), radius)


def primal(eigenvalues: object, gradient: object, e: torch.Tensor) -> float:
    e = e.double().numpy()
    return float(np.dot(gradient, e) + 0.5 * np.dot(eigenvalues, e**2))


def scale_of(eigenvalues: object, gradient: object, radius: float) -> float:
    """Size of the numbers that make up the value: what rounding is relative to."""
    return float(np.linalg.norm(gradient) * radius + 0.5 * np.abs(eigenvalues).max() * radius**2) + 1e-300


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_value_and_minimiser_in_every_case(case: tuple, dtype: torch.dtype, tol: float) -> None:
    eigenvalues, gradient, radius = case
    stored = [np.asarray(torch.tensor(v, dtype=dtype).double()) for v in (eigenvalues, gradient)]
    best = solve(*case, dtype)
    allowed = tol * scale_of(*case)
    assert best.value.dtype == dtype
    assert best.value.item() == pytest.approx(reference(*stored, radius), abs=allowed, rel=0)
    assert primal(*stored, best.minimiser[0]) == pytest.approx(best.value.item(), abs=10 * allowed, rel=0)
    assert float(best.minimiser.double().norm()) <= radius * (1 + 4 * torch.finfo(dtype).eps)
    assert best.multiplier.item() >= max(0.0, -min(stored[0])) * (1 - 1e-6) * (radius > 0)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c[2] > 0], ids=[k for k, c in CASES.items() if c[2] > 0])
def test_sphere_in_every_case(case: tuple) -> None:
    eigenvalues, gradient, radius = case
    best = solve(*case, at=minimise_over_sphere)
    allowed = 1e-11 * scale_of(*case)
    assert best.value.item() == pytest.approx(reference(*case, sphere=True), abs=allowed, rel=0)
    assert primal(eigenvalues, gradient, best.minimiser[0]) == pytest.approx(best.value.item(), abs=10 * allowed, rel=0)
    assert float(best.minimiser.norm()) == pytest.approx(radius, rel=1e-10)


@pytest.mark.parametrize("name", ["interior", "indefinite", "hard", "zero Hessian", "lowest repeated"])
def test_value_is_that_of_the_lmi(name: str) -> None:
    """S-lemma: the minimum is the largest t with [[H + l I, g], [g', -2t - l r^2]] PSD, l >= 0."""
    eigenvalues, gradient, radius = CASES[name]
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(len(gradient), len(gradient))))[0]
    hessian, g = rotation @ np.diag(eigenvalues) @ rotation.T, rotation @ gradient
    t, l = cp.Variable(), cp.Variable(nonneg=True)
    corner = cp.reshape(-2 * t - l * radius**2, (1, 1), order="C")
    block = cp.bmat([[hessian + l * np.eye(len(g)), g[:, None]], [g[None], corner]])
    value = cp.Problem(cp.Maximize(t), [block >> 0]).solve(solver="CLARABEL")
    assert solve(eigenvalues, gradient, radius).value.item() == pytest.approx(value, abs=1e-5)


def test_nothing_in_the_ball_is_lower() -> None:
    rng = np.random.default_rng(0)
    for k in (1, 2, 4):
        steps = rng.normal(size=(20_000, k))
        steps *= rng.uniform(size=(20_000, 1)) ** (1 / k) / np.linalg.norm(steps, axis=1, keepdims=True)
        for _ in range(5):
            eigenvalues, gradient, radius = rng.normal(size=k), rng.normal(size=k), rng.uniform(0.1, 3)
            e = radius * steps
            sampled = (e @ gradient + 0.5 * e**2 @ eigenvalues).min()
            value = solve(eigenvalues, gradient, radius).value.item()
            assert value <= sampled + 1e-12
            assert value >= sampled - 0.25 * scale_of(eigenvalues, gradient, radius)


def test_batches_broadcast_like_single_problems() -> None:
    generator = torch.Generator().manual_seed(0)
    eigenvalues = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    gradient = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    gradient[0, 0], gradient[1, 2, eigenvalues[1].argmin()] = 0.0, 0.0
    batch = minimise_over_ball(eigenvalues, gradient, 0.8)
    shared = minimise_over_ball(eigenvalues[1], gradient, 0.8)
    for g in range(3):
        for i in range(7):
            one = minimise_over_ball(eigenvalues[g], gradient[g, i : i + 1], 0.8)
            torch.testing.assert_close(batch.value[g, i], one.value[0])
            torch.testing.assert_close(batch.minimiser[g, i], one.minimiser[0])
            one = minimise_over_ball(eigenvalues[1], gradient[g, i : i + 1], 0.8)
            torch.testing.assert_close(shared.value[g, i], one.value[0])
    assert minimise_over_ball(eigenvalues, gradient[:, :0], 0.8).value.shape == (3, 0)
    assert minimise_over_ball(eigenvalues[:, :0], gradient[..., :0], 0.8).value.tolist() == [[0.0] * 7] * 3


def test_inputs_are_left_alone() -> None:
    eigenvalues, gradient = torch.tensor([-1.0, 2.0]), torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    before = eigenvalues.clone(), gradient.clone()
    minimise_over_ball(eigenvalues, gradient, 1.0)
    minimise_over_sphere(eigenvalues, gradient, 1.0)
    assert torch.equal(eigenvalues, before[0]) and torch.equal(gradient, before[1])


# Slopes below 1e-12 would need more digits in the reference.
real = st.floats(-100, 100).filter(lambda v: abs(v) > 1e-12)
curvature = st.one_of(st.sampled_from([0.0, -1.0, 1.0, -1e-9, 1e-9]), real)
slope = st.one_of(st.sampled_from([0.0, 1e-12, -1e-12, 1e-6]), real)
quadratic = st.integers(1, 5).flatmap(
    lambda k: st.tuples(st.lists(curvature, min_size=k, max_size=k), st.lists(slope, min_size=k, max_size=k))
)
radii = st.floats(1e-4, 100)


@settings(max_examples=80, deadline=None)
@given(quadratic, radii)
def test_random_quadratics(coefficients: tuple[list[float], list[float]], radius: float) -> None:
    """Value of the reference, attained at a feasible point, never above the centre."""
    best = solve(*coefficients, radius)
    allowed = 1e-11 * scale_of(*coefficients, radius)
    assert best.value.item() == pytest.approx(reference(*coefficients, radius), abs=allowed, rel=0)
    assert best.value.item() <= 1e-15 * allowed
    assert primal(*coefficients, best.minimiser[0]) == pytest.approx(best.value.item(), abs=allowed, rel=0)
    assert float(best.minimiser.norm()) <= radius * (1 + 1e-15)


@settings(max_examples=100, deadline=None)
@given(quadratic, radii, st.floats(1, 10))
def test_larger_balls_hold_lower_values(coefficients: tuple, radius: float, factor: float) -> None:
    small, large = (solve(*coefficients, r).value.item() for r in (radius, factor * radius))
    assert large <= small + 1e-11 * scale_of(*coefficients, factor * radius)


@settings(max_examples=60, deadline=None)
@given(quadratic, radii, st.integers(0, 10**6))
def test_rotations_do_not_matter(coefficients: tuple, radius: float, seed: int) -> None:
    eigenvalues, gradient = map(np.array, coefficients)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(gradient), len(gradient))))[0]
    turned, basis = np.linalg.eigh(rotation @ np.diag(eigenvalues) @ rotation.T)
    again = solve(turned.tolist(), (basis.T @ rotation @ gradient).tolist(), radius)
    allowed = 1e-11 * scale_of(eigenvalues, gradient, radius)
    assert again.value.item() == pytest.approx(solve(*coefficients, radius).value.item(), abs=allowed, rel=0)


@pytest.mark.parametrize(("k", "dimension"), [(1, 1), (3, 3), (3, 7)])
@pytest.mark.parametrize("blur", [1e-3, 0.3])
def test_blur_is_a_mixture_of_points_of_the_ball_just_below_the_minimum(k: int, dimension: int, blur: float) -> None:
    generator = torch.Generator().manual_seed(k)
    eigenvalues = torch.randn(4, k, generator=generator, dtype=torch.float64)
    gradient = torch.randn(4, 5, k, generator=generator, dtype=torch.float64)
    gradient[:, 0] = 0.0  # the hard case where an eigenvalue is negative
    radius = 0.7
    exact = minimise_over_ball(eigenvalues, gradient, radius)
    blurred = minimise_blurred(eigenvalues, gradient, radius, blur, dimension)
    bias = exact.value - blurred.value
    assert (bias >= -1e-12).all() and (bias <= blur * radius * dimension**0.5 + 1e-12).all()
    e, spread = blurred.minimiser, blurred.spread
    assert (e.square().sum(-1) + spread.sum(-1) <= radius**2 * (1 + 1e-12)).all()
    # The mean over the mixture: points of the ball, hence not below the minimum, and above it by the bias at most.
    mean = (gradient * e).sum(-1) + 0.5 * (eigenvalues.unsqueeze(-2) * (e.square() + spread)).sum(-1)
    assert (mean >= exact.value - 1e-12).all() and (mean <= exact.value + blur * radius * dimension**0.5 + 1e-12).all()


def test_blurred_value_is_concave_in_the_quadratic() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        hessians = [m + m.T for m in torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)]
        gradients = torch.randn(2, 3, generator=generator, dtype=torch.float64)

        def value(hessian: torch.Tensor, gradient: torch.Tensor) -> float:
            eigenvalues, vectors = torch.linalg.eigh(hessian)
            return float(minimise_blurred(eigenvalues, (gradient @ vectors).unsqueeze(0), 0.8, 0.2, 5).value)

        middle = value(0.5 * (hessians[0] + hessians[1]), gradients.mean(0))
        assert middle >= 0.5 * (value(hessians[0], gradients[0]) + value(hessians[1], gradients[1])) - 1e-12
