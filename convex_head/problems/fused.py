"""The fused pass on a CPU: margins, losses and derivatives of a chunk in compiled code, one call for its rows.

The same as :class:`problems.adjoint.Adjoint`, which is the reference and what other devices use. Here functions have
their own numbers of neurons, nothing is padded to the widest, and what an example needs stays in the cache from its
projections to its derivative (kernels/chunk.py). Threads are as many as torch has, each with its own rows and its own
sums, which are added in order.
"""

from __future__ import annotations

import importlib
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convex_head.adversary.margins import PackedNetwork
from convex_head.adversary.scan import SATISFIED, MarginScan
from convex_head.problems.losses import LOSSES, MarginLoss
from convex_head.problems.multipliers import constant
from convex_head.rows import Chunk

# Fewer rows are not worth a thread.
_ROWS_OF_A_THREAD = 512
# Where forms are many, those that some rows need are factored for these rows: at most so many rows, and bytes a thread.
_ROWS_OF_FEW = 512
_BYTES_OF_FEW = 1 << 28


@cache
def _kernels() -> tuple[Any, ...] | None:
    """Modules of compiled code, or None where numba is missing."""
    if importlib.util.find_spec("numba") is None:
        return None
    return tuple(importlib.import_module(f"convex_head.kernels.{name}") for name in ("compiled", "factors", "chunk"))


def serves(scan: MarginScan, loss: MarginLoss) -> bool:
    """Whether passes of this scan under this loss have compiled code."""
    return loss in LOSSES.values() and scan.rows.device.type == "cpu" and _kernels() is not None


def _by_label(chunk: Chunk, centre: Tensor) -> tuple[Chunk, Tensor]:
    """The rows of a streamed chunk in another order, in which those of a label need the same forms."""
    order = torch.argsort(chunk.labels, stable=True)
    return Chunk(chunk.rows, chunk.x[order], chunk.labels[order]), centre[order] if len(centre) else centre


