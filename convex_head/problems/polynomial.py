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

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork
from convex_head.adversary.scan import SATISFIED, MarginScan
from convex_head.errors import StartError
from convex_head.problems import fused, starts
from convex_head.problems.adjoint import Adjoint
from convex_head.problems.base import Network
from convex_head.problems.dual import DualPoint, DualReport, OracleAnswer, oracle
from convex_head.problems.dual_rows import DualRows, RowCollector
from convex_head.problems.fused import FusedPass
from convex_head.problems.losses import get_loss
from convex_head.problems.moments import MomentSums, add_step
from convex_head.problems.multipliers import Multipliers, fits, gathered, lowered, reach
from convex_head.problems.preconditioner import preconditioner
from convex_head.problems.repair import repaired
from convex_head.problems.scaling import SCALES, best_scale, interpolated_scale, losses_at_scales, objectives
from convex_head.rows import Chunk, Rows
from convex_head.shards import Whole

# Margins up to here are exact where the network is rescaled afterwards (problems/scaling.py).
_EXACT = 2 * SATISFIED
# Larger shares smooth more and bias more; 0.1 to 1 solve the same problems at about the same cost.
_BLUR_SHARE = 0.3
_METRIC_ROWS = 4096
# Rows of a chunk: what stays in a processor's cache; what keeps a GPU busy, and margins of them at most.
_CHUNK, _GPU_CHUNK, _GPU_MARGINS = 4096, 1 << 16, 1 << 21
# Fewer rows are passed over so quickly that they are not worth the seconds which compiling takes, once a machine.
_COMPILED_ROWS = 1000


@dataclass(frozen=True)
class Evaluation:
    """Smoothed objective, its gradient in the packed vectors (F, m, d) and the hard objective at the same point.

    The hard objective is nan where the smoothing has a centre, because margins without a slope are then bounds.
    """

    smoothed: float
    hard: float
    gradient: Tensor


