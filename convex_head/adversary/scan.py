"""One pass over the data: every example's worst-case margins against every class, chunk by chunk.

Rows are sorted by label, so that each (label, form) pair owns a contiguous block of rows. Small blocks are run in
padded groups, large ones alone, so that the work fits the cache and the number of tensor operations stays small
whatever the number of classes. Projections tau = V x are one matrix product a chunk; everything after it lives in the
span of the neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_head.adversary.margins import Forms, PackedNetwork, Spectrum, spectrum
from convex_head.adversary.trust_region import minimise_over_ball

_GROUP_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Group:
    """Blocks run together: block g holds rows start[g] : start[g] + length[g] of the chunk; lists have length G.

    Attributes:
        start, length: rows of each block.
        forms: (G,) form of each block.
        signs: (G,) +-1, the margin is sign * form.
        columns: (G, 1) column of the margin matrix.
        rows: (G, B), padded with the block's first row.
        mask: (G, B), False where padded; None where nothing is.
    """

    start: list[int]
    length: list[int]
    forms: Tensor
    signs: Tensor
    columns: Tensor
    rows: Tensor
    mask: Tensor | None

    @property
    def alone(self) -> bool:
        """One block, addressed by slices instead of index tensors."""
        return len(self.start) == 1


@dataclass(frozen=True)
class Chunk:
    """Consecutive sorted rows and how many of them carry each label."""

    rows: slice
    counts: tuple[int, ...]


class MarginScan:
    """Worst-case margins of packed networks on fixed data.

    Args:
        x: (n, d) features sorted by label, in the dtype of the bulk computation.
        labels: (n,) the sorted labels.
        num_classes: C.
        pairwise: margins f_y - f_k if True, y_c f_c otherwise; ignored for C = 2.
        coefficients: (a, b, c) of the activation.
        chunk_rows: rows processed together.
    """

    def __init__(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        pairwise: bool,
        coefficients: tuple[float, float, float],
        chunk_rows: int = 8192,
    ):
        self.x, self.num_classes, self.coefficients = x, num_classes, coefficients
        self.pairwise = pairwise and num_classes > 2
        self.num_functions = 1 if num_classes == 2 else num_classes
        self.num_margins = 1 if num_classes == 2 else num_classes - int(self.pairwise)
        self.forms = Forms.build(num_classes, self.pairwise, x.device)
        self.chunks = []
        for start in range(0, x.shape[0], chunk_rows):
            rows = slice(start, min(start + chunk_rows, x.shape[0]))
            counts = torch.bincount(labels[rows], minlength=num_classes).tolist()
            self.chunks.append(Chunk(rows, tuple(counts)))
        self._plans: dict[tuple[tuple[int, ...], int], list[Group]] = {}

    def spectrum(self, packed: PackedNetwork) -> Spectrum:
        """Shared factors of all forms, in the bulk dtype."""
        return spectrum(packed, self.forms, self.coefficients, self.x.dtype)

    def project(self, chunk: Chunk, packed: PackedNetwork) -> Tensor:
        """tau = V x for the rows of a chunk; (rows, F, m)."""
        functions, m, d = packed.vectors.shape
        flat = packed.vectors.reshape(functions * m, d).to(self.x.dtype)
        return (self.x[chunk.rows] @ flat.mT).view(-1, functions, m)

    def groups(self, chunk: Chunk, width: int) -> list[Group]:
        """The blocks of a chunk for forms of ``width`` neurons, grouped; cached."""
        key = (chunk.counts, width)
        if key not in self._plans:
            if len(self._plans) > 4 * len(self.chunks) + 64:
                self._plans.clear()
            self._plans[key] = _plan(chunk.counts, self.pairwise, width, self.x.device)
        return self._plans[key]

    def passes(
        self, packed: PackedNetwork, spec: Spectrum, radius: float
    ) -> Iterator[tuple[Chunk, Tensor, Tensor, list[tuple[GroupPass, Tensor]]]]:
        """Chunk by chunk: projections, worst-case margins (rows, K) and, a group, the steps that reach them."""
        for chunk in self.chunks:
            tau = self.project(chunk, packed)
            margins = tau.new_empty(tau.shape[0], self.num_margins)
            steps = []
            for group in self.groups(chunk, spec.nu.shape[1]):
                group_pass = GroupPass(group, spec, self.forms, self.coefficients)
                value, ehat = group_pass.worst_case(group_pass.gather(tau), radius)
                group_pass.store(value, margins)
                steps.append((group_pass, ehat))
            yield chunk, tau, margins, steps


class GroupPass:
    """Margins of one group for one network, and what their gradient needs."""

    def __init__(self, group: Group, spec: Spectrum, forms: Forms, coefficients: tuple[float, float, float]):
        self.group, self.forms = group, forms
        self.a, self.b, self.c = coefficients
        sign = group.signs.to(spec.nu.dtype).unsqueeze(1)
        self.lift = spec.lift[group.forms]
        self.eigenvalues = spec.eigenvalues[group.forms] * sign
        self.nu = spec.nu[group.forms].unsqueeze(1)
        self.beta = spec.beta[group.forms].unsqueeze(1) * sign.unsqueeze(1)
        self.constant = spec.constant[group.forms].unsqueeze(1) * sign

    def _functions(self) -> list[Tensor]:
        forms = self.forms
        return [f[self.group.forms] for f in (forms.plus, forms.minus) if f is not None]

    def gather(self, tau: Tensor) -> Tensor:
        """Projections (rows, F, m) -> (G, B, K)."""
        group = self.group
        if group.alone:
            rows = slice(group.start[0], group.start[0] + group.length[0])
            return torch.cat([tau[rows, int(f)] for f in self._functions()], dim=-1).unsqueeze(0)
        return torch.cat([tau[group.rows, f.unsqueeze(1)] for f in self._functions()], dim=-1)

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """Add (G, B, K), zero where padded, to (rows, F, m)."""
        group, m = self.group, out.shape[-1]
        for i, function in enumerate(self._functions()):
            part = values[..., i * m : (i + 1) * m]
            if group.alone:
                out[group.start[0] : group.start[0] + group.length[0], int(function)] += part[0]
            else:
                flat = group.rows * out.shape[1] + function.unsqueeze(1)
                out.view(-1, m).index_add_(0, flat.view(-1), part.reshape(-1, m))

    def store(self, values: Tensor, margins: Tensor) -> None:
        """Write (G, B) into the (rows, K) matrix of margins."""
        group = self.group
        if group.alone:
            margins[group.start[0] : group.start[0] + group.length[0], int(group.columns[0, 0])] = values[0]
            return
        rows, columns = group.rows, group.columns.expand_as(group.rows)
        if group.mask is not None:
            rows, columns, values = rows[group.mask], columns[group.mask], values[group.mask]
        margins[rows, columns] = values

    def load(self, matrix: Tensor) -> Tensor:
        """Read (G, B) from a (rows, K) matrix, zero where padded."""
        group = self.group
        values = matrix[group.rows, group.columns]
        return values if group.mask is None else values * group.mask

    def quadratic(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Value at the centre (G, B) and gradient in the eigenbasis (G, B, k)."""
        linear = self.b * self.nu * self.beta
        slope = torch.addcmul(linear, tau, 2 * self.a * self.beta)
        value = 0.5 * (tau * (slope + linear)).sum(-1) + self.constant
        return value, slope @ self.lift

    def worst_case(self, tau: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """Worst-case margins (G, B) and the steps ehat (G, B, k) that reach them."""
        value, gradient = self.quadratic(tau)
        best = minimise_over_ball(self.eigenvalues, gradient, radius)
        return value + best.value, best.minimiser

    def backward(self, tau: Tensor, ehat: Tensor, omega: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of sum omega * margin at the worst points (Danskin), split by where it goes.

        Args:
            tau: (G, B, K) projections of the centres.
            ehat: (G, B, k) worst-case steps.
            omega: (G, B) weights, zero where padded.

        Returns:
            Coefficients (G, B, K) of the points x + e in d/dv_j, those of the steps alone summed over the batch in the
            eigenbasis (G, k, K), and those of v_j itself (G, K), which come from |v_j|.
        """
        at_worst = torch.baddbmm(tau, ehat, self.lift.mT)
        signed = omega.unsqueeze(-1) * self.beta
        coefficient = signed * torch.add(self.b * self.nu, at_worst, alpha=2 * self.a)
        tiny = torch.finfo(tau.dtype).tiny ** 0.5
        own = self.b * (signed * at_worst).sum(1) / self.nu.squeeze(1).clamp_min(tiny) + 2 * self.c * signed.sum(1)
        return coefficient, ehat.mT @ coefficient, own


def _plan(counts: tuple[int, ...], pairwise: bool, width: int, device: torch.device) -> list[Group]:
    blocks = sorted(_blocks(counts, pairwise), key=lambda block: -block[1])
    groups: list[Group] = []
    limit = max(1, _GROUP_ELEMENTS // max(1, width))
    while blocks:
        longest = blocks[0][1]
        count = max(1, min(len(blocks), limit // longest))
        members, blocks = blocks[:count], blocks[count:]
        start, length, form, sign, column = (list(values) for values in zip(*members, strict=True))
        offset = torch.arange(longest, device=device)
        mask = offset < torch.tensor(length, device=device).unsqueeze(1)
        rows = torch.tensor(start, device=device).unsqueeze(1) + torch.where(mask, offset, 0)
        groups.append(
            Group(
                start,
                length,
                torch.tensor(form, device=device),
                torch.tensor(sign, device=device),
                torch.tensor(column, device=device).unsqueeze(1),
                rows,
                None if bool(mask.all()) else mask,
            )
        )
    return groups


def _blocks(counts: tuple[int, ...], pairwise: bool) -> Iterator[tuple[int, int, int, float, int]]:
    """(start, length, form, sign, column) of every block that has rows."""
    classes = len(counts)
    starts = [sum(counts[:c]) for c in range(classes)]
    total = sum(counts)
    blocks: list[tuple[int, int, int, float, int]] = []
    if classes == 2:
        blocks = [(0, counts[0], 0, -1.0, 0), (counts[0], counts[1], 0, 1.0, 0)]
    elif pairwise:
        for y in range(classes):
            for k in range(classes):
                if k != y and counts[y]:
                    form = _pair_index(min(y, k), max(y, k), classes)
                    blocks.append((starts[y], counts[y], form, 1.0 if y < k else -1.0, k - (k > y)))
    else:
        for c in range(classes):
            end = starts[c] + counts[c]
            blocks.append((starts[c], counts[c], c, 1.0, c))
            blocks.append((0, starts[c], c, -1.0, c))
            blocks.append((end, total - end, c, -1.0, c))
    yield from (block for block in blocks if block[1] > 0)


def _pair_index(p: int, q: int, classes: int) -> int:
    """Row-major position of the pair p < q among all pairs."""
    return p * classes - p * (p + 1) // 2 + q - p - 1
