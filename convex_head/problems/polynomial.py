"""Adversarial training of two-layer polynomial networks as one convex problem, for two or more classes.

    minimise  F(D) = (1/n) sum_i loss(w_i1, ..., w_iK) + reg * sum_j |alpha_j|                        (P)
    w_ik = min_{|e| <= radius} h_ik(x_i + e),   h a signed margin form (adversary/margins.py)

over all networks of unit neurons u_j with activation s(t) = a t^2 + b t + c. In D_c = sum_j alpha_j [u_j;1][u_j;1]'
this is convex: every w_ik is a minimum of functions linear in D, the losses decrease in w, and sum|alpha| is the
gauge tr-norm z4 + z4' of the set of networks (arXiv 2405.14033, section 3; neural decomposition: 2101.02429).

Lower bound. Take any slopes s_i in the loss's set S (problems/losses.py) and any points xh_ik in the balls. Since
loss(w) >= sum_k s_k (1 - w_k) and w_ik <= h_ik(xh_ik), for every network

    F >= mass - sum_c <A_c, D_c> + reg * sum|alpha|,   mass = (1/n) sum_ik s_ik,
    A_c = (1/n) sum_ik s_ik [sign of f_c in h_ik] M(xh_ik),   M(x) = [[a xx', b x/2], [b x'/2, c]]

and <A_c, D_c> = sum_j alpha_j [u_j;1]'A_c[u_j;1]. So if |[u;1]'A_c[u;1]| <= reg on the unit sphere, mass is a lower
bound of the optimum over networks of any width; otherwise s is scaled down to make it so. The sphere maximum is
one eigendecomposition and a scalar equation, and its Lagrangian value bounds it from above.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_head.adversary.margins import Forms, GroupPass, PackedNetwork, Spectrum, plan, spectrum
from convex_head.adversary.trust_region import minimise_over_sphere
from convex_head.problems.base import Network
from convex_head.problems.losses import get_loss


@dataclass(frozen=True)
class Evaluation:
    """Smoothed objective, its gradient in the packed vectors (F, m, d) and the hard objective at the same point."""

    smoothed: float
    hard: float
    gradient: Tensor


@dataclass(frozen=True)
class DualPoint:
    """Slopes and worst-case points summed up: ``mass`` (F or 1,) and moments A (F, d+1, d+1), float64."""

    mass: Tensor
    moments: Tensor

    def mix(self, other: DualPoint, share: float) -> DualPoint:
        """(1 - share) self + share other, again a dual point because S and the balls' hulls are convex."""
        return DualPoint(
            torch.lerp(self.mass, other.mass, share), torch.lerp(self.moments, other.moments, share)
        )


@dataclass(frozen=True)
class OracleAnswer:
    """Best neurons of each function and sign.

    Attributes:
        bounds: (F, 2) upper bounds of max_u [u;1]'A[u;1] and of max_u -[u;1]'A[u;1].
        directions: (F, 2, d) the maximisers.
        dual: lower bound of the optimum of (P) that follows.
    """

    bounds: Tensor
    directions: Tensor
    dual: float


@dataclass(frozen=True)
class _Chunk:
    rows: slice
    counts: list[int]


