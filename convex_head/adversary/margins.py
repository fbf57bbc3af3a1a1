"""Worst-case margins of polynomial networks: one trust-region subproblem an example and a class pair.

With v_j = sqrt|alpha_j| u_j and sigma_j = sign(alpha_j), a network is f_c(x) = sum_j sigma_j phi(v_j, x), where

    phi(v, x) = a (v'x)^2 + b |v| v'x + c |v|^2                                      (C^1 in v, v = 0 included)

A margin is a signed form h = f_p - f_q (or y f_p alone) and again a quadratic, with Hessian
2a V' diag(beta) V for the stacked neurons V (K x d) and their signs beta. All examples share it, so two K x K
eigendecompositions a form serve the whole data set, and none of them sees d:

    V V' = W diag(s) W',   R = diag(s)^(1/2) W',   2a R diag(beta) R' = Y diag(lambda) Y'
    P = R'Y (K x k),   Z = W diag(s)^(-1/2) Y (K x k),   E = V'Z (d x k) with E'E = I

(or R' = L and Z = L'^-1 Y with L L' = V V', where the neurons are independent).

Then an example needs only its projections tau = V x: its gradient in the eigenbasis is (beta (2a tau + b nu)) P,
nu_j = |v_j|, a step e = E ehat moves the projections by P ehat, and no n x d temporary appears.

All is float64. A direction with s below 1e-13 of the largest is left out of Z: its share of a gradient is below 3e-7 of
the largest, and no point leaves its ball for want of it.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import Barrier

import torch
from torch import Tensor

from convex_head.problems.base import Network

# Above this many forms (47 classes in pairs) factors are made when asked for, because each holds K x k numbers.
_EAGER_FORMS = 1100
_NULL = 1e-13
_TOGETHER = 32
# Share of a neuron's square that the others leave, below which they are taken as dependent.
_DEPENDENT = 1e-8


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

    def are_many(self) -> bool:
        """They are factored when asked for, not all at once."""
        return len(self.plus) > _EAGER_FORMS

    def ends(self) -> list[Tensor]:
        """Functions of the first sign, then of the second where forms are pairs."""
        return [self.plus] if self.minus is None else [self.plus, self.minus]

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

    def scatter_pairs(self, per_form: Tensor, out: Tensor) -> None:
        """Add the blocks of (T, K, K) to (F, F, m, m), by the functions of row and column."""
        m, functions = out.shape[-1], out.shape[0]
        flat = out.view(functions * functions, m, m)
        for i, row in enumerate(self.ends()):
            for j, column in enumerate(self.ends()):
                block = per_form[:, i * m : (i + 1) * m, j * m : (j + 1) * m]
                flat.index_add_(0, row * functions + column, block)


@dataclass(frozen=True)
class Spectrum:
    """Factors of some forms (module docstring), in the dtype of the bulk computation but for ``combination``."""

    eigenvalues: Tensor  # (G, k)
    lift: Tensor  # (G, K, k) P
    combination: Tensor  # (G, K, k) Z, float64
    beta: Tensor  # (G, K)
    nu: Tensor  # (G, K)
    constant: Tensor  # (G,)

    def take(self, index: Tensor) -> Spectrum:
        """The factors of some of the forms."""
        parts = (self.eigenvalues, self.lift, self.combination, self.beta, self.nu, self.constant)
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
    def build(
        packed: PackedNetwork, gram: Tensor, coefficients: tuple[float, float, float], dtype: torch.dtype
    ) -> Screen:
        """Factor the products (F, m, m) of every function's neurons, in float64."""
        a, b, c = coefficients
        beta, nu = packed.signs.double(), packed.nu.double()
        eigenvalues, y = _eigh(gram)
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
        functions, m, d = packed.vectors.shape
        self.width = m * (1 if forms.minus is None else 2)
        flat = packed.vectors.double().reshape(functions * m, d)
        # (F, F, m, m): products of the neurons of every two functions.
        self._gram = (flat @ flat.mT).view(functions, m, functions, m).transpose(1, 2)
        self._all = None if forms.are_many() else self._factor(forms)
        self._curvatures: tuple[Tensor, Tensor] | None = None
        self._screen: Screen | None = None

    def screen(self) -> Screen:
        """Values and gradient norms of all functions at many points."""
        if self._screen is None:
            own = torch.diagonal(self._gram, dim1=0, dim2=1).permute(2, 0, 1)
            self._screen = Screen.build(self.packed, own, self.coefficients, self.dtype)
        return self._screen

    def take(self, index: Tensor) -> Spectrum:
        """Factors of the forms with these indices (G,)."""
        return self._factor(self.forms.take(index)) if self._all is None else self._all.take(index)

    def basis(self, index: Tensor, combination: Tensor) -> Tensor:
        """E = V'Z (G, d, k), float64, of the forms with these indices and their Z (G, K, k)."""
        return self.forms.take(index).gather(self.packed.vectors.double()).mT @ combination

    def curvatures(self) -> tuple[Tensor, Tensor]:
        """Smallest (at most 0) and largest (at least 0) eigenvalue of every form, (T,) each.

        Where forms are many, bounds: the smallest of f_p - f_q is at least that of f_p minus the largest of f_q.
        """
        if self._curvatures is None:
            if self._all is not None:
                low, high = self._all.eigenvalues.amin(-1), self._all.eigenvalues.amax(-1)
                self._curvatures = low.clamp_max(0), high.clamp_min(0)
            else:
                own = self._factor(Forms(torch.arange(len(self.packed.signs), device=self.packed.signs.device), None))
                low, high = own.eigenvalues.amin(-1).clamp_max(0), own.eigenvalues.amax(-1).clamp_min(0)
                plus, minus = self.forms.plus, self.forms.minus
                if minus is None:
                    self._curvatures = low[plus], high[plus]
                else:
                    self._curvatures = low[plus] - high[minus], high[plus] - low[minus]
        return self._curvatures

    def _factor(self, forms: Forms) -> Spectrum:
        a, _, c = self.coefficients
        signs, nu = self.packed.signs.double(), forms.gather(self.packed.nu.double())
        plus, minus = forms.plus, forms.minus
        if minus is None:
            beta, gram = signs[plus], self._gram[plus, plus]
        else:
            beta = torch.cat([signs[plus], -signs[minus]], dim=1)
            upper = torch.cat([self._gram[plus, plus], self._gram[plus, minus]], dim=2)
            lower = torch.cat([self._gram[minus, plus], self._gram[minus, minus]], dim=2)
            gram = torch.cat([upper, lower], dim=1)
        root, inverse = _root(gram, min(self.packed.vectors.shape[-1], gram.shape[-1]), beta != 0)
        hessian = 2 * a * (root.mT * beta.unsqueeze(1)) @ root
        eigenvalues, y = _eigh(0.5 * (hessian + hessian.mT))
        constant = c * (beta * nu.square()).sum(-1)
        bulk = (part.to(self.dtype) for part in (eigenvalues, root @ y, beta, nu, constant))
        eigenvalues, lift, beta, nu, constant = bulk
        return Spectrum(eigenvalues, lift, inverse @ y, beta, nu, constant)


