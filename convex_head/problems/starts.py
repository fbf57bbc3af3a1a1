"""Networks that a solve starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from convex_head.problems.base import Network

# Of the mean variance within classes.
_RIDGE = 0.3


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


def discriminant_network(sums: Tensor, counts: Tensor, second: Tensor) -> Network:
    """One neuron a class along Fisher's linear discriminant, output weight 1.

    Source: R. A. Fisher, Annals of Eugenics 7 (1936); the ridge keeps directions apart that few examples span (J.
    Friedman, JASA 84 (1989)).

    Args:
        sums: (C, d) sums of the examples of every class.
        counts: (C,) how many these are.
        second: (d, d) sum of x x' over all examples.
    """
    n, d = counts.sum(), sums.shape[1]
    means = sums / counts.clamp_min(1).unsqueeze(1)
    within = (second - means.mT @ sums) / n
    ridge = _RIDGE * within.trace() / d
    within += ridge.clamp_min(torch.finfo(torch.float64).tiny) * torch.eye(d, dtype=within.dtype, device=within.device)
    directions = torch.linalg.solve(within, (means - sums.sum(0) / n).mT).mT
    directions /= directions.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    functions = torch.arange(len(counts), device=sums.device)
    return Network(directions, torch.ones_like(directions[:, 0]), functions)