class PolynomialProblem:
    """(P) on given features; see the module docstring.

    Args:
        features: (n, d) float64, standardised if wanted; validated by the caller.
        labels: (n,) int64 in 0..num_classes-1.
        num_classes: C. For C = 2 there is one function, f, with y = +1 for label 1, and the loss is the hinge.
        radius: radius of the feature ball, >= 0.
        reg: regularisation weight, > 0.
        loss: name of a margin loss.
        coefficients: (a, b, c) of the activation, a > 0.
        dtype: precision of the bulk computation; sums and factorisations are float64.
        chunk_rows: rows processed together.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        radius: float,
        reg: float,
        loss: str = "crammer_singer",
        coefficients: tuple[float, float, float] = (0.09, 0.5, 0.47),
        dtype: torch.dtype = torch.float64,
        chunk_rows: int = 8192,
    ):
        self.num_classes, self.radius, self.reg = num_classes, float(radius), float(reg)
        self.loss, self.coefficients = loss, coefficients
        self.num_functions = 1 if num_classes == 2 else num_classes
        self.dtype = dtype
        self._loss = get_loss(loss)
        self._pairwise = self._loss.pairwise and num_classes > 2
        self._order = torch.argsort(labels, stable=True)
        self._labels = labels[self._order]
        self._x = features[self._order].to(dtype)
        self._forms = Forms.build(num_classes, self._pairwise, features.device)
        self._chunks = [
            _Chunk(slice(s, min(s + chunk_rows, self.n)), self._counts(s, s + chunk_rows))
            for s in range(0, self.n, chunk_rows)
        ]

    def _counts(self, start: int, stop: int) -> list[int]:
        return torch.bincount(self._labels[start:stop], minlength=self.num_classes).tolist()

    @property
    def n(self) -> int:
        """Number of examples."""
        return self._x.shape[0]

    @property
    def d(self) -> int:
        """Number of features."""
        return self._x.shape[1]

    @property
    def num_margins(self) -> int:
        """K: 1 (binary), C (one_vs_rest) or C - 1 (pairwise; classes other than y in increasing order)."""
        return 1 if self.num_classes == 2 else self.num_classes - int(self._pairwise)

    @property
    def features(self) -> Tensor:
        """(n, d) features in the given order, float64."""
        return self._unsort(self._x).double()

    @property
    def labels(self) -> Tensor:
        """(n,) labels in the given order."""
        return self._unsort(self._labels)

    def _unsort(self, values: Tensor) -> Tensor:
        out = torch.empty_like(values)
        out[self._order] = values
        return out

    def pack(self, network: Network) -> PackedNetwork:
        """Padded form of a network on this problem's functions."""
        return PackedNetwork.pack(network, self.num_functions)

    # -- primal ---------------------------------------------------------------------------------------------

    def objective(self, network: Network) -> float:
        """Exact robust objective F of a network."""
        packed = self.pack(network)
        total = sum(float(self._hard(margins).sum()) for _, margins, _ in self._passes(packed))
        return total / self.n + self.reg * float(network.norm)

    def worst_case(self, network: Network) -> tuple[Tensor, Tensor]:
        """Worst-case margins (n, K) and the points (n, K, d) that attain them, in the given order."""
        margins = torch.empty(self.n, self.num_margins, dtype=torch.float64, device=self._x.device)
        points = self._x.double().unsqueeze(1).repeat(1, self.num_margins, 1)
        packed = self.pack(network)
        spec = self._spectrum(packed)
        for chunk, chunk_margins, steps in self._passes(packed):
            margins[chunk.rows] = chunk_margins.double()
            for group_pass, ehat in steps:
                group = group_pass.group
                e = (ehat @ spec.basis[group.form].mT).double()
                rows = (group.rows + chunk.rows.start)[group.mask]
                columns = group.column.unsqueeze(1).expand_as(group.rows)[group.mask]
                points[rows, columns] += e[group.mask]
        return self._unsort(margins), self._unsort(points)

    def evaluate(self, packed: PackedNetwork, mu: float) -> Evaluation:
        """Smoothed objective (width mu), its gradient by Danskin's theorem, and the hard objective."""
        spec = self._spectrum(packed)
        gradient = (2 * self.reg * packed.vectors).to(self.dtype)
        forms_k = spec.nu.shape[1]
        cross = self._x.new_zeros(len(self._forms.plus), spec.basis.shape[2], forms_k)
        own = self._x.new_zeros(len(self._forms.plus), forms_k)
        smooth = hard = 0.0
        width = self.num_functions * packed.vectors.shape[1]
        for chunk, margins, steps in self._passes(packed, spec):
            value, slopes = self._loss.smoothed(margins, self.num_classes, mu)
            smooth += float(value.double().sum())
            hard += float(self._hard(margins).double().sum())
            weights = slopes / self.n
            projections = self._project(chunk, packed)
            coefficients = torch.zeros_like(projections)
            for group_pass, ehat in steps:
                self._backward(group_pass, ehat, weights, projections, coefficients, cross, own)
            gradient.view(width, -1).addmm_(coefficients.view(-1, width).mT, self._x[chunk.rows])
        per_form = (spec.basis @ cross).mT + own.unsqueeze(-1) * self._forms.gather(packed.vectors.to(self.dtype))
        self._forms.scatter(per_form, gradient)
        penalty = self.reg * float(packed.vectors.double().square().sum())
        return Evaluation(smooth / self.n + penalty, hard / self.n + penalty, gradient.to(packed.vectors.dtype))

    def _backward(
        self,
        group_pass: GroupPass,
        ehat: Tensor,
        weights: Tensor,
        projections: Tensor,
        coefficients: Tensor,
        cross: Tensor,
        own: Tensor,
    ) -> None:
        """Add the gradient of -sum weights * margin: through x (coefficients), the steps (cross), and |v| (own)."""
        group = group_pass.group
        a, b, c = self.coefficients
        omega = -(weights[group.rows, group.column.unsqueeze(1)] * group.mask).unsqueeze(-1)
        tau = group_pass.gather(projections) + ehat @ group_pass.lift.mT
        signed = omega * group_pass.beta
        coefficient = signed * (2 * a * tau + b * group_pass.nu)
        group_pass.scatter(coefficient, coefficients)
        cross.index_add_(0, group.form, ehat.mT @ coefficient)
        tiny = torch.finfo(tau.dtype).tiny ** 0.5
        own.index_add_(0, group.form, (signed * (b * tau / group_pass.nu.clamp_min(tiny) + 2 * c)).sum(1))

    # -- dual -----------------------------------------------------------------------------------------------

    def dual_point(self, packed: PackedNetwork, mu: float) -> tuple[DualPoint, float]:
        """Dual point from the slopes and worst-case points of the smoothed problem, and the hard objective."""
        spec = self._spectrum(packed)
        point = self._zero_dual()
        hard = 0.0
        for chunk, margins, steps in self._passes(packed, spec):
            _, slopes = self._loss.smoothed(margins, self.num_classes, mu)
            hard += float(self._hard(margins).double().sum())
            for group_pass, ehat in steps:
                group = group_pass.group
                weights = slopes[group.rows, group.column.unsqueeze(1)] * group.mask / self.n
                for g in range(len(group.start)):
                    active = weights[g].nonzero().squeeze(1)
                    if len(active) == 0:
                        continue
                    form = int(group.form[g])
                    x = self._x[chunk.rows][group.rows[g, active]] + ehat[g, active] @ spec.basis[form].mT
                    self._add_moments(point, form, float(group.sign[g]), weights[g, active], x)
        penalty = self.reg * float(packed.vectors.double().square().sum())
        return point, hard / self.n + penalty

    def _zero_dual(self) -> DualPoint:
        device, size = self._x.device, self.d + 1
        mass = torch.zeros(1 if self._pairwise else self.num_functions, dtype=torch.float64, device=device)
        return DualPoint(mass, torch.zeros(self.num_functions, size, size, dtype=torch.float64, device=device))

    def _add_moments(self, point: DualPoint, form: int, sign: float, weights: Tensor, x: Tensor) -> None:
        a, b, c = self.coefficients
        d = self.d
        total = float(weights.double().sum())
        moment = torch.empty(d + 1, d + 1, dtype=torch.float64, device=x.device)
        moment[:d, :d] = a * (x.mT @ (weights.unsqueeze(1) * x)).double()
        moment[:d, d] = moment[d, :d] = 0.5 * b * (weights @ x).double()
        moment[d, d] = c * total
        plus = int(self._forms.plus[form])
        point.moments[plus] += sign * moment
        if self._forms.minus is not None:
            point.moments[int(self._forms.minus[form])] -= sign * moment
        point.mass[0 if self._pairwise else plus] += total

    def oracle(self, point: DualPoint) -> OracleAnswer:
        """Best neuron of every function and sign, and the rigorous lower bound that it proves."""
        d = self.d
        q = point.moments[:, :d, :d]
        eigenvalues, vectors = torch.linalg.eigh(0.5 * (q + q.mT))
        linear = 2 * (point.moments[:, :d, d].unsqueeze(1) @ vectors)
        constant = point.moments[:, d, d]
        bounds, directions = [], []
        for sign in (1.0, -1.0):
            # max of sign*(u'Qu + q'u + c) = -min of (-sign)(...) in the eigenbasis, where the Hessian is 2Q.
            best = minimise_over_sphere(-sign * 2 * eigenvalues, -sign * linear)
            bounds.append(sign * constant - best.value.squeeze(1))
            u = (best.minimiser @ vectors.mT).squeeze(1)
            directions.append(u / u.norm(dim=-1, keepdim=True))
        bound = torch.stack(bounds, dim=1)
        peak = bound.amax(1)
        scale = (self.reg / (peak.amax() if self._pairwise else peak).clamp_min(self.reg)).clamp_max(1.0)
        return OracleAnswer(bound, torch.stack(directions, dim=1), float((scale * point.mass).sum()))

    def dual_value(self, weights: Tensor, points: Tensor) -> float:
        """Rigorous lower bound of the optimum from explicit weights and points (section 3 of the method).

        Args:
            weights: (n, K) >= 0, with n * weights in the loss's set S for every example; clipped into it.
            points: (n, K, d) points; each is pulled back into its ball if it lies outside.
        """
        features, labels = self.features, self.labels
        weights = self._clip(weights.double().clamp_min(0))
        step = points.double() - features.unsqueeze(1)
        norm = step.norm(dim=-1, keepdim=True)
        inside = features.unsqueeze(1) + step * (self.radius / norm.clamp_min(max(self.radius, 1e-300)))
        point = self._zero_dual()
        groups = plan(torch.bincount(labels, minlength=self.num_classes).tolist(), self._forms, self._pairwise, 1)
        order = self._order
        for group in groups:
            for g in range(len(group.start)):
                rows = order[group.rows[g, group.mask[g]]]
                column = int(group.column[g])
                x, s = inside[rows, column], weights[rows, column]
                self._add_moments(point, int(group.form[g]), float(group.sign[g]), s, x)
        return self.oracle(point).dual

    def _clip(self, weights: Tensor) -> Tensor:
        cap = self._loss.share(self.num_classes) / self.n
        if not self._loss.joint or self.num_classes == 2:
            return weights.clamp_max(cap)
        return weights * (cap / weights.sum(1, keepdim=True).clamp_min(cap))

    # -- shared ---------------------------------------------------------------------------------------------

    def _hard(self, margins: Tensor) -> Tensor:
        return self._loss.value(margins, self.num_classes)

    def _spectrum(self, packed: PackedNetwork) -> Spectrum:
        return spectrum(packed, self._forms, self.coefficients, self.dtype)

    def _project(self, chunk: _Chunk, packed: PackedNetwork) -> Tensor:
        functions, m, d = packed.vectors.shape
        flat = packed.vectors.reshape(functions * m, d).to(self.dtype)
        return (self._x[chunk.rows] @ flat.mT).view(-1, functions, m)

    def _passes(
        self, packed: PackedNetwork, spec: Spectrum | None = None
    ) -> Iterator[tuple[_Chunk, Tensor, list[tuple[GroupPass, Tensor]]]]:
        """Chunk by chunk: worst-case margins (rows, K) and, a group, the steps that reach them."""
        spec = spec or self._spectrum(packed)
        for chunk in self._chunks:
            tau = self._project(chunk, packed)
            margins = tau.new_empty(tau.shape[0], self.num_margins)
            steps = []
            for group in plan(chunk.counts, self._forms, self._pairwise, spec.nu.shape[1]):
                group_pass = GroupPass(group, spec, self._forms, self.coefficients)
                value, ehat = group_pass.worst_case(group_pass.gather(tau), self.radius)
                columns = group.column.unsqueeze(1).expand_as(group.rows)
                margins[group.rows[group.mask], columns[group.mask]] = value[group.mask]
                steps.append((group_pass, ehat))
            yield chunk, margins, steps
