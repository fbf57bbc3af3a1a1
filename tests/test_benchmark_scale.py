"""Networks of the scale benchmark, as wide as it says."""

import pytest
import torch


def test_widened_networks_are_about_the_same_function():
    from benchmarks.scale import widened
    from convex_head.problems.base import Network

    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(5, 20, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    narrow = Network(directions, torch.tensor([1.0, -2.0, 3.0, 1.0, 2.0]).double(), torch.tensor([0, 1, 0, 1, 0]))
    wide = widened(narrow, 7)
    assert torch.bincount(wide.function).tolist() == [7, 7]
    assert float((wide.directions @ wide.directions.T).fill_diagonal_(0).max()) < 1 - 1e-3
    assert float(wide.norm) == pytest.approx(9.0)
    x = torch.randn(50, 20, generator=generator, dtype=torch.float64)

    def values(network):
        each = network.weights * (0.09 * (x @ network.directions.T) ** 2 + 0.5 * (x @ network.directions.T) + 0.47)
        return torch.zeros(50, 2, dtype=torch.float64).index_add_(1, network.function, each)

    assert float((values(wide) - values(narrow)).norm() / values(narrow).norm()) < 0.15
