"""One pass over the data: every example's worst-case margins against every class, chunk by chunk.

Each function's value and gradient norm at an example bound its margins from below,

    w_yk >= f_y - f_k - r (|grad f_y| + |grad f_k|) + r^2 min(lambda_min, 0) / 2,

at a cost of n C m. Margins whose bound already passes a threshold (1 for the hinge: no loss, no slope) need nothing
more; the others are solved exactly, those of one label and class together because they share a form, in padded
groups that fit the cache. Projections tau = V x are one matrix product a chunk; the rest lives in the span of the
neurons.

On a GPU all margins are solved, in groups that are made once for a data set, unless forms are many: there arithmetic is
cheap, and to learn which margins are needed the device would have to be waited for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_head.adversary.margins import Forms, PackedNetwork, Spectra
from convex_head.adversary.trust_region import minimise_blurred, minimise_over_ball
from convex_head.rows import Chunk, Rows

# A margin from here on costs nothing under any loss (problems/losses.py).
SATISFIED = 1.0
_GROUP_ELEMENTS = 1 << 16
# On a GPU, where a group costs its launches; where forms are many, each has factors as well.
_GPU_GROUP_ELEMENTS, _GPU_GROUP_OF_MANY = 1 << 26, 1 << 20
# Dense blocks shorter than this share of their group's longest form another.
_EVEN = 0.5
# Margins of all rows, at most, whose dense groups are kept.
_KEPT = 1 << 24


@dataclass(frozen=True)
class Group:
    """G blocks run together; a block is one label against one class (or one signed function).

    Attributes:
        forms: (G,) form of each block.
        signs: (G,) +-1, the margin is sign * form.
        columns: (G, 1) column of the margin matrix.
        rows: (G, B) rows of the chunk, padded with a row of the block.
        mask: (G, B), False where padded; None where nothing is.
    """

    forms: Tensor
    signs: Tensor
    columns: Tensor
    rows: Tensor
    mask: Tensor | None

    def real(self) -> Tensor:
        """(G, B) True where not padded."""
        return torch.ones_like(self.rows, dtype=torch.bool) if self.mask is None else self.mask


@dataclass(frozen=True)
class Step:
    """Worst cases of one group: projections tau (G, B, K) of the centres, steps ehat (G, B, k) and, with blur, the
    spread (G, B, k) around them."""

    group_pass: GroupPass
    tau: Tensor
    ehat: Tensor
    spread: Tensor | None


class MarginScan:
    """Worst-case margins of packed networks on fixed data.

    Args:
        rows: features in the dtype of the bulk computation, and labels.
        num_classes: C.
        pairwise: margins f_y - f_k if True, y_c f_c otherwise; ignored for C = 2.
        coefficients: (a, b, c) of the activation.
    """

    def __init__(self, rows: Rows, *, num_classes: int, pairwise: bool, coefficients: tuple[float, float, float]):
        self.rows = rows
        self.num_classes, self.coefficients = num_classes, coefficients
        self.pairwise = pairwise and num_classes > 2
        self.num_functions = 1 if num_classes == 2 else num_classes
        self.num_margins = 1 if num_classes == 2 else num_classes - int(self.pairwise)
        self.forms = Forms.build(num_classes, self.pairwise, rows.device)
        self.table_form, self.table_sign, self.rival = self._tables()
        on_gpu = rows.device.type != "cpu"
        self.is_dense = on_gpu and not self.forms.are_many()
        self._elements = _GPU_GROUP_OF_MANY if on_gpu else _GROUP_ELEMENTS
        self._kept: dict[int, tuple[int, list[Group]]] = {}

    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Form, sign and opposing function of every (column, label); (K, C) each."""
        device, classes = self.rows.device, self.num_classes
        label = torch.arange(classes, device=device)
        column = torch.arange(self.num_margins, device=device).unsqueeze(1)
        if not self.pairwise:
            function = column.expand(-1, classes)
            positive = label.unsqueeze(0) == (1 if classes == 2 else column)
            return function, torch.where(positive, 1.0, -1.0), function
        rival = column + (column >= label)
        low, high = torch.minimum(rival, label), torch.maximum(rival, label)
        form = low * classes - low * (low + 1) // 2 + high - low - 1
        return form, torch.where(label < rival, 1.0, -1.0), rival

    def spectra(self, packed: PackedNetwork) -> Spectra:
        """Factors of the forms of a network, in the bulk dtype."""
        return Spectra(packed, self.forms, self.coefficients, self.rows.dtype)

    def project(self, chunk: Chunk, packed: PackedNetwork) -> Tensor:
        """tau = V x for the rows of a chunk; (rows, F, m)."""
        functions, m, d = packed.vectors.shape
        flat = packed.vectors.reshape(functions * m, d).to(self.rows.dtype)
        return (chunk.x @ flat.mT).view(-1, functions, m)

    def passes(
        self,
        spectra: Spectra,
        radius: float,
        threshold: float = math.inf,
        blur: float = 0.0,
        window: float = math.inf,
    ) -> Iterator[tuple[Chunk, Tensor, Tensor, list[Step]]]:
        """Chunk by chunk: rows, projections, margins (rows, K), and the exact steps group by group.

        Margins are exact (with blur: exactly blurred) where they are below ``threshold`` and within ``window`` of the
        smallest of their row; the others are lower bounds that are not below either.
        """
        slack = blur * radius * self.rows.d**0.5
        for chunk in self.rows:
            tau = self.project(chunk, spectra.packed)
            if self.is_dense:
                margins = torch.empty(len(chunk.x), self.num_margins, dtype=tau.dtype, device=tau.device)
                yield chunk, tau, margins, self.solve(chunk, None, tau, spectra, radius, margins, blur)
                continue
            margins = self.lower_bounds(chunk, tau, spectra, radius)
            needed = margins < threshold + slack
            common = (tau, spectra, radius, margins, blur)
            if math.isinf(window) or self.num_margins == 1:
                yield chunk, tau, margins, self.solve(chunk, needed, *common)
                continue
            lowest = margins.argmin(1, keepdim=True)
            first = torch.zeros_like(needed).scatter_(1, lowest, True) & needed
            steps = self.solve(chunk, first, *common)
            others = needed & ~first & (margins < margins.gather(1, lowest) + (window + slack))
            yield chunk, tau, margins, steps + self.solve(chunk, others, *common)

    def solve(
        self,
        chunk: Chunk,
        needed: Tensor | None,
        tau: Tensor,
        spectra: Spectra,
        radius: float,
        margins: Tensor,
        blur: float = 0.0,
    ) -> list[Step]:
        """Write the exact worst cases of the needed (rows, K) entries, None for all, into ``margins``; return steps."""
        steps = []
        width = spectra.width
        groups = self._all_groups(chunk, width) if needed is None else self.groups(chunk, needed, width, self._elements)
        for group in groups:
            group_pass = GroupPass(group, spectra)
            centre = group_pass.gather(tau)
            value, gradient = group_pass.quadratic(centre)
            if blur > 0 and radius > 0:
                best = minimise_blurred(group_pass.eigenvalues, gradient, radius, blur, self.rows.d)
            else:
                best = minimise_over_ball(group_pass.eigenvalues, gradient, radius)
            group_pass.store(value + best.value, margins)
            steps.append(Step(group_pass, centre, best.minimiser, best.spread))
        return steps

    def lower_bounds(self, chunk: Chunk, tau: Tensor, spectra: Spectra, radius: float) -> Tensor:
        """Lower bounds (rows, K) of all worst-case margins of a chunk (module docstring)."""
        margin, slope, curvature = self.centre(chunk, tau, spectra)
        return margin - radius * slope + 0.5 * radius**2 * curvature

    def centre(self, chunk: Chunk, tau: Tensor, spectra: Spectra) -> tuple[Tensor, Tensor, Tensor]:
        """Margins at the examples, upper bounds of their gradient norms, smallest curvatures (<= 0); (rows, K) each."""
        value, norm = spectra.screen().values(tau)
        low, high = spectra.curvatures()
        labels = chunk.labels
        form, sign, rival = (table[:, labels].T for table in (self.table_form, self.table_sign, self.rival))
        curvature = torch.where(sign > 0, low[form], -high[form])
        if not self.pairwise:
            return sign.to(value.dtype) * value, norm, curvature
        label = labels.unsqueeze(1)
        return (
            value.gather(1, label) - value.gather(1, rival),
            norm.gather(1, label) + norm.gather(1, rival),
            curvature,
        )

    def _all_groups(self, chunk: Chunk, width: int) -> list[Group]:
        """The groups of all entries; where they are few enough they are kept until their width changes."""
        kept = self._kept.get(chunk.rows.start)
        if kept is None or kept[0] != width:
            whole = torch.ones(len(chunk.x), self.num_margins, dtype=torch.bool, device=chunk.x.device)
            kept = width, list(self.groups(chunk, whole, width, _GPU_GROUP_ELEMENTS, _EVEN))
            if not self.rows.stream and self.rows.n * self.num_margins <= _KEPT:
                self._kept[chunk.rows.start] = kept
        return kept[1]

    def groups(
        self, chunk: Chunk, needed: Tensor, width: int, elements: int = _GROUP_ELEMENTS, even: float = 0.0
    ) -> Iterator[Group]:
        """Blocks of the needed (row, column) entries, longest first, in groups of bounded padded size.

        Args:
            chunk: the rows.
            needed: (rows, K).
            width: numbers of an entry.
            elements: numbers of a group, at most, where it has several blocks.
            even: blocks shorter than this share of a group's longest begin another group.
        """
        classes = self.num_classes
        column, row = needed.T.nonzero(as_tuple=True)
        if len(row) == 0:
            return
        key = column * classes + chunk.labels[row]
        order = torch.argsort(key, stable=True)
        row = row[order]
        counts = torch.bincount(key, minlength=self.num_margins * classes)
        first = counts.cumsum(0) - counts
        by_length = torch.argsort(counts, descending=True, stable=True)
        lengths = counts[by_length].tolist()
        limit = max(1, elements // max(1, width))
        position = 0
        while position < len(lengths) and lengths[position] > 0:
            longest = lengths[position]
            size = max(1, limit // longest)
            block = by_length[position : position + size]
            block = block[: sum(length > even * longest for length in lengths[position : position + size])]
            offset = torch.arange(longest, device=row.device)
            mask = offset < counts[block].unsqueeze(1)
            rows = row[first[block].unsqueeze(1) + torch.where(mask, offset, 0)]
            padded = lengths[position + len(block) - 1] < longest
            columns = block // classes
            entry = (columns, block % classes)
            yield Group(
                self.table_form[entry],
                self.table_sign[entry],
                columns.unsqueeze(1),
                rows,
                mask if padded else None,
            )
            position += len(block)


class GroupPass:
    """Margins of one group for one network, and what their gradient needs."""

    def __init__(self, group: Group, spectra: Spectra):
        self.group = group
        self.a, self.b, self.c = spectra.coefficients
        own = spectra.forms.take(group.forms)
        self.functions = [f.unsqueeze(1) for f in (own.plus, own.minus) if f is not None]
        spec = spectra.take(group.forms)
        sign = group.signs.to(spec.nu.dtype).unsqueeze(1)
        self.lift, self._combination, self._spectra = spec.lift, spec.combination, spectra
        self.eigenvalues = spec.eigenvalues * sign
        self.nu = spec.nu.unsqueeze(1)
        self.beta = spec.beta.unsqueeze(1) * sign.unsqueeze(1)
        self.constant = spec.constant.unsqueeze(1) * sign

    def basis(self) -> Tensor:
        """E (G, d, k), orthonormal, in the bulk dtype: steps are E ehat."""
        return self._spectra.basis(self.group.forms, self._combination).to(self.lift.dtype)

    def combine(self, in_basis: Tensor) -> Tensor:
        """Coefficients Z in_basis (G, K, K) of the neurons, float64, for E in_basis; in_basis (G, k, K)."""
        return self._combination @ in_basis.double()

    def gather(self, tau: Tensor) -> Tensor:
        """Projections (rows, F, m) -> (G, B, K)."""
        flat = tau.view(-1, tau.shape[-1])
        rows = [self.group.rows * tau.shape[1] + function for function in self.functions]
        parts = [flat.index_select(0, r.view(-1)).view(*r.shape, -1) for r in rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """Add (G, B, K), zero where padded, to (rows, F, m)."""
        m = out.shape[-1]
        flat = out.view(-1, m)
        for i, function in enumerate(self.functions):
            rows = self.group.rows * out.shape[1] + function
            flat.index_add_(0, rows.view(-1), values[..., i * m : (i + 1) * m].reshape(-1, m))

    def store(self, values: Tensor, margins: Tensor) -> None:
        """Write (G, B) into the (rows, K) matrix of margins; what pads is written as the row that it repeats."""
        group = self.group
        if group.mask is not None:
            values = torch.where(group.mask, values, values[:, :1])
        margins[group.rows, group.columns.expand_as(group.rows)] = values

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

    def derivatives(self, step: Step) -> Tensor:
        """(G, B, K) derivatives of the margins in the projections of the worst points."""
        at_worst = torch.baddbmm(step.tau, step.ehat, self.lift.mT)
        return self.beta * torch.add(self.b * self.nu, at_worst, alpha=2 * self.a)

    def backward(self, step: Step, omega: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of sum omega * margin at the worst points (Danskin), split by where it goes.

        Args:
            step: the worst cases of this group.
            omega: (G, B) weights, zero where padded.

        Returns:
            Coefficients (G, B, K) of the points x + e in d/dv_j, those of the steps alone summed over the batch in the
            eigenbasis (G, k, K), and those of v_j itself (G, K), which come from |v_j|.
        """
        at_worst = torch.baddbmm(step.tau, step.ehat, self.lift.mT)
        signed = omega.unsqueeze(-1) * self.beta
        coefficient = signed * torch.add(self.b * self.nu, at_worst, alpha=2 * self.a)
        in_basis = step.ehat.mT @ coefficient
        if step.spread is not None:
            weight = (omega.unsqueeze(1) @ step.spread).mT
            in_basis += 2 * self.a * weight * (self.lift * self.beta.mT).mT
        tiny = torch.finfo(at_worst.dtype).tiny ** 0.5
        own = self.b * (signed * at_worst).sum(1) / self.nu.squeeze(1).clamp_min(tiny) + 2 * self.c * signed.sum(1)
        return coefficient, in_basis, own
