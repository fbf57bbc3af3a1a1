"""Networks that a solve starts from."""

from __future__ import annotations

from functools import partial

import torch

from convex_head.problems.base import Network
from convex_head.rows import Rows
from convex_head.shards import Whole

# Of the mean variance within classes, and of that between them.
_RIDGE, _RIDGE_BETWEEN = 0.3, 1e-3


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


def discriminant_network(rows: Rows, functions: int, n: int, shard: Whole) -> Network:
    """One neuron a class along Fisher's linear discriminant, output weight 1.

    Source: R. A. Fisher, Annals of Eugenics 7 (1936); the ridge keeps directions apart that few examples span (J.
    Friedman, JASA 84 (1989)). Where examples do not differ within classes, the discriminants are the class means.

    Args:
        rows: of this process, read twice.
        functions: C.
        n: examples of all processes.
        shard: adds up over the processes.
    """
    d = rows.d
    zeros = partial(torch.zeros, dtype=torch.float64, device=rows.device)
    means, counts, within = zeros(functions, d), zeros(functions), zeros(d, d)
    for chunk in rows:
        means.index_add_(0, chunk.labels, chunk.x.double())
        counts.index_add_(0, chunk.labels, torch.ones_like(chunk.labels, dtype=torch.float64))
    shard.sum(means, counts)
    centre = means.sum(0) / n
    means /= counts.clamp_min(1).unsqueeze(1)
    for chunk in rows:
        # Not from sums of squares, in which what is within a class would be lost beside what is not.
        spread = chunk.x - means[chunk.labels].to(chunk.x.dtype)
        within += (spread.mT @ spread).double() / n
    shard.sum(within)
    means = torch.where(counts.unsqueeze(1) > 0, means - centre, 0.0)
    between = (counts @ means.square()).sum() / n
    ridge = ((_RIDGE * within.trace() + _RIDGE_BETWEEN * between) / d).clamp_min(torch.finfo(torch.float64).tiny)
    directions = torch.linalg.solve(within + ridge * torch.eye(d).to(within), means.mT).mT
    length = directions.norm(dim=1, keepdim=True)
    # A class without examples, or in the middle of all, has no direction: any will do.
    directions = torch.where(length > 0, directions / length, torch.eye(1, d).to(within))
    return Network(directions, torch.ones_like(counts), torch.arange(functions, device=rows.device))
