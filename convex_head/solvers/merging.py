"""Neurons of one function and sign that have become nearly the same are made one.

The oracle adds neurons beside those that a search then turns into the same direction, so that most of a network repeats
the rest. Two neurons of output weights p and q with directions u and w are the same matrix up to

    p [u;1][u;1]' + q [w;1][w;1]' = (p + q) [z;1][z;1]' + O(pq/(p + q) |u - w|^2),    z = (p u + q w) / (p + q),

and so are all values of the network. In the vectors v = sqrt(p) u that a search moves, neurons of one direction are
multiples of one vector: rows of steps and of gradients are projected onto that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork

# |u - w|^2 at most, however little one of the two weighs: 60 degrees.
_MOST_APART = 1.0


@dataclass(frozen=True)
class Merging:
    """Which neurons are made one.

    Attributes:
        into: (F, m, m) row k has |v_j| over the norm of what neurons j become together at place k, 0 for all others.
        vectors: (F, m, d) of the merged network; zero where a neuron has gone.
        signs: (F, m), 0 there.
        gone: how many neurons have gone.
    """

    into: Tensor
    vectors: Tensor
    signs: Tensor
    gone: int

    def network(self) -> PackedNetwork:
        """The merged network, in the layout of the one before."""
        return PackedNetwork.of(self.vectors, self.signs)

    def rows(self, values: Tensor) -> Tensor:
        """Steps or gradients (F, m, d) of the vectors before as those of the merged ones."""
        return self.into.to(values.dtype) @ values


def merging(packed: PackedNetwork, most: float) -> Merging:
    """Merge every neuron into the heaviest one that it is close to.

    Args:
        packed: the network.
        most: pq/(p + q) |u - w|^2 of a neuron and the one that it goes into at most, over the norm of the network
            divided by its neurons. What all of them change adds up.
    """
    norm = packed.vectors.norm(dim=-1) * (packed.signs != 0)
    signs, weight = packed.signs * (norm > 0), norm.square()
    order = weight.argsort(dim=1, descending=True, stable=True)
    unit = packed.vectors / norm.clamp_min(torch.finfo(norm.dtype).tiny).unsqueeze(-1)
    unit, sign, alpha = _taken(unit, order), signs.gather(1, order), weight.gather(1, order)
    width = alpha.shape[1]
    apart = (2 - 2 * unit @ unit.mT).clamp_min(0)
    pair = alpha.unsqueeze(1) * alpha.unsqueeze(2)
    both = (alpha.unsqueeze(1) + alpha.unsqueeze(2)).clamp_min(torch.finfo(norm.dtype).tiny)
    limit = most * weight.sum() / (signs != 0).sum().clamp_min(1)
    close = (pair / both * apart <= limit) & (apart <= _MOST_APART)
    close &= (sign.unsqueeze(1) == sign.unsqueeze(2)) & (sign != 0).unsqueeze(1)
    own = torch.arange(width, device=norm.device)
    leader = own.expand_as(order).clone()
    for j in range(width - 1):
        # Those after j that still stand for themselves follow it, if it stands for itself.
        follows = close[:, j] & (leader == own) & (own > j) & (leader[:, j : j + 1] == j)
        leader = torch.where(follows, j, leader)
    # Back to the places of the network. Products, because sums by index differ between GPUs that must agree.
    place = order.gather(1, torch.empty_like(order).scatter_(1, order, leader))
    member = (place.unsqueeze(1) == own.unsqueeze(1)).to(norm.dtype)
    total = (member @ weight.unsqueeze(-1)).squeeze(-1)
    mean = member @ (packed.vectors * norm.unsqueeze(-1))
    mean = mean / mean.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(norm.dtype).tiny)
    stays = place == own
    vectors = torch.where(stays & (signs != 0), total, 0.0).sqrt().unsqueeze(-1) * mean
    share = norm.unsqueeze(1) / total.sqrt().clamp_min(torch.finfo(norm.dtype).tiny).unsqueeze(-1)
    return Merging(member * share, vectors, signs * stays, int((~stays).sum()))


def _taken(values: Tensor, order: Tensor) -> Tensor:
    return values.gather(1, order.unsqueeze(-1).expand_as(values))
