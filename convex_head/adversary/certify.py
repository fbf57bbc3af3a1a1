"""Exact robustness of a fixed network: worst-case margins, worst-case points, distances to the decision boundary.

The margin of class y against class k is one signed quadratic form (adversary/margins.py). The smallest over k of the
exact pairwise worst cases is the exact worst case of min_k, and the smallest of the pairwise distances is the exact
distance, because minima commute. Everything runs in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from convex_head.adversary.boundary import distance_to_zero
from convex_head.adversary.margins import PackedNetwork
from convex_head.adversary.scan import GroupPass, MarginScan
from convex_head.problems.base import Network


class RobustGeometry:
    """Robustness queries of one network.

    Args:
        network: f_1..f_C, or the single f of a binary network (margin f for label 1, -f for label 0).
        num_classes: C.
        coefficients: (a, b, c) of the activation.
    """

    def __init__(self, network: Network, num_classes: int, coefficients: tuple[float, float, float]):
        self.num_classes, self.coefficients = num_classes, coefficients
        self.packed = PackedNetwork.pack(network, 1 if num_classes == 2 else num_classes)

    def worst_case_margin(self, x: Tensor, labels: Tensor, radius: float) -> Tensor:
        """Exact smallest margin of the label in each ball; x (n, d) -> (n,)."""
        order, scan = self._sorted(x, labels)
        out = x.new_empty(x.shape[0])
        for chunk, _, margins, _ in scan.passes(self.packed, scan.spectrum(self.packed), radius):
            out[order[chunk.rows]] = margins.amin(dim=1)
        return out

    def worst_case_point(self, x: Tensor, labels: Tensor, radius: float) -> Tensor:
        """A point of each ball that attains the smallest margin; (n, d)."""
        order, scan = self._sorted(x, labels)
        spec = scan.spectrum(self.packed)
        out = x.clone()
        for chunk, _, margins, steps in scan.passes(self.packed, spec, radius):
            rival = margins.argmin(dim=1)
            for group_pass, ehat in steps:
                group = group_pass.group
                chosen = rival[group.rows] == group.columns
                if group.mask is not None:
                    chosen &= group.mask
                block, position = chosen.nonzero(as_tuple=True)
                basis = spec.basis[group.forms]
                for g in block.unique().tolist():
                    here = position[block == g]
                    out[order[chunk.rows][group.rows[g, here]]] += ehat[g, here] @ basis[g].mT
        return out

    def distance_to_boundary(self, x: Tensor, labels: Tensor) -> Tensor:
        """Exact distance from each point to where its label stops winning; (n, d) -> (n,)."""
        order, scan = self._sorted(x, labels)
        out = x.new_full((x.shape[0],), torch.inf)
        for rows, distance in self._distances(scan):
            out[order[rows]] = torch.minimum(out[order[rows]], distance)
        return out

    def _distances(self, scan: MarginScan) -> Iterator[tuple[Tensor, Tensor]]:
        spec = scan.spectrum(self.packed)
        for chunk in scan.chunks:
            tau = scan.project(chunk, self.packed)
            for group in scan.groups(chunk, spec.nu.shape[1]):
                group_pass = GroupPass(group, spec, scan.forms, self.coefficients)
                value, gradient = group_pass.quadratic(group_pass.gather(tau))
                distance = distance_to_zero(group_pass.eigenvalues, gradient, value)
                for g, length in enumerate(group.length):
                    yield group.rows[g, :length] + chunk.rows.start, distance[g, :length]

    def _sorted(self, x: Tensor, labels: Tensor) -> tuple[Tensor, MarginScan]:
        order = torch.argsort(labels, stable=True)
        scan = MarginScan(
            x[order],
            labels[order],
            num_classes=self.num_classes,
            pairwise=True,
            coefficients=self.coefficients,
        )
        return order, scan
