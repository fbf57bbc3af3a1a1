"""Networks that a solve starts from."""

from __future__ import annotations

import torch

from convex_head.problems.base import Network


def zero_network(functions: int, d: int, device: torch.device) -> Network:
    """One neuron of weight 0 a function."""
    directions = torch.zeros(functions, d, dtype=torch.float64, device=device)
    directions[:, 0] = 1
    return Network(directions, torch.zeros_like(directions[:, 0]), torch.arange(functions, device=device))


def random_network(functions: int, d: int, neurons: int, seed: int, device: torch.device) -> Network:
    """``neurons`` random unit neurons of each sign for every function, output weights +-0.1 / neurons."""
    generator = torch.Generator().manual_seed(seed)
    count = 2 * neurons * functions
    directions = torch.randn(count, d, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    index = torch.arange(count)
    weights = torch.where(index % 2 == 0, 0.1, -0.1).double() / neurons
    return Network(directions.to(device), weights.to(device), (index // (2 * neurons)).to(device))
