"""Worst-case margins of polynomial networks: one trust-region subproblem an example and a class pair.

With v_j = sqrt|alpha_j| u_j and sigma_j = sign(alpha_j), a network is f_c(x) = sum_j sigma_j phi(v_j, x), where

    phi(v, x) = a (v'x)^2 + b |v| v'x + c |v|^2                                      (C^1 in v, v = 0 included)

A margin is a signed form h = f_p - f_q (or y f_p alone) and again a quadratic, with Hessian
2a V' diag(beta) V for the stacked neurons V (K x d) and their signs beta. All examples share it, so one QR of V'
and one K x K eigendecomposition a form serve the whole data set:

    V' = Q R,   2a R diag(beta) R' = Y diag(lambda) Y',   E = Q Y (d x k),   P = R'Y (K x k)

Then an example needs only its projections tau = V x: its gradient in the eigenbasis is (beta (2a tau + b nu)) P,
nu_j = |v_j|, a step e = E ehat moves the projections by P ehat, and no n x d temporary appears.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convex_head.problems.base import Network

# Above this many forms (46 classes in pairs) factors are made when asked for, because each holds d x k numbers.
_EAGER_FORMS = 1100


@dataclass(frozen=True)
class PackedNetwork:
    """A network as padded arrays.

    Attributes:
        vectors: (F, m, d) rows v_j = sqrt|alpha_j| u_j.
        signs: (F, m) in {-1, 0, 1}; 0 pads.
        nu: (F, m) sqrt|alpha_j|; equals |v_j| for unit u_j, and is kept apart because the u_j of a deployed head are
            unit vectors only up to its precision.
    """

    vectors: Tensor
    signs: Tensor
    nu: Tensor

    @staticmethod
    def of(vectors: Tensor, signs: Tensor) -> PackedNetwork:
        """The network of unit neurons with these vectors."""
        return PackedNetwork(vectors, signs, vectors.norm(dim=-1))

    @staticmethod
    def pack(network: Network, num_functions: int) -> PackedNetwork:
        """Pad every function to the width of the widest."""
        counts = torch.bincount(network.function, minlength=num_functions)
        width = max(1, int(counts.max())) if network.size else 1
        d = network.directions.shape[1]
        vectors = network.directions.new_zeros(num_functions, width, d)
        signs = network.directions.new_zeros(num_functions, width)
        nu = torch.zeros_like(signs)
        root = network.weights.abs().sqrt()
        scaled = network.directions * root.unsqueeze(1)
        for c in range(num_functions):
            rows = network.function == c
            vectors[c, : int(counts[c])] = scaled[rows]
            signs[c, : int(counts[c])] = network.weights[rows].sign()
            nu[c, : int(counts[c])] = root[rows]
        return PackedNetwork(vectors, signs, nu)

    def unpack(self) -> Network:
        """The same network as unit directions and signed weights; zero neurons are dropped."""
        norm = self.vectors.norm(dim=-1)
        alive = (norm > 0) & (self.signs != 0)
        function = torch.arange(alive.shape[0], device=norm.device).unsqueeze(1).expand_as(alive)[alive]
        directions = self.vectors[alive] / norm[alive].unsqueeze(1)
        return Network(directions, (norm.square() * self.signs)[alive], function)


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

    def take(self, index: Tensor) -> Forms:
        """Some of the forms."""
        return Forms(self.plus[index], None if self.minus is None else self.minus[index])

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
    """Factors of some forms (module docstring), in the dtype of the bulk computation."""

    eigenvalues: Tensor  # (G, k)
    basis: Tensor  # (G, d, k)
    lift: Tensor  # (G, K, k)
    beta: Tensor  # (G, K)
    nu: Tensor  # (G, K)
    constant: Tensor  # (G,)

    def take(self, index: Tensor) -> Spectrum:
        """The factors of some of the forms."""
        parts = (self.eigenvalues, self.basis, self.lift, self.beta, self.nu, self.constant)
        return Spectrum(*(part[index] for part in parts))


@dataclass(frozen=True)
class Screen:
    """Values and gradient norms of all functions from the projections alone, in two small products a function.

    With slopes s = beta (2a tau + b nu) and V V' = L L', the gradient's norm is |V's| = |L's|.
    """

    quadratic: Tensor  # (F, m, 1)
    linear: Tensor  # (F, m, 1)
    constant: Tensor  # (F, 1, 1)
    slope: Tensor  # (F, m, m)
    offset: Tensor  # (F, 1, m)

    @staticmethod
    def build(packed: PackedNetwork, coefficients: tuple[float, float, float], dtype: torch.dtype) -> Screen:
        """Factor the Gram matrix of every function, in float64."""
        a, b, c = coefficients
        vectors, beta, nu = packed.vectors.double(), packed.signs.double(), packed.nu.double()
        eigenvalues, y = torch.linalg.eigh(vectors @ vectors.mT)
        factor = y * eigenvalues.clamp_min(0).sqrt().unsqueeze(-2)
        parts = (
            a * beta.unsqueeze(-1),
            b * (beta * nu).unsqueeze(-1),
            c * (beta * nu.square()).sum(-1)[:, None, None],
            2 * a * beta.unsqueeze(-1) * factor,
            b * (beta * nu).unsqueeze(-2) @ factor,
        )
        return Screen(*(part.to(dtype) for part in parts))

    def values(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """f and |grad f| (rows, F) at points with projections tau (rows, F, m)."""
        by_function = tau.transpose(0, 1)
        value = torch.baddbmm(self.constant, by_function, self.linear).baddbmm_(
            (tau * tau).transpose(0, 1), self.quadratic
        )
        norm = torch.linalg.vector_norm(torch.baddbmm(self.offset, by_function, self.slope), dim=-1)
        return value.squeeze(-1).T, norm.T


class Spectra:
    """Factors of all forms of one network; where these are many, of the forms asked for when they are asked for.

    Args:
        packed: the network.
        forms: the T forms.
        coefficients: (a, b, c) of the activation.
        dtype: of the bulk computation; factorisations are float64.
    """

    def __init__(
        self, packed: PackedNetwork, forms: Forms, coefficients: tuple[float, float, float], dtype: torch.dtype
    ):
        self.packed, self.forms, self.coefficients, self.dtype = packed, forms, coefficients, dtype
        self.width = packed.signs.shape[1] * (1 if forms.minus is None else 2)
        many = len(forms.plus) > _EAGER_FORMS
        self._all = None if many else spectrum(packed, forms, coefficients, dtype)
        self._curvatures: tuple[Tensor, Tensor] | None = None
        self._screen: Screen | None = None

    def screen(self) -> Screen:
        """Values and gradient norms of all functions at many points."""
        if self._screen is None:
            self._screen = Screen.build(self.packed, self.coefficients, self.dtype)
        return self._screen

    def take(self, index: Tensor) -> Spectrum:
        """Factors of the forms with these indices (G,)."""
        if self._all is not None:
            return self._all.take(index)
        return spectrum(self.packed, self.forms.take(index), self.coefficients, self.dtype)

    def curvatures(self) -> tuple[Tensor, Tensor]:
        """Smallest (at most 0) and largest (at least 0) eigenvalue of every form, (T,) each.

        Where forms are many, bounds: the smallest of f_p - f_q is at least that of f_p minus the largest of f_q.
        """
        if self._curvatures is None:
            if self._all is not None:
                low, high = self._all.eigenvalues.amin(-1), self._all.eigenvalues.amax(-1)
                self._curvatures = low.clamp_max(0), high.clamp_min(0)
            else:
                single = Forms(torch.arange(len(self.packed.signs), device=self.packed.signs.device), None)
                own = spectrum(self.packed, single, self.coefficients, self.dtype).eigenvalues
                low, high = own.amin(-1).clamp_max(0), own.amax(-1).clamp_min(0)
                plus, minus = self.forms.plus, self.forms.minus
                if minus is None:
                    self._curvatures = low[plus], high[plus]
                else:
                    self._curvatures = low[plus] - high[minus], high[plus] - low[minus]
        return self._curvatures


def spectrum(
    packed: PackedNetwork, forms: Forms, coefficients: tuple[float, float, float], dtype: torch.dtype
) -> Spectrum:
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
    nu = forms.gather(packed.nu.double())
    constant = c * (beta * nu.square()).sum(-1)
    parts = (eigenvalues, q @ y, r.mT @ y, beta, nu, constant)
    return Spectrum(*(t.to(dtype) for t in parts))