class PolynomialProblem:
    """(P) on given features; see the module docstring.

    Args:
        features: (n, d) tensor, array or memory-mapped array; validated by the caller.
        labels: (n,) int64 in 0..num_classes-1, on the device of the computation.
        num_classes: C. For C = 2 there is one function, f, with y = +1 for label 1, and the loss is the hinge.
        radius: radius of the feature ball, >= 0.
        reg: regularisation weight, > 0.
        loss: name of a margin loss.
        coefficients: (a, b, c) of the activation, a > 0.
        dtype: precision of the bulk computation; sums and factorisations are float64.
        chunk_rows: rows processed together; None for what suits the device.
        mean, scale, whitening: (d,), (d,), (d, d) standardisation of the features, chunk by chunk; None for none.
        stream: read the features anew in every pass instead of holding them (convex_head/rows.py).
        shard: the part of the rows that is held here, where several processes share them (convex_head/shards.py).
    """

    def __init__(
        self,
        features: Tensor | np.ndarray,
        labels: Tensor,
        *,
        num_classes: int,
        radius: float,
        reg: float,
        loss: str = "crammer_singer",
        coefficients: tuple[float, float, float] = (0.09, 0.5, 0.47),
        dtype: torch.dtype = torch.float64,
        chunk_rows: int | None = None,
        mean: Tensor | None = None,
        scale: Tensor | None = None,
        whitening: Tensor | None = None,
        stream: bool = False,
        shard: Whole | None = None,
    ):
        self.num_classes, self.radius, self.reg = num_classes, float(radius), float(reg)
        self.loss, self.coefficients = loss, coefficients
        self.num_functions = 1 if num_classes == 2 else num_classes
        self.dtype = dtype
        self.shard = shard or Whole()
        self._loss = get_loss(loss)
        on_gpu = min(_GPU_CHUNK, max(1, _GPU_MARGINS // num_classes))
        chunk_rows = chunk_rows or (_CHUNK if labels.device.type == "cpu" else on_gpu)
        units = {"mean": mean, "scale": scale, "whitening": whitening}
        rows = Rows(features, labels, **units, dtype=dtype, chunk_rows=chunk_rows, stream=stream)
        self._use(rows, self.shard.total(len(labels)))

    def _use(self, rows: Rows, total: int) -> None:
        self._scan = MarginScan(
            rows, num_classes=self.num_classes, pairwise=self._loss.pairwise, coefficients=self.coefficients
        )
        self._rows, self._total = rows, total
        self._device = rows.device
        self._reference: MarginScan | None = None

    @property
    def n(self) -> int:
        """Number of examples, over all shards."""
        return self._total

    @property
    def d(self) -> int:
        """Number of features."""
        return self._rows.d

    @property
    def num_margins(self) -> int:
        """K: 1 (binary), C (one_vs_rest) or C - 1 (pairwise; classes other than y in increasing order)."""
        return self._scan.num_margins

    @property
    def features(self) -> Tensor:
        """(n, d) features in the given order, float64."""
        return self._unsort(self._rows.all())

    @property
    def labels(self) -> Tensor:
        """(n,) labels in the given order."""
        return self._unsort(self._rows.labels)

    @property
    def device(self) -> torch.device:
        """Device of the computation."""
        return self._device

    def key(self) -> dict[str, Any]:
        """What tells this problem from others, as JSON values."""
        names = ("num_classes", "radius", "reg", "loss")
        settings = {name: getattr(self, name) for name in names}
        digest = torch.zeros(2, dtype=torch.float64, device=self._device)
        digest[0], digest[1] = self._rows.digest()
        self.shard.sum(digest)
        return settings | {"coefficients": list(self.coefficients), "shape": [self.n, self.d], "data": digest.tolist()}

    def sample(self, count: int, seed: int) -> PolynomialProblem:
        """The same problem on ``count`` examples drawn at random, in memory."""
        part, rows = copy.copy(self), self._rows.sample(count, seed, self.shard.first, self.n)
        part.shard = self.shard.holding(rows.n)
        part._use(rows, min(count, self.n))
        return part

    def _unsort(self, values: Tensor) -> Tensor:
        out = torch.empty_like(values)
        out[self._rows.order] = values
        return out

    def pack(self, network: Network) -> PackedNetwork:
        """Padded form of a network on this problem's functions."""
        return PackedNetwork.pack(network, self.num_functions)

    def check_start(self, network: Network) -> Network:
        """A warm start on this problem's device, float64.

        Raises:
            StartError: another number of features, or a neuron of a function that the problem does not have.
        """
        if not isinstance(network, Network):
            raise StartError(f"start must be a polynomial network; found a {type(network).__name__}.")
        functions = int(network.function.max()) + 1 if network.size else 0
        width = network.directions.shape[1]
        if width != self.d or functions > self.num_functions:
            raise StartError(
                f"start must be a network on {self.d} features and {self.num_functions} functions; found {width} "
                f"features and {functions} functions. Start from a head fitted with the same widths."
            )
        device = self._device
        return Network(
            network.directions.to(device).double(), network.weights.to(device).double(), network.function.to(device)
        )

    # -- primal ---------------------------------------------------------------------------------------------

    def objective(self, network: Network) -> float:
        """Exact robust objective F of a network."""
        total = torch.zeros(1, dtype=torch.float64, device=self._device)
        spectra, window = self._scan.spectra(self.pack(network)), self._loss.window(0.0)
        for _, _, margins, _ in self._scan.passes(spectra, self.radius, SATISFIED, window=window):
            total += self._hard(margins).double().sum()
        self.shard.sum(total)
        return float(total) / self.n + self.reg * float(network.norm)

    def worst_case(self, network: Network) -> tuple[Tensor, Tensor]:
        """Worst-case margins (n, K) and the points (n, K, d) that attain them, in the given order, float64."""
        margins = torch.empty(self._rows.n, self.num_margins, dtype=torch.float64, device=self._device)
        points = self._rows.all().unsqueeze(1).repeat(1, self.num_margins, 1)
        for chunk, _, chunk_margins, steps in self._scan.passes(self._scan.spectra(self.pack(network)), self.radius):
            margins[chunk.rows] = chunk_margins.double()
            for step in steps:
                e = (step.ehat @ step.group_pass.basis().mT).double()
                group = step.group_pass.group
                real = group.real()
                rows = (group.rows + chunk.rows.start)[real]
                points[rows, group.columns.expand_as(group.rows)[real]] += e[real]
        return self._unsort(margins), self._unsort(points)

    def blur(self, mu: float) -> float:
        """Blur of the inner problem (adversary/trust_region.py) whose bias is at most a fixed share of mu."""
        return _BLUR_SHARE * mu / (self.radius * self.d**0.5) if self.radius > 0 else 0.0

    @property
    def holds_multipliers(self) -> bool:
        """Whether smoothing can be centred on multipliers: they are few enough to be held."""
        return fits(self.n, self.num_margins)

    def multipliers(self, slopes: Tensor | None, width: float) -> Multipliers | None:
        """Slopes of the rows held here as what another solve on them can start from."""
        return None if slopes is None else Multipliers(slopes, width, self._rows.digest())

    def takes(self, given: Multipliers) -> bool:
        """Whether multipliers are those of the same examples, in every process."""
        own = self.holds_multipliers and given.belong((self._rows.n, self.num_margins), self._rows.digest())
        return not self.shard.any(not own)

    def all_multipliers(self, slopes: Tensor) -> Tensor:
        """Multipliers of all examples in the given order (n, K), from those of the rows held here."""
        return gathered(slopes, self._rows.order, self.shard, self.n)

    def own_multipliers(self, slopes: Tensor) -> Tensor:
        """Multipliers of the rows held here, from those of all examples."""
        first = self.shard.first
        return slopes[first : first + self._rows.n].to(self._device, self.dtype)[self._rows.order]

    def evaluate(self, packed: PackedNetwork, mu: float, blur: float = 0.0, centre: Tensor | None = None) -> Evaluation:
        """Smoothed objective (width mu), its gradient by Danskin's theorem, and the hard objective.

        With blur, both are those of the blurred margins, which are smooth in the weights. centre: (n, K) multipliers
        of the rows held here (problems/multipliers.py).
        """
        settings: dict[str, Any] = {"radius": self.radius, "mu": mu, "blur": blur, "examples": self.n}
        kind = FusedPass if self._is_compiled() else Adjoint
        adjoint = kind(self._scan, packed, self._loss, centre=centre, **settings)
        adjoint.run()
        self.shard.sum(*adjoint.parts())
        gradient = adjoint.gradient() + 2 * self.reg * packed.vectors.double()
        smooth, hard = (adjoint.losses / self.n).tolist()
        penalty = self.reg * float(packed.vectors.double().square().sum())
        hard = hard + penalty if centre is None else math.nan
        return Evaluation(smooth + penalty, hard, gradient.to(packed.vectors.dtype))

    def _is_compiled(self) -> bool:
        return self.n >= _COMPILED_ROWS and fused.serves(self._scan, self._loss)

    def prepare(self) -> None:
        """Compile what passes need, so that no time limit pays for it: seconds once a machine, then nothing."""
        if self._is_compiled():
            settings: dict[str, Any] = {"radius": self.radius, "mu": 1.0, "blur": self.blur(1.0), "examples": self.n}
            FusedPass(self._sampled(), self.pack(self.random_network(1, 0)), self._loss, **settings).run()

    def metric(
        self, packed: PackedNetwork, mu: float, blur: float = 0.0, centre: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """A preconditioner for the vectors at a network, from a sample of the rows (problems/preconditioner.py)."""
        settings: dict[str, Any] = {"radius": self.radius, "reg": self.reg, "mu": mu, "blur": blur}
        settings["rows"] = min(_METRIC_ROWS, self.n)
        drawn = self._sampled().rows.drawn if self.n > _METRIC_ROWS else None
        settings["centre"] = centre if centre is None or drawn is None else centre[drawn]
        return preconditioner(self._sampled(), packed, self._loss, shard=self.shard, **settings)

    def _sampled(self) -> MarginScan:
        if self._reference is None:
            self._reference = self.sample(_METRIC_ROWS, 0)._scan if self.n > _METRIC_ROWS else self._scan
        return self._reference

    # -- dual -----------------------------------------------------------------------------------------------

    def dual_point(
        self, packed: PackedNetwork, mu: float, blur: float = 0.0, centre: Tensor | None = None
    ) -> DualReport:
        """Dual point from the slopes and worst cases of the smoothed problem, and what its gap is made of."""
        spectra = self._scan.spectra(packed)
        sums = self._moments()
        # Functions that no margin couples have good bounds without a repair.
        collector = RowCollector() if self._scan.pairwise else None
        at_scales = torch.zeros(len(SCALES), dtype=torch.float64, device=self._device)
        kept: Tensor | None = None
        if self.holds_multipliers:
            kept = torch.empty(self._rows.n, self.num_margins, dtype=self.dtype, device=self._device)
        further = reach(centre, mu)
        limits = (_EXACT + further, blur, self._loss.window(mu) + further)
        for chunk, _, margins, steps in self._scan.passes(spectra, self.radius, *limits):
            _, slopes = self._loss.smoothed(lowered(margins, centre, chunk.rows, mu), self.num_classes, mu)
            if kept is not None:
                kept[chunk.rows] = slopes / self._loss.share(self.num_classes)
            if blur == 0:
                at_scales += losses_at_scales(self._loss.near(margins, 0.0), self._hard)
            for step in steps:
                weights = step.group_pass.load(slopes) / self.n
                add_step(sums, self._scan.forms, chunk, step, weights, collector)
        if blur > 0:
            for _, _, margins, _ in self._scan.passes(spectra, self.radius, _EXACT, window=self._loss.window(0.0)):
                at_scales += losses_at_scales(self._loss.near(margins, 0.0), self._hard)
        self.shard.sum(at_scales, sums.point.mass, sums.point.moments)
        penalty = self.reg * float(packed.vectors.double().square().sum())
        scale, primal = best_scale(objectives(at_scales, self.n, penalty))
        smoothing = float(at_scales[SCALES.index(1.0)]) / self.n - sums.point.bound(packed)
        rows = None if collector is None else collector.rows(self.shard)
        return DualReport(sums.point, primal, scale, smoothing, rows, kept)

    def fit_scale(self, network: Network, mu: float) -> Network:
        """The network with its output weights scaled to the minimum of the smoothed objective."""
        at_scales = torch.zeros(len(SCALES), dtype=torch.float64, device=self._device)
        spectra = self._scan.spectra(self.pack(network))
        for _, _, margins, _ in self._scan.passes(spectra, self.radius, _EXACT):
            near = self._loss.near(margins, mu / SCALES[0])
            at_scales += losses_at_scales(near, lambda w: self._loss.smoothed(w, self.num_classes, mu)[0])
        self.shard.sum(at_scales)
        values = objectives(at_scales, self.n, self.reg * float(network.norm))
        return replace(network, weights=network.weights * interpolated_scale(values))

    def zero_network(self) -> Network:
        """One neuron of weight 0 a function: the zero function, in a form that can be deployed."""
        return starts.zero_network(self.num_functions, self.d, self._device)

    def random_network(self, neurons: int, seed: int) -> Network:
        """``neurons`` random unit neurons of each sign for every function, small output weights."""
        return starts.random_network(self.num_functions, self.d, neurons, seed, self._device)

    def discriminant_network(self) -> Network:
        """One neuron a function, along the linear discriminant of its class, output weight 1 (problems/starts.py)."""
        return starts.discriminant_network(self._rows, self.num_functions, self.n, self.shard)

    def _moments(self) -> MomentSums:
        settings: dict[str, Any] = {"num_functions": self.num_functions, "coefficients": self.coefficients}
        return MomentSums(self._scan.forms, pairwise=self._scan.pairwise, d=self.d, **settings)

    def oracle(self, point: DualPoint) -> OracleAnswer:
        """Best neuron of every function and sign, and the rigorous lower bound that it proves."""
        return oracle(point, self.reg)

    def repair(
        self, rows: DualRows, packed: PackedNetwork, answer: OracleAnswer, primal: float, tol: float, **limits: Any
    ) -> OracleAnswer:
        """``answer`` with a bound at least as good, from slopes solved for anew: ``repaired`` of problems/repair.py.

        ``limits`` are its ``late`` and ``until``.
        """
        settings: dict[str, Any] = {"loss": self._loss, "num_classes": self.num_classes, "reg": self.reg, "n": self.n}
        settings |= {"coefficients": self.coefficients, "shard": self.shard, "primal": primal, "tol": tol}
        return repaired(rows, packed, answer, number=self.shard.first + self._rows.order, **settings, **limits)

    def dual_value(self, weights: Tensor, points: Tensor) -> float:
        """Rigorous lower bound of the optimum from explicit weights and points (section 3 of the method).

        Args:
            weights: (n, K) >= 0, with n * weights in the loss's set S for every example; clipped into it.
            points: (n, K, d) points; each is pulled back into its ball if it lies outside.
        """
        features = self.features
        weights = self._loss.clipped(weights.double() * self.n, self.num_classes) / self.n
        step = points.double() - features.unsqueeze(1)
        longest = step.norm(dim=-1, keepdim=True).clamp_min(max(self.radius, 1e-300))
        inside = features.unsqueeze(1) + step * (self.radius / longest)
        sums = self._moments()
        order = self._rows.order
        inside, weights = inside[order], weights[order]
        whole = Chunk(slice(0, self.n), inside[:, 0], self._rows.labels)
        for group in self._scan.groups(whole, weights > 0, 1):
            g, place = group.real().nonzero(as_tuple=True)
            rows, column = group.rows[g, place], group.columns.squeeze(1)[g]
            sums.add(group.forms[g], group.signs[g].double(), weights[rows, column], inside[rows, column])
        return self.oracle(sums.point).dual

    def _hard(self, margins: Tensor) -> Tensor:
        return self._loss.value(margins, self.num_classes)