class FusedPass:
    """Smoothed and hard loss of all rows, and the gradient of the smoothed one in the packed vectors (F, m, d).

    Args:
        scan: rows, classes and activation.
        packed: the network.
        loss: of the margins.
        radius, mu, blur: of the smoothed problem.
        examples: n of the mean, over all shards.
        centre: (rows, K) multipliers that the smoothing is centred on (problems/multipliers.py), or None.

    Attributes:
        losses: (2,) smoothed and hard loss, sums over the rows; with a centre the second has no meaning.
    """

    losses: Tensor

    def __init__(
        self,
        scan: MarginScan,
        packed: PackedNetwork,
        loss: MarginLoss,
        *,
        radius: float,
        mu: float,
        blur: float,
        examples: int,
        centre: Tensor | None = None,
    ):
        kernels = _kernels()
        assert kernels is not None
        self._compiled, self._factors, self._chunk = kernels
        self._scan, self._packed = scan, packed
        self._real: Any = np.float32 if scan.rows.dtype == torch.float32 else np.float64
        self._threads = torch.get_num_threads()
        self._alive = (packed.signs.reshape(-1) != 0).nonzero().squeeze(1)
        flat = packed.vectors.reshape(-1, packed.vectors.shape[-1])
        self._vectors = flat[self._alive].double()
        self._bulk = self._vectors.to(scan.rows.dtype)
        self._nu = packed.nu.reshape(-1)[self._alive].double().numpy()
        self._beta = packed.signs.reshape(-1)[self._alive].double().numpy()
        self._setting = self._settings(loss, radius, mu, blur, examples)
        self._centre = torch.zeros(0, scan.num_margins, dtype=scan.rows.dtype) if centre is None else centre
        self._constant = constant(centre, loss.share(scan.num_classes), mu)
        self._net = self._compact()
        self._tables = self._compiled.Tables(
            np.ascontiguousarray(scan.table_form.T.numpy()),
            np.ascontiguousarray((scan.table_sign < 0).to(torch.int64).T.numpy()),
            np.ascontiguousarray(scan.rival.T.numpy()),
            scan.pairwise,
        )
        self._combination = np.zeros(self._net.lift.shape)
        self._at_examples = torch.zeros_like(self._bulk)

    def _settings(self, loss: MarginLoss, radius: float, mu: float, blur: float, examples: int) -> Any:
        real, eps = self._real, float(np.finfo(self._real).eps)
        slack = blur * radius * self._scan.rows.d**0.5
        blur = blur if radius > 0 else 0.0
        share = loss.share(self._scan.num_classes)
        numbers = (radius, blur, SATISFIED + slack, loss.window(mu) + slack, mu, share, 0.0, 1.0, 0.5)
        limits = (float(np.finfo(real).tiny) ** 0.5, 4 * eps, 1e-3 * eps**0.5)
        return self._compiled.Setting(
            *(real(number) for number in (*numbers, *limits)), loss.joint, self._scan.rows.d, examples
        )

    def _compact(self) -> Any:
        a, b, c = self._scan.coefficients
        real, beta, nu = self._real, self._beta, self._nu
        functions, m = self._packed.signs.shape
        counts = np.bincount(self._alive.numpy() // m, minlength=functions)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        plus = self._scan.forms.plus.numpy()
        minus = np.full_like(plus, -1) if self._scan.forms.minus is None else self._scan.forms.minus.numpy()
        size = int((counts[plus] + np.where(minus >= 0, counts[minus], 0)).max())
        wide, own = -4 * (-size // 4), -4 * (-int(counts.max()) // 4)
        factored = 0 if self._scan.forms.are_many() else len(plus)
        base = np.bincount(self._alive.numpy() // m, weights=c * beta * nu**2, minlength=functions)
        return self._compiled.Compact(
            offsets=offsets,
            twice=(2 * a * beta).astype(real),
            linear=(b * beta * nu).astype(real),
            base=base.astype(real),
            root=np.zeros((functions, own, own), real),
            plus=plus,
            minus=minus,
            rank=np.zeros(factored, np.int64),
            eigenvalues=np.zeros((factored, wide), real),
            lift=np.zeros((factored, wide, wide), real),
            project=np.zeros((factored, wide, wide), real),
            curvature=np.zeros((2, len(plus)), real),
        )

    def run(self) -> None:
        """Pass over all rows.

        Raises:
            torch.linalg.LinAlgError: a form has no factors, because its numbers are not finite or nearly so.
        """
        try:
            self._run()
        except np.linalg.LinAlgError as fault:
            raise torch.linalg.LinAlgError(str(fault)) from fault

    def _run(self) -> None:
        with ThreadPoolExecutor(self._threads) as pool:
            self._factor(pool)
            self._sums = [self._empty() for _ in range(self._threads)]
            rows = min(self._scan.rows.chunk_rows, self._scan.rows.n)
            width = len(self._bulk)
            buffers = torch.empty(2, width * rows, dtype=self._bulk.dtype)
            for chunk in self._scan.rows:
                centre = self._centre[chunk.rows]
                if self._scan.rows.stream and self._scan.forms.are_many():
                    chunk, centre = _by_label(chunk, centre)
                shape = width, len(chunk.x)
                tau, coefficient = (buffer[: width * len(chunk.x)].view(shape) for buffer in buffers)
                torch.mm(self._bulk, chunk.x.mT, out=tau)
                self._work(chunk, centre.numpy(), tau.numpy(), coefficient.numpy(), pool)
                self._at_examples.addmm_(coefficient, chunk.x)
        self._collect()

    def _factor(self, pool: ThreadPoolExecutor) -> None:
        gram = (self._vectors @ self._vectors.mT).numpy()
        a, d, net = self._scan.coefficients[0], self._scan.rows.d, self._net
        given, threads = (gram, self._beta, a, d, net), range(self._threads)
        self._factors.factor_functions(gram, net)
        if self._scan.forms.are_many():
            self._factors.bend_functions(*given)
        else:
            calls = [(*given, self._combination, part, self._threads) for part in threads]
            self._share(pool, self._factors.factor, calls)
        self._few: list[Any] = [None for _ in threads]
        if self._scan.forms.are_many():
            # P and P' in the bulk dtype, Z and the sums in its basis in double precision.
            bytes_of_a_number = 2 * net.lift.itemsize + 2 * 8
            bytes_of_a_row = bytes_of_a_number * self._scan.num_margins * net.lift.shape[1] ** 2
            rows = max(1, min(_ROWS_OF_FEW, _BYTES_OF_FEW // max(1, bytes_of_a_row)))
            self._few = [self._compiled.Few(gram, self._beta, a, rows, np.zeros_like(gram)) for _ in threads]

    def _work(
        self, chunk: Chunk, centre: np.ndarray, tau: np.ndarray, coefficient: np.ndarray, pool: ThreadPoolExecutor
    ) -> None:
        n = len(chunk.x)
        parts = min(self._threads, max(1, n // _ROWS_OF_A_THREAD))
        edges = [n * part // parts for part in range(parts + 1)]
        labels = chunk.labels.numpy()
        given = (centre, self._net, self._tables, self._setting, coefficient)
        self._share(
            pool,
            self._chunk.run,
            [(tau, labels, edges[i], edges[i + 1], *given, self._sums[i], self._few[i]) for i in range(parts)],
        )

    @staticmethod
    def _share(pool: ThreadPoolExecutor, function: Any, calls: list[tuple[Any, ...]]) -> None:
        """Call the function with all arguments, the first here and each other in a thread."""
        waiting = [pool.submit(function, *arguments) for arguments in calls[1:]]
        function(*calls[0])
        for future in waiting:
            future.result()

    def _empty(self) -> Any:
        shape, neurons = self._net.lift.shape, len(self._beta)
        return self._compiled.Sums(
            np.zeros(2), np.zeros(shape), np.zeros(shape[:2]), np.zeros(neurons), np.zeros(neurons)
        )

    def _collect(self) -> None:
        _, b, c = self._scan.coefficients
        sums = self._compiled.Sums(*(sum(found[1:], start=found[0]) for found in zip(*self._sums, strict=True)))
        if self._scan.forms.are_many():
            mixed = sum(few.mixed for few in self._few)
        else:
            mixed = np.zeros((len(self._beta), len(self._beta)))
            self._factors.combine(self._net, self._combination, sums, mixed)
        on_self = self._beta * (b * sums.projections / np.maximum(self._nu, self._setting.tiny) + 2 * c * sums.weights)
        sums.losses[0] -= self._constant
        self.losses, self._mixed, self._on_self = (torch.from_numpy(part) for part in (sums.losses, mixed, on_self))

    def parts(self) -> tuple[Tensor, ...]:
        """What processes add up, in place: the losses, and of the N neurons the gradients at the examples (N, d),
        through the steps, in combinations of neurons (N, N), and through |v_j|, in units of v_j (N,)."""
        return self.losses, self._at_examples, self._mixed, self._on_self

    def gradient(self) -> Tensor:
        """(F, m, d), float64."""
        vectors, shape = self._vectors, self._packed.vectors.shape
        found = torch.addmm(self._at_examples.double(), self._mixed, vectors)
        found.addcmul_(self._on_self.unsqueeze(1), vectors)
        gradient = torch.zeros(shape[0] * shape[1], shape[2], dtype=torch.float64)
        gradient[self._alive] = found
        return gradient.view(shape)
