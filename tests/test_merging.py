"""Neurons that nearly coincide are made one, and nothing else of a network changes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork
from convex_head.problems.base import Network
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers.column_generation import ColumnGeneration
from convex_head.solvers.merging import merging


def network(turn: float, seed: int = 0) -> Network:
    """Two functions of two neurons, each neuron three times: turned by about ``turn``, of unlike weights and places."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(4, 6, generator=generator, dtype=torch.float64).repeat_interleave(3, 0)
    directions = base / base.norm(dim=1, keepdim=True)
    directions = directions + turn * torch.randn(12, 6, generator=generator, dtype=torch.float64)
    weights = torch.rand(12, generator=generator, dtype=torch.float64) + 0.1
    function = torch.tensor([0, 0, 1, 1]).repeat_interleave(3)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).repeat_interleave(3)
    order = torch.randperm(12, generator=generator)
    directions = directions / directions.norm(dim=1, keepdim=True)
    return Network(directions[order], (signs * weights)[order], function[order])


def clusters() -> PolynomialProblem:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 4
    x = 2 * torch.randn(4, 10, generator=generator, dtype=torch.float64)[labels]
    x = x + torch.randn(240, 10, generator=generator, dtype=torch.float64)
    return PolynomialProblem(x, labels, num_classes=4, radius=0.5, reg=0.02)


def quadratics(packed: PackedNetwork) -> Tensor:
    """D of every function, (F, d+1, d+1)."""
    lifted = torch.cat([packed.vectors, packed.nu.unsqueeze(-1)], dim=-1)
    return torch.einsum("fm,fmi,fmj->fij", packed.signs, lifted, lifted)


@pytest.mark.parametrize("seed", range(3))
def test_neurons_of_one_direction_become_one_and_functions_stay(seed: int) -> None:
    packed = PackedNetwork.pack(network(0.0, seed), 3)  # the third function has no neurons
    merged = merging(packed, 1e-9)
    assert merged.gone == 8 and (merged.signs != 0).sum(1).tolist() == [2, 2, 0]
    torch.testing.assert_close(quadratics(merged.network()), quadratics(packed), rtol=0, atol=1e-12)


def test_what_a_merge_changes_shrinks_with_the_square_of_the_angle() -> None:
    errors = []
    for turn in (1e-2, 1e-3):
        packed = PackedNetwork.pack(network(turn), 2)
        merged = merging(packed, 1.0)
        assert merged.gone == 8
        total = merged.network().unpack().weights.abs().sum()
        assert float(total) == pytest.approx(float(packed.vectors.square().sum()), rel=1e-12)
        errors.append(float((quadratics(merged.network()) - quadratics(packed)).norm()))
    assert 50 < errors[0] / errors[1] < 200


def test_the_distance_that_is_allowed_decides() -> None:
    packed = PackedNetwork.pack(network(1e-2), 2)
    gone = [merging(packed, most).gone for most in (0.0, 1e-6, 1e-4, 1.0)]
    assert gone[0] == 0 and gone == sorted(gone) and gone[-1] == 8


def test_signs_and_functions_are_kept_apart() -> None:
    direction = torch.eye(1, 4, dtype=torch.float64).repeat(4, 1)
    same = Network(direction, torch.tensor([1.0, -1.0, 2.0, -3.0]).double(), torch.tensor([0, 0, 1, 1]))
    assert merging(PackedNetwork.pack(same, 2), 1.0).gone == 0


def test_opposite_neurons_stay_two_however_light() -> None:
    vectors = torch.tensor([[[3.0, 0.0], [0.0, 3.0], [0.0, 0.1], [0.0, -0.1]]], dtype=torch.float64)
    packed = PackedNetwork.of(vectors, torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64))
    merged = merging(packed, 0.04)
    assert merged.gone == 0
    torch.testing.assert_close(merged.vectors, vectors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alive", [0, 1])
def test_networks_of_next_to_nothing_stay(alive: int, dtype: torch.dtype) -> None:
    vectors = torch.ones(2, 3, 4, dtype=dtype) * torch.tensor([1.0, 0.0, 1.0], dtype=dtype).view(1, 3, 1)
    packed = PackedNetwork.of(vectors, alive * torch.tensor([1.0, 1.0, 0.0], dtype=dtype).expand(2, 3))
    merged = merging(packed, 1.0)
    assert merged.gone == 0 and torch.isfinite(merged.rows(vectors)).all()
    assert (merged.signs != 0).sum(1).tolist() == [alive, alive]
    torch.testing.assert_close(merged.network().unpack().weights, torch.full((2 * alive,), 4.0, dtype=dtype))


def test_gradients_of_a_merged_network_are_those_that_its_rows_say() -> None:
    """Chain rule: neurons of one direction are fixed multiples of the merged one."""
    packed = PackedNetwork.pack(network(0.0), 2)
    merged = merging(packed, 1e-9)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def gradient(vectors: Tensor, signs: Tensor) -> Tensor:
        vectors = vectors.clone().requires_grad_(True)
        norm = (vectors.square().sum(-1) + (signs == 0)).sqrt()
        tau = torch.einsum("nd,fmd->nfm", x, vectors)
        values = signs * (0.09 * tau**2 + 0.5 * norm * tau + 0.47 * norm**2)
        return torch.autograd.grad(values.sum(-1).sin().sum(), vectors)[0]

    before, after = gradient(packed.vectors, packed.signs), gradient(merged.vectors, merged.signs)
    torch.testing.assert_close(merged.rows(before), after, rtol=1e-9, atol=1e-9)


def test_a_search_stops_for_a_narrower_network_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, searches = clusters(), []
    search = ColumnGeneration._search

    def watched(self: Any, problem: Any, state: Any, run: Any, most: int) -> tuple[bool, bool]:
        width, done = problem.pack(state.network).signs.shape[1], run.extra["evaluations"]
        reached, narrower = search(self, problem, state, run, most)
        after = problem.pack(state.network).signs.shape[1]
        searches.append((narrower, reached, after <= 0.8 * width, run.extra["evaluations"] - done, most))
        return reached, narrower

    monkeypatch.setattr(ColumnGeneration, "_search", watched)
    limit = 60
    result = ColumnGeneration(neurons=12, inner_evaluations=limit).solve(problem, tol=6e-3)
    stopped = [i for i, (narrower, *_) in enumerate(searches) if narrower]
    assert result.converged and stopped
    for i in stopped:
        _, reached, is_narrower, evaluations, most = searches[i]
        assert is_narrower and not reached
        # The next one goes on with what is left of the limit.
        assert searches[i + 1][-1] == most - evaluations
    assert all(0 < evaluations <= most <= limit for *_, evaluations, most in searches)


def test_a_fit_ends_without_repeated_neurons() -> None:
    problem = clusters()
    wide = ColumnGeneration(neurons=12).solve(problem, tol=6e-3)
    narrow = ColumnGeneration(neurons=2).solve(problem, tol=6e-3)
    assert wide.gap <= 6e-3 and narrow.gap <= 6e-3
    assert wide.primal == pytest.approx(narrow.primal, rel=1.2e-2)
    # Started from 96 neurons and from 16.
    assert wide.neurons <= 2 * narrow.neurons
    assert merging(problem.pack(wide.network), 6e-5).gone == 0
