"""Worst-case margins of polynomial networks: one trust-region subproblem an example and a class pair.

With v_j = sqrt|alpha_j| u_j and sigma_j = sign(alpha_j), a network is f_c(x) = sum_j sigma_j phi(v_j, x), where

    phi(v, x) = a (v'x)^2 + b |v| v'x + c |v|^2                                      (C^1 in v, v = 0 included)

A margin is a signed form h = f_p - f_q (or y f_p alone) and again a quadratic, with Hessian
2a V' diag(beta) V for the stacked neurons V (K x d) and their signs beta. All examples share it, so one QR of V'
and one K x K eigendecomposition a form serve the whole data set:

    V' = Q R,   2a R diag(beta) R' = Y diag(lambda) Y',   E = Q Y (d x k),   P = R'Y (K x k)

Then an example needs only its projections tau = V x: its gradient in the eigenbasis is (beta (2a tau + b nu)) P,
nu_j = |v_j|, a step e = E ehat moves the projections by P ehat, and no n x d temporary appears.

Rows are sorted by label, so that every (label, form) pair owns a contiguous block of rows; blocks are run in padded
groups when small and alone when large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_head.adversary.trust_region import minimise_over_ball
from convex_head.problems.base import Network

_GROUP_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class PackedNetwork:
    """A network as padded arrays: ``vectors`` (F, m, d) and ``signs`` (F, m) in {-1, 0, 1}."""

    vectors: Tensor
    signs: Tensor

    @staticmethod
    def pack(network: Network, num_functions: int) -> PackedNetwork:
        """Pad every function to the width of the widest."""
        counts = torch.bincount(network.function, minlength=num_functions)
        width = max(1, int(counts.max())) if network.size else 1
        d = network.directions.shape[1]
        vectors = network.directions.new_zeros(num_functions, width, d)
        signs = network.directions.new_zeros(num_functions, width)
        scaled = network.directions * network.weights.abs().sqrt().unsqueeze(1)
        for c in range(num_functions):
            rows = network.function == c
            vectors[c, : int(counts[c])] = scaled[rows]
            signs[c, : int(counts[c])] = network.weights[rows].sign()
        return PackedNetwork(vectors, signs)

    def unpack(self) -> Network:
        """The same network as unit directions and signed weights; zero neurons are dropped."""
        norm = self.vectors.norm(dim=-1)
        alive = (norm > 0) & (self.signs != 0)
        function = torch.arange(alive.shape[0], device=norm.device).unsqueeze(1).expand_as(alive)[alive]
        directions = self.vectors[alive] / norm[alive].unsqueeze(1)
        return Network(directions, (norm.square() * self.signs)[alive], function)

    def to(self, dtype: torch.dtype) -> PackedNetwork:
        """The same network in another precision."""
        return PackedNetwork(self.vectors.to(dtype), self.signs.to(dtype))


@dataclass(frozen=True)
class Forms:
    """The T quadratic forms whose signed values are margins: f_plus - f_minus, or f_plus alone."""

    plus: Tensor
    minus: Tensor | None

    @staticmethod
    def build(num_classes: int, pairwise: bool, device: torch.device) -> Forms:
        """One form a class pair p < q, one a class, or the single binary form."""
        if num_classes == 2:
            return Forms(torch.zeros(1, dtype=torch.int64, device=device), None)
        if not pairwise:
            return Forms(torch.arange(num_classes, device=device), None)
        p, q = torch.triu_indices(num_classes, num_classes, offset=1, device=device)
        return Forms(p, q)

    def gather(self, per_function: Tensor) -> Tensor:
        """Stack (F, m, ...) into (T, K, ...), K = m or 2m."""
        if self.minus is None:
            return per_function[self.plus]
        return torch.cat([per_function[self.plus], per_function[self.minus]], dim=1)

    def scatter(self, per_form: Tensor, out: Tensor) -> None:
        """Add (T, K, ...) to (F, m, ...), the transpose of :meth:`gather`."""
        m = out.shape[1]
        out.index_add_(0, self.plus, per_form[:, :m])
        if self.minus is not None:
            out.index_add_(0, self.minus, per_form[:, m:])


@dataclass(frozen=True)
class Spectrum:
    """Shared factors of all forms (module docstring), in the dtype of the bulk computation."""

    eigenvalues: Tensor  # (T, k)
    basis: Tensor  # (T, d, k)
    lift: Tensor  # (T, K, k)
    beta: Tensor  # (T, K)
    nu: Tensor  # (T, K)
    constant: Tensor  # (T,)


@dataclass(frozen=True)
class Group:
    """Blocks run together: block g holds rows start[g] : start[g] + length[g]; all tensors are (G,)."""

    start: Tensor
    length: Tensor
    form: Tensor
    sign: Tensor
    column: Tensor
    rows: Tensor  # (G, B), padded with the block's first row
    mask: Tensor  # (G, B)


def spectrum(packed: PackedNetwork, forms: Forms, coefficients: tuple[float, float, float], dtype: torch.dtype) -> Spectrum:
    """QR and eigendecomposition of every form, computed in float64 and handed over in ``dtype``."""
    a, _, c = coefficients
    vectors = packed.vectors.double()
    signs = packed.signs.double()
    stacked = forms.gather(vectors)
    beta = signs[forms.plus]
    if forms.minus is not None:
        beta = torch.cat([beta, -signs[forms.minus]], dim=1)
    q, r = torch.linalg.qr(stacked.mT)
    hessian = 2 * a * (r * beta.unsqueeze(1)) @ r.mT
    eigenvalues, y = torch.linalg.eigh(0.5 * (hessian + hessian.mT))
    nu = stacked.norm(dim=-1)
    constant = c * (beta * nu.square()).sum(-1)
    parts = (eigenvalues, q @ y, r.mT @ y, beta, nu, constant)
    return Spectrum(*(t.to(dtype) for t in parts))


def plan(label_counts: list[int], forms: Forms, pairwise: bool, width: int) -> list[Group]:
    """Blocks of a chunk whose rows are sorted by label, grouped to at most ``width``-wide padded batches.

    Args:
        label_counts: rows of the chunk with label 0, 1, ..., C-1.
        forms: the margin forms.
        pairwise: as in :class:`~convex_head.problems.losses.MarginLoss`.
        width: neurons of a form, to bound the size of a padded batch.
    """
    blocks = sorted(_blocks(label_counts, pairwise), key=lambda block: -block[1])
    groups: list[Group] = []
    device = forms.plus.device
    limit = max(1, _GROUP_ELEMENTS // max(1, width))
    while blocks:
        longest = blocks[0][1]
        count = max(1, min(len(blocks), limit // longest))
        members, blocks = blocks[:count], blocks[count:]
        start, length, form, sign, column = (
            torch.tensor(values, device=device) for values in zip(*members, strict=True)
        )
        offset = torch.arange(longest, device=device)
        mask = offset < length.unsqueeze(1)
        rows = start.unsqueeze(1) + torch.where(mask, offset, 0)
        groups.append(Group(start, length, form, sign, column, rows, mask))
    return groups


def _blocks(counts: list[int], pairwise: bool) -> Iterator[tuple[int, int, int, float, int]]:
    """(start, length, form, sign, column) of every block with rows."""
    num_classes = len(counts)
    starts = [sum(counts[:c]) for c in range(num_classes)]
    total = sum(counts)
    if num_classes == 2:
        candidates = [(0, counts[0], 0, -1.0, 0), (counts[0], counts[1], 0, 1.0, 0)]
    elif pairwise:
        candidates = []
        for y in range(num_classes):
            for k in range(num_classes):
                if k != y:
                    form = pair_index(min(y, k), max(y, k), num_classes)
                    candidates.append((starts[y], counts[y], form, 1.0 if y < k else -1.0, k - (k > y)))
    else:
        candidates = []
        for c in range(num_classes):
            end = starts[c] + counts[c]
            candidates += [(starts[c], counts[c], c, 1.0, c), (0, starts[c], c, -1.0, c), (end, total - end, c, -1.0, c)]
    yield from (block for block in candidates if block[1] > 0)


def pair_index(p: int, q: int, num_classes: int) -> int:
    """Row-major position of the pair p < q among all pairs."""
    return p * num_classes - p * (p + 1) // 2 + q - p - 1


class GroupPass:
    """Margins of one group and what their gradient needs."""

    def __init__(self, group: Group, spec: Spectrum, forms: Forms, coefficients: tuple[float, float, float]):
        self.group, self.forms = group, forms
        self.a, self.b, self.c = coefficients
        self.lift = spec.lift[group.form]
        self.eigenvalues = spec.eigenvalues[group.form] * group.sign.to(spec.nu.dtype).unsqueeze(1)
        self.nu = spec.nu[group.form].unsqueeze(1)
        sign = group.sign.to(spec.nu.dtype).view(-1, 1, 1)
        self.beta = spec.beta[group.form].unsqueeze(1) * sign
        self.constant = spec.constant[group.form].unsqueeze(1) * sign[..., 0]

    def gather(self, tau: Tensor) -> Tensor:
        """Projections (rows, F, m) -> (G, B, K)."""
        group, forms = self.group, self.forms
        if len(group.start) == 1:
            s, n, t = int(group.start[0]), int(group.length[0]), int(group.form[0])
            part = tau[s : s + n, int(forms.plus[t])]
            if forms.minus is not None:
                part = torch.cat([part, tau[s : s + n, int(forms.minus[t])]], dim=-1)
            return part.unsqueeze(0)
        part = tau[group.rows, forms.plus[group.form].unsqueeze(1)]
        if forms.minus is None:
            return part
        return torch.cat([part, tau[group.rows, forms.minus[group.form].unsqueeze(1)]], dim=-1)

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """Add (G, B, K), zero where padded, to (rows, F, m)."""
        group, forms = self.group, self.forms
        m = out.shape[-1]
        functions = [forms.plus] if forms.minus is None else [forms.plus, forms.minus]
        for i, function in enumerate(functions):
            part = values[..., i * m : (i + 1) * m]
            if len(group.start) == 1:
                s, n = int(group.start[0]), int(group.length[0])
                out[s : s + n, int(function[int(group.form[0])])] += part[0]
            else:
                flat = group.rows * out.shape[1] + function[group.form].unsqueeze(1)
                out.view(-1, m).index_add_(0, flat.view(-1), part.reshape(-1, m))

    def quadratic(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Value at the centre (G, B) and gradient in the eigenbasis (G, B, k)."""
        slope = (2 * self.a * tau + self.b * self.nu) * self.beta
        value = 0.5 * (tau * (slope + self.b * self.nu * self.beta)).sum(-1) + self.constant
        return value, slope @ self.lift

    def worst_case(self, tau: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """Worst-case margins (G, B) and the steps ehat (G, B, k) that reach them."""
        value, gradient = self.quadratic(tau)
        best = minimise_over_ball(self.eigenvalues, gradient, radius)
        return value + best.value, best.minimiser
