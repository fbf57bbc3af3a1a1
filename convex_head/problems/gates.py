"""Robust training of networks with fixed gates: what ReLU and gated ReLU heads share.

Features x in R^d carry a constant, xt = [x; 1], which no perturbation changes. P gates g_p in R^(d+1) are fixed before
training; d_ip = 1[g_p'xt_i >= 0]. A network is a set of vectors theta_pc in R^(d+1), one a gate and function, and

    f_c(x_i) = xt_i' sum_p d_ip theta_pc.

Its margins are those of the loss (problems/losses.py): forms h_ik = sum_c B_ikc f_c. In a ball of radius r

    w_ik = xt_i' D_ik - r |D_ik|_* + sum_{p in U_i} min(0, xt_i' D_pk - r |D_pk|_*)
    D_ik = sum_{p in S_i} B_ik theta_p

where S_i holds the gates that are on, U_i those counted as able to flip (problems/gated_relu.py), |.|_* is the ball's
dual norm of the first d entries: 2 for "l2", 1 for "linf". The training problem is

    F = (1/n) sum_i loss(w_i) + reg sum_g |v_g| + penalty(v)          |v_g| the 2-norm, d+1 entries

with one group g a gate, function and, for ReLU, sign. Every term but the norm is a support function,
max <a, 1 - M v>, of slopes s (problems/losses.py), points of the ball, and shares of gates; so for any of these

    F >= sum s + reg sum_g |v_g| - sum_g m_g'v_g >= sum s  if  max_g |m_g| <= reg,   m = -gradient of the smooth terms

and otherwise after scaling by reg / max_g |m_g|. Smoothing every maximum (Y. Nesterov, Math. Program. 103 (2005)) makes
slopes and points unique: the gradient of the smoothed problem is such an m, so each gradient gives a lower bound.
Slopes and constraints are smoothed around a centre, their last maximisers; moving it is the method of multipliers
(R. T. Rockafellar, Math. Oper. Res. 1 (1976)), which converges at a fixed width.

Source: the convex reformulation by sign patterns of M. Pilanci and T. Ergen (ICML 2020), made robust by Y. Bai,
T. Gautam and S. Sojoudi, arXiv 2201.01965; patterns sampled as in arXiv 2405.14033.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convex_head.errors import StartError
from convex_head.problems.losses import get_loss
from convex_head.problems.margin_pass import MarginPass
from convex_head.problems.patterns import with_constant

# A chunk's tensors stay in the cache.
_CHUNK_ELEMENTS = 250_000


@dataclass(frozen=True)
class GateNetwork:
    """A network on fixed gates.

    Attributes:
        gates: (P, d+1) unit rows; the last entry belongs to the constant feature.
        vectors: (G, F, d+1); G = P for gated ReLU, G = 2 P for ReLU: v_p, then v'_p with theta = v - v'.
    """

    gates: Tensor
    vectors: Tensor

    @property
    def size(self) -> int:
        """Neurons: non-zero vectors."""
        return int((self.vectors != 0).any(-1).sum())

    @property
    def norm(self) -> Tensor:
        """sum_g |v_g|; scalar."""
        return self.vectors.norm(dim=-1).sum()


@dataclass(frozen=True)
class GateEvaluation:
    """Smoothed objective, its gradient, the exact objective, a lower bound of the optimum, and sum s behind it."""

    smooth: float
    gradient: Tensor
    primal: float
    dual: float
    mass: float


@dataclass(frozen=True)
class Centre:
    """Where smoothing is centred: slopes (n, K) of the loss; shares (n, A) of the constraints' weight, or None."""

    slopes: Tensor
    shares: Tensor | None


@dataclass(frozen=True)
class Penalty:
    """Of one chunk of examples: exact, smoothed, gradient of that (A, d+1), and the shares (B, A) behind it."""

    hard: float
    smooth: float
    gradient: Tensor
    shares: Tensor