def _root(gram: Tensor, rank: int, alive: Tensor) -> tuple[Tensor, Tensor]:
    """R' and S (G, K, k) with R'R = gram and S'gram S = I on its range.

    Of neurons that are independent by a Cholesky factor, else by an eigendecomposition.

    Args:
        gram: (G, K, K) products of neurons.
        rank: k, a bound of its rank.
        alive: (G, K) False where a neuron only pads.
    """
    size = gram.shape[-1]
    if rank < size:
        return _spectral_root(gram, rank)
    # Neurons that pad are made unit vectors of their own: nothing of them enters a form.
    root, fault = torch.linalg.cholesky_ex(gram + torch.diag_embed((~alive).to(gram.dtype)))
    one = torch.eye(size, dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(root.mT, one, upper=True)
    # What the others leave of a neuron's square is 1 / (gram^-1)_jj.
    left = inverse.square().sum(-1) * torch.diagonal(gram, dim1=-2, dim2=-1)
    independent = (fault == 0) & ((_DEPENDENT * left < 1) & (left > 0) | ~alive).all(-1)
    others = (~independent).nonzero().squeeze(1)
    if len(others):
        root[others], inverse[others] = _spectral_root(gram[others], rank)
    return root, inverse


def _spectral_root(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """:func:`_root` by an eigendecomposition, whose eigenvalues ascend."""
    square, w = _eigh(gram)
    square, w = square[:, -rank:].clamp_min(0), w[:, :, -rank:]
    root = square.sqrt()
    kept = square > _NULL * square[:, -1:]
    inverse = torch.where(kept, 1 / root.clamp_min(torch.finfo(root.dtype).tiny), torch.zeros_like(root))
    return w * root.unsqueeze(1), w * inverse.unsqueeze(1)


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of (G, K, K); of wide ones from a GPU on the processor, in threads.

    CUDA solves batches of symmetric matrices up to 32 wide at once, and wider ones one by one, in 0.8 ms each.
    """
    if matrices.device.type == "cpu" or matrices.shape[-1] <= _TOGETHER or len(matrices) == 1:
        return torch.linalg.eigh(matrices)
    return _in_threads(matrices)


def _in_threads(matrices: Tensor) -> tuple[Tensor, Tensor]:
    parts = _pool().map(torch.linalg.eigh, matrices.cpu().chunk(_threads()))
    values, vectors = (torch.cat(part).to(matrices.device) for part in zip(*parts, strict=True))
    return values, vectors


@cache
def _threads() -> int:
    """Processors of this process, shared with those that torchrun started beside it."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(32, mine // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads that share no threads of torch with each other: linear algebra that does is no faster than in one."""
    count, before = _threads(), torch.get_num_threads()
    started = Barrier(count + 1)

    def alone() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, initializer=alone)
    for _ in range(count):
        pool.submit(int)
    started.wait()
    # It is also what threads that start later get.
    torch.set_num_threads(before)
    return pool
