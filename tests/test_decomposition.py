"""The neural decomposition against its own definition: sums of outer products of unit neurons."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convex_head.decomposition import (
    compress,
    decompose,
    moments,
    network_from_moments,
    optimal_width,
    project,
)
from convex_head.errors import DecompositionError
from convex_head.problems.base import Network


def random_member(rng: np.random.Generator, width: int, rank: int, spread: float = 0.0) -> torch.Tensor:
    """A random matrix of S that was not made from neurons: a random PSD matrix, brought to tr Z1 = z4."""
    factor = rng.normal(size=(rank, width + 1)) * 10.0 ** rng.uniform(-spread, 0, size=(rank, 1))
    Z = factor.T @ factor
    scale = np.full(width + 1, (Z[-1, -1] / np.trace(Z[:-1, :-1])) ** 0.25)
    scale[-1] = 1 / scale[-1]
    return torch.from_numpy(scale[:, None] * Z * scale)


def rebuild(directions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    lifted = torch.cat([directions, torch.ones(len(weights), 1, dtype=torch.float64)], dim=1)
    return lifted.T @ (weights[:, None] * lifted)


def random_network(rng: np.random.Generator, width: int, neurons: int, functions: int) -> Network:
    directions = rng.normal(size=(neurons, width))
    return Network(
        torch.from_numpy(directions / np.linalg.norm(directions, axis=1, keepdims=True)),
        torch.from_numpy(rng.normal(size=neurons)),
        torch.from_numpy(rng.integers(0, functions, size=neurons)),
    )


def evaluate(network: Network, x: torch.Tensor, functions: int) -> torch.Tensor:
    """(n, functions) values with s(t) = 0.09 t^2 + 0.5 t + 0.47, from the definition of a network."""
    t = x @ network.directions.T
    out = torch.zeros(len(x), functions, dtype=torch.float64)
    return out.index_add_(1, network.function, network.weights * (0.09 * t**2 + 0.5 * t + 0.47))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 12),
    rank=st.integers(1, 13),
    magnitude=st.integers(-120, 120),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
)
def test_decompose_rebuilds_any_member(seed: int, width: int, rank: int, magnitude: int, spread: float) -> None:
    Z = random_member(np.random.default_rng(seed), width, rank, spread) * 10.0**magnitude
    directions, weights = decompose(Z)
    assert len(weights) <= min(rank, width + 1)
    assert (weights >= 0).all()
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(len(weights), dtype=torch.float64))
    assert (rebuild(directions, weights) - Z).norm() <= 1e-8 * Z.norm()


def test_decompose_of_a_wide_matrix_is_exact_to_rounding() -> None:
    Z = random_member(np.random.default_rng(3), width=256, rank=257)
    directions, weights = decompose(Z)
    assert len(weights) <= 257
    assert (rebuild(directions, weights) - Z).norm() <= 1e-12 * Z.norm()


def test_decompose_keeps_the_rank_of_repeated_eigenvalues() -> None:
    width = 4
    Z = torch.eye(width + 1, dtype=torch.float64)
    Z[-1, -1] = width
    directions, weights = decompose(Z)
    assert len(weights) == width + 1
    torch.testing.assert_close(rebuild(directions, weights), Z, rtol=0, atol=1e-12)


def test_decompose_of_zero_has_no_neuron() -> None:
    directions, weights = decompose(torch.zeros(4, 4))
    assert directions.shape == (0, 3)
    assert weights.shape == (0,)


def test_one_feature_has_two_possible_neurons() -> None:
    """With d = 1 the unit sphere is {-1, 1}: the weights are determined by Z, so they can be compared."""
    Z = 2.0 * torch.tensor([[1.0, 1.0], [1.0, 1.0]]) + 3.0 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    directions, weights = decompose(Z.double())
    found = {round(float(u)): float(weight) for u, weight in zip(directions[:, 0], weights, strict=True)}
    assert found == pytest.approx({1: 2.0, -1: 3.0}, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 8), noise=st.sampled_from([0.0, 1e-9, 1e-4, 0.3]))
def test_project_lands_in_the_set_near_the_argument(seed: int, width: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    member = random_member(rng, width, rank=max(1, width // 2))
    disturbance = torch.from_numpy(rng.normal(size=member.shape))
    disturbance = noise * member.norm() / disturbance.norm() * (disturbance + disturbance.T) / 2
    Z = project(member + disturbance)
    assert torch.linalg.eigvalsh(Z)[0] >= -1e-12 * Z.norm()
    assert float(Z.diagonal()[:-1].sum()) == pytest.approx(float(Z[-1, -1]), rel=1e-12)
    assert (Z - member).norm() <= 6 * (disturbance.norm() + 1e-9 * member.norm())
    torch.testing.assert_close(project(Z), Z, rtol=0, atol=1e-7 * float(Z.norm()))
    decompose(Z)


def test_project_keeps_the_linear_part_and_the_rank() -> None:
    member = random_member(np.random.default_rng(0), width=5, rank=2)
    off_trace = member.clone()
    off_trace[-1, -1] *= 1.5
    Z = project(off_trace)
    torch.testing.assert_close(Z[:-1, -1], off_trace[:-1, -1])
    assert torch.linalg.matrix_rank(Z) == torch.linalg.matrix_rank(off_trace)
    trace, corner = off_trace.diagonal()[:-1].sum(), off_trace[-1, -1]
    torch.testing.assert_close(Z[-1, -1], (trace * corner).sqrt())


@pytest.mark.parametrize("corner", [0.0, -1.0])
def test_project_of_a_matrix_without_a_neuron_is_zero(corner: float) -> None:
    Z = torch.diag(torch.tensor([1.0, 2.0, corner], dtype=torch.float64))
    assert torch.equal(project(Z), torch.zeros(3, 3, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 6), functions=st.integers(1, 4))
def test_moments_and_network_are_inverse(seed: int, width: int, functions: int) -> None:
    rng = np.random.default_rng(seed)
    network = random_network(rng, width, neurons=20, functions=functions)
    positive, negative = moments(network, functions)
    rebuilt = network_from_moments(positive, negative)
    x = torch.from_numpy(rng.normal(size=(7, width)))
    torch.testing.assert_close(evaluate(rebuilt, x, functions), evaluate(network, x, functions), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(rebuilt.norm, network.norm, rtol=1e-7, atol=0)
    assert rebuilt.size == sum(int(torch.linalg.matrix_rank(Z, hermitian=True)) for Z in positive + negative)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 6), neurons=st.integers(0, 60))
def test_compress_keeps_function_and_norm_at_the_optimal_width(seed: int, width: int, neurons: int) -> None:
    rng = np.random.default_rng(seed)
    network = random_network(rng, width, neurons, functions=3)
    narrow = compress(network)
    assert narrow.size == optimal_width(network) <= min(neurons, 3 * 2 * (width + 1))
    x = torch.from_numpy(rng.normal(size=(7, width)))
    torch.testing.assert_close(evaluate(narrow, x, 3), evaluate(network, x, 3), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(narrow.norm, network.norm)


def test_compress_leaves_independent_neurons_alone_and_keeps_the_dtype() -> None:
    network = Network(torch.eye(3), torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0, 0, 1]))
    narrow = compress(network)
    assert narrow.directions.dtype == torch.float32
    assert torch.equal(narrow.directions, network.directions)
    assert torch.equal(narrow.weights, network.weights)
    assert torch.equal(narrow.function, network.function)


def test_float32_duplicates_merge() -> None:
    """Rounding of float32 directions is far below the rank tolerance, so equal neurons still count once."""
    u = torch.nn.functional.normalize(torch.randn(1, 9, generator=torch.Generator().manual_seed(0)))
    wobble = u * (1 + 1e-7 * torch.arange(5)[:, None])
    network = Network(wobble, torch.ones(5), torch.zeros(5, dtype=torch.int64))
    assert optimal_width(network) == 1
    assert float(compress(network).weights) == pytest.approx(5.0, rel=1e-5)


def indefinite() -> torch.Tensor:
    return torch.diag(torch.tensor([2.0, -1.0, 1.0]))


def off_trace() -> torch.Tensor:
    return torch.diag(torch.tensor([1.0, 1.0, 3.0]))


@pytest.mark.parametrize(
    ("Z", "message"),
    [
        (torch.zeros(3), r"\(d\+1, d\+1\) with d >= 1; found shape \(3,\)"),
        (torch.zeros(3, 2), r"found shape \(3, 2\)"),
        (torch.zeros(1, 1), r"found shape \(1, 1\)"),
        (torch.zeros(2, 2, dtype=torch.complex64), "must be real; found torch.complex64"),
        (torch.full((2, 2), float("nan")), "must be finite; found 4 entries"),
        (torch.tensor([[1.0, 1.0], [0.0, 1.0]]), "must be symmetric; entries differ by 1"),
        (indefinite(), "positive semidefinite; its smallest eigenvalue is -1"),
        (off_trace(), "tr Z1 = z4; tr Z1 - z4 is -1"),
    ],
)
def test_decompose_refuses_what_is_not_in_the_set(Z: torch.Tensor, message: str) -> None:
    with pytest.raises(DecompositionError, match=message):
        decompose(Z)


def test_project_refuses_shapes_and_non_finite_values() -> None:
    with pytest.raises(DecompositionError, match="found shape"):
        project(torch.zeros(3, 2))
    with pytest.raises(DecompositionError, match="must be finite"):
        project(torch.full((3, 3), float("inf")))


def test_network_from_moments_refuses_lists_that_do_not_match() -> None:
    with pytest.raises(DecompositionError, match="found 1 and 0"):
        network_from_moments([torch.zeros(2, 2)], [])
    with pytest.raises(DecompositionError, match="found 0 and 0"):
        network_from_moments([], [])
    with pytest.raises(DecompositionError, match="one shape"):
        network_from_moments([torch.zeros(2, 2)], [torch.zeros(3, 3)])


def test_moments_refuses_unknown_functions() -> None:
    network = Network(torch.eye(2), torch.ones(2), torch.tensor([0, 4]))
    with pytest.raises(DecompositionError, match=r"functions 0\.\.1; found \[0, 4\]"):
        moments(network, 2)
