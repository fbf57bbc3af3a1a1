"""Exact robustness of a fixed network: worst-case margins, worst-case points, distances to the decision boundary.

The margin of class y against class k is one signed quadratic form (adversary/margins.py). The smallest over k of the
exact pairwise worst cases is the exact worst case of min_k, and the smallest of the pairwise distances is the exact
distance, because minima commute. Everything runs in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convex_head.adversary.boundary import distance_to_zero, lower_bound
from convex_head.adversary.margins import Forms, PackedNetwork, Spectra
from convex_head.adversary.scan import GroupPass, MarginScan, Step
from convex_head.problems.base import Network
from convex_head.rows import Chunk, Rows


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
        forms = Forms.build(num_classes, num_classes > 2, self.packed.signs.device)
        self._spectra = Spectra(self.packed, forms, coefficients, torch.float64)

    def worst_case_margin(self, x: Tensor, labels: Tensor, radius: float) -> Tensor:
        """Exact smallest margin of the label in each ball; x (n, d) -> (n,)."""
        scan = self._scan(x, labels)
        out = x.new_empty(x.shape[0])
        for chunk in scan.rows:
            margins, _ = self._worst(scan, chunk, radius)
            out[scan.rows.order[chunk.rows]] = margins.amin(dim=1)
        return out

    def worst_case_point(self, x: Tensor, labels: Tensor, radius: float) -> Tensor:
        """A point of each ball that attains the smallest margin; (n, d)."""
        scan = self._scan(x, labels)
        out = x.clone()
        for chunk in scan.rows:
            order = scan.rows.order[chunk.rows]
            margins, steps = self._worst(scan, chunk, radius)
            rival = margins.argmin(dim=1)
            for step in steps:
                group = step.group_pass.group
                chosen = (rival[group.rows] == group.columns) & group.real()
                block, position = chosen.nonzero(as_tuple=True)
                bases = step.group_pass.basis()
                for g in block.unique().tolist():
                    here = position[block == g]
                    out[order[group.rows[g, here]]] += step.ehat[g, here] @ bases[g].mT
        return out

    def _worst(self, scan: MarginScan, chunk: Chunk, radius: float) -> tuple[Tensor, list[Step]]:
        """Exact margins (rows, K) wherever they can be the smallest, inf elsewhere, and the steps behind them.

        The class with the lowest closed-form bound is solved first, then those whose bound is below what was found.
        """
        tau = scan.project(chunk, self.packed)
        bound = scan.lower_bounds(chunk, tau, self._spectra, radius)
        margins = torch.full_like(bound, torch.inf)
        first = torch.zeros_like(bound, dtype=torch.bool).scatter_(1, bound.argmin(1, keepdim=True), True)
        steps = scan.solve(chunk, first, tau, self._spectra, radius, margins)
        others = (bound < margins.amin(1, keepdim=True)) & ~first
        return margins, steps + scan.solve(chunk, others, tau, self._spectra, radius, margins)

    def distance_to_boundary(self, x: Tensor, labels: Tensor) -> Tensor:
        """Exact distance from each point to where its label stops winning; (n, d) -> (n,).

        A closed-form lower bound of the distance to every class comes first. The class with the lowest bound is solved
        exactly, then only those whose bound is below what was found.
        """
        scan = self._scan(x, labels)
        out = x.new_empty(x.shape[0])
        for chunk in scan.rows:
            tau = scan.project(chunk, self.packed)
            margin, slope, curvature = scan.centre(chunk, tau, self._spectra)
            bound = lower_bound(curvature, slope, margin)
            distance = torch.full_like(bound, torch.inf)
            nearest = torch.zeros_like(bound, dtype=torch.bool).scatter_(1, bound.argmin(1, keepdim=True), True)
            self._solve_distances(scan, chunk, tau, nearest, distance)
            best = distance.amin(1, keepdim=True)
            self._solve_distances(scan, chunk, tau, (bound < best) & ~nearest, distance)
            out[scan.rows.order[chunk.rows]] = distance.amin(1)
        return out

    def _solve_distances(self, scan: MarginScan, chunk: Chunk, tau: Tensor, needed: Tensor, out: Tensor) -> None:
        """Fill the needed entries of out (rows, K) with exact pairwise distances."""
        for group in scan.groups(chunk, needed, self._spectra.width):
            group_pass = GroupPass(group, self._spectra)
            value, gradient = group_pass.quadratic(group_pass.gather(tau))
            group_pass.store(distance_to_zero(group_pass.eigenvalues, gradient, value), out)

    def _scan(self, x: Tensor, labels: Tensor) -> MarginScan:
        rows = Rows(x, labels)
        return MarginScan(rows, num_classes=self.num_classes, pairwise=True, coefficients=self.coefficients)