class GateProblem:
    """Margins, objective, gradient and bound; subclasses say which gates flip and what is penalised.

    Args:
        features: (n, d) standardised.
        labels: (n,).
        gates: (P, d+1).
        num_classes: C.
        radius: of the feature ball.
        reg: weight of the group norm.
        loss: name in problems/losses.py; for C = 2 the hinge.
        ball: "l2" or "linf".
        dtype: of the bulk computation.
    """

    signs = 1

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        gates: Tensor,
        *,
        num_classes: int,
        radius: float,
        reg: float,
        loss: str,
        ball: str = "l2",
        dtype: torch.dtype = torch.float64,
    ):
        self.num_classes, self.radius, self.reg, self.ball = num_classes, float(radius), float(reg), ball
        self.loss, self._loss = loss, get_loss(loss)
        self.num_functions = 1 if num_classes == 2 else num_classes
        self.gates, self.labels, self.dtype = gates, labels, dtype
        self.groups: Tensor | None = None
        wide = with_constant(features.double())
        score = wide @ gates.mT
        self.on = (score >= 0).to(dtype)
        self.x = wide.to(dtype)
        self.flip = self._flips(score)
        if self.flip is not None:
            self.on = self.on * (1 - self.flip)
        self.others, self.sign = self._forms()
        self._chunks = self._chunk()

    def _chunk(self) -> list[slice]:
        groups, functions, width = self.shape
        size = max(1, _CHUNK_ELEMENTS // (functions * max(width, groups)))
        return [slice(i, min(i + size, self.n)) for i in range(0, self.n, size)]

    def rows(self, index: Tensor) -> GateProblem:
        """The problem on some of the examples."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in ("gates", "groups"):
                setattr(part, name, value[index])
        part._chunks = part._chunk()
        return part

    def cast(self, dtype: torch.dtype) -> GateProblem:
        """The same problem with its bulk computation in another dtype."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.is_floating_point() and name != "gates":
                setattr(part, name, value.to(dtype))
        part.dtype = dtype
        return part

    def restricted(self, groups: Tensor) -> GateProblem:
        """The problem in which all vectors but ``groups`` (A, 2), pairs (g, function), are held at zero.

        Its :meth:`evaluate` takes and returns (A, d+1), and its bound is one of this smaller problem.
        """
        part, count = copy.copy(self), len(self.gates)
        patterns, place = torch.unique(groups[:, 0] % count, return_inverse=True)
        part.gates = self.gates[patterns]
        for name in ("on", "flip", "sides"):
            value = getattr(self, name, None)
            if value is not None:
                setattr(part, name, value[:, patterns])
        part.groups = torch.stack([place + len(patterns) * (groups[:, 0] // count), groups[:, 1]], dim=1)
        part._chunks = part._chunk()
        return part

    def _spread(self, vectors: Tensor) -> Tensor:
        """(G, F, d+1) from the vectors of the groups."""
        if self.groups is None:
            return vectors.view(self.shape)
        return vectors.new_zeros(self.shape).index_put((self.groups[:, 0], self.groups[:, 1]), vectors)

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.x.shape[0]

    @property
    def d(self) -> int:
        """Number of features, the constant left out."""
        return self.x.shape[1] - 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, F, d+1) of the vectors."""
        return self.signs * self.gates.shape[0], self.num_functions, self.d + 1

    @property
    def num_margins(self) -> int:
        """K: 1 (binary), C (one_vs_rest) or C - 1 (pairwise; classes other than y in increasing order)."""
        return self.num_functions - 1 if self.pairwise else self.num_functions

    def _flips(self, score: Tensor) -> Tensor | None:
        """(n, P) 1 where a gate is counted as able to flip; None for nowhere."""
        return None

    @property
    def pairwise(self) -> bool:
        """Margins are f_y - f_k; otherwise they are +-f_k, with K = F."""
        return self.num_classes > 2 and self._loss.pairwise

    def _forms(self) -> tuple[Tensor | None, Tensor | None]:
        """Pairwise margins: the (n, K) other classes k. Else the (n, F) signs."""
        y, c = self.labels, self.num_classes
        every = torch.arange(c, device=y.device)
        if c == 2:
            return None, (2 * y - 1)[:, None].to(self.dtype)
        if not self._loss.pairwise:
            return None, 2 * (every == y[:, None]).to(self.dtype) - 1
        others = every[: c - 1].expand(self.n, c - 1)
        return others + (others >= y[:, None]), None

    def theta(self, vectors: Tensor) -> Tensor:
        """(P, F, d+1) from (G, F, d+1)."""
        return vectors

    def _by_vector(self, gradient: Tensor) -> Tensor:
        """Gradient with respect to the vectors (G, F, d+1), from that with respect to theta."""
        return gradient

    def _gather(self, gradient: Tensor) -> Tensor:
        """Gradient with respect to the groups' vectors, from that with respect to theta."""
        gradient = self._by_vector(gradient)
        return gradient if self.groups is None else gradient[self.groups[:, 0], self.groups[:, 1]]

    def check_start(self, start: GateNetwork) -> GateNetwork:
        """A warm start on this problem's device; its gates are those of the problem.

        Raises:
            StartError: other gates, functions or features.
        """
        if not isinstance(start, GateNetwork):
            raise StartError(f"start must be a network on gates; found a {type(start).__name__}.")
        vectors = start.vectors.to(self.x.device).double()
        if tuple(vectors.shape) != self.shape or not torch.equal(start.gates.to(self.gates), self.gates):
            raise StartError(
                f"start must be a network of shape {self.shape} (vectors, functions, features + 1) on this problem's "
                f"gates; found {tuple(vectors.shape)}. Start from a head fitted with the same settings."
            )
        return GateNetwork(self.gates, vectors)

    def zero(self) -> GateNetwork:
        """The zero network."""
        return GateNetwork(self.gates, torch.zeros(self.shape, dtype=torch.float64, device=self.x.device))

    # -- margins ----------------------------------------------------------------------------------------------

    def margins(self, network: GateNetwork) -> Tensor:
        """(n, K) worst-case margins w, float64."""
        with torch.no_grad():
            sweep = MarginPass(self, self.theta(network.vectors.to(self.dtype)), 0.0)
            return torch.cat([sweep.forward(chunk)[0] for chunk in self._chunks]).double()

    def values(self, network: GateNetwork) -> Tensor:
        """(n, F) f_c(x_i) of the convex model, float64."""
        theta = self.theta(network.vectors.double())
        out = []
        for chunk in self._chunks:
            x = self.x[chunk].double()
            on = (x @ self.gates.mT >= 0).double()
            out.append(torch.einsum("np,npf->nf", on, torch.einsum("nd,pfd->npf", x, theta)))
        return torch.cat(out)

    # -- objective --------------------------------------------------------------------------------------------

    def objective(self, network: GateNetwork) -> float:
        """Exact objective F; inf where hard constraints are violated beyond the feasibility tolerance."""
        loss = self._loss.value(self.margins(network), self.num_classes).mean()
        return float(loss) + self.reg * float(network.norm) + self.penalty(network)

    def penalty(self, network: GateNetwork) -> float:
        """Penalty of the constraints."""
        return 0.0

    def _penalty(self, vectors: Tensor, chunk: slice, mu: float, narrow: float, centre: Centre) -> Penalty | None:
        """Penalties of a chunk; vectors (A, d+1)."""
        return None

    def bound(self, found: GateEvaluation, largest: float) -> float:
        """Lower bound of the optimum, from ``largest`` >= the longest moment for the slopes of ``found``."""
        return found.mass * min(1.0, self.reg / max(largest, 1e-300))

    def loss_curvature(self, slopes: Tensor, mu: float) -> Tensor:
        """(n, F) derivatives of the smoothed loss's slopes, where these are strictly inside their set."""
        share = self._loss.share(self.num_classes)
        if self._loss.joint:
            inside = (slopes > 0).to(slopes)
            free = (slopes.sum(1, keepdim=True) < 1 - 1e-9).to(slopes)
            other = inside * (1 - (1 - free) / inside.sum(1, keepdim=True).clamp_min(1)) / mu
            own = free * inside.sum(1, keepdim=True) / mu
        else:
            other = ((slopes > 0) & (slopes < share)).to(slopes) * share / mu
            own = other.sum(1, keepdim=True)
        if self.others is None:
            return own if self.num_classes == 2 else other
        out = slopes.new_zeros(self.n, self.num_functions)
        return out.scatter_add(1, self.others, other).scatter_add(1, self.labels[:, None], own)

    def support(self, moments: Tensor, limit: float, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Upper bounds of max m'v - penalty(v) over |v| <= 1, and near-maximisers, not scaled.

        Args:
            moments: (G F, d+1), of the loss alone, -gradient of ``evaluate(loss_only=True)``.
            limit: a bound at most this large need not be improved.
            shares: (n, G F) to start from, or None.

        Returns:
            (G F,) and (G F, d+1).
        """
        return moments.norm(dim=-1), moments

    def centre(self) -> Centre:
        """Plain smoothing: all slopes and shares are drawn to zero."""
        return Centre(self.x.new_zeros(self.n, self.num_margins), None)

    def evaluate(
        self, vectors: Tensor, mu: float, narrow: float, centre: Centre, *, loss_only: bool = False
    ) -> tuple[GateEvaluation, Centre]:
        """Smoothed objective, its gradient, and what both prove.

        Args:
            vectors: (G, F, d+1) float64; (A, d+1) where the problem is restricted to A groups.
            mu: smoothing width of the loss and the constraints, > 0, in margin units.
            narrow: smoothing width of the norms, and of the gates that can flip.
            centre: smoothing subtracts (mu/2) |s - centre|^2 from every maximum over s.
            loss_only: leave the constraints out, so that -gradient are the moments of the loss.

        Returns:
            The evaluation, and the maximisers s: a better centre, with which the bias of the smoothing shrinks.
        """
        v = vectors.detach().to(self.dtype)
        sweep = MarginPass(self, self.theta(self._spread(v)), narrow)
        pull = torch.zeros_like(v)
        smooth = hard = mass = 0.0
        all_slopes, all_shares = [], []
        share = self._loss.share(self.num_classes)
        for chunk in self._chunks:
            exact, margins = sweep.forward(chunk)
            # Shifted by the centre, the maximum of the loss is the centred one up to a constant.
            last = centre.slopes[chunk].to(self.dtype)
            value, slopes = self._loss.smoothed(margins - mu / share * last, self.num_classes, mu)
            sweep.backward(slopes, chunk)
            smooth += float(value.sum(dtype=torch.float64)) - 0.5 * mu / share * float(last.square().sum())
            hard += float(self._loss.value(exact, self.num_classes).sum(dtype=torch.float64))
            mass += float(slopes.sum(dtype=torch.float64))
            all_slopes.append(slopes)
            penalty = None if loss_only else self._penalty(v.flatten(0, -2), chunk, mu, narrow, centre)
            if penalty is not None:
                hard, smooth = hard + penalty.hard, smooth + penalty.smooth
                pull += penalty.gradient.view_as(pull)
                all_shares.append(penalty.shares)
        gradient = (self._gather(sweep.gradient()).view_as(pull) + pull).double() / self.n
        mass /= self.n
        norm = self.reg * float(vectors.norm(dim=-1).sum())
        largest = float(gradient.norm(dim=-1).max())
        found = GateEvaluation(smooth / self.n + norm, gradient, hard / self.n + norm, 0.0, mass)
        found = replace(found, dual=self.bound(found, largest))
        return found, Centre(torch.cat(all_slopes), torch.cat(all_shares) if all_shares else None)
