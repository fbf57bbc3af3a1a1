"""Blurred minima over balls on a GPU in one kernel; the reference is minimise_blurred in adversary/trust_region.py.

Newton's iterations stay in registers, and end for each tile of rows by themselves: nothing waits for the slowest row of
all, and no number goes to the host between them. Triton comes with torch's CUDA builds; where it is missing, or finds
no compiler to build its launcher with, :func:`kernel` is None and the reference runs.
"""

from __future__ import annotations

import importlib
import logging
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Imported when a GPU first asks for them: that takes a while, and few need it.
triton: Any = None
tl: Any = None

# Numbers of a tile, at most, where it has several rows.
_TILE = 2048


# No annotations: Triton reads them.
def _blurred(  # type: ignore[no-untyped-def]
    gradient, eigenvalues, settings, value, multiplier, e, spread, rows, k, tiles, K: tl.constexpr, R: tl.constexpr
):
    """One tile: R rows of a block, which has so many ``tiles``, in K >= k coordinates."""
    number = tl.program_id(0)
    block = (number // tiles).to(tl.int64)
    i, j = (number % tiles) * R + tl.arange(0, R), tl.arange(0, K)
    radius, blur, flat = tl.load(settings), tl.load(settings + 1), tl.load(settings + 2)
    tol, tiny, most = tl.load(settings + 3), tl.load(settings + 4), tl.load(settings + 5)
    curved = j < k
    eigenvalue = tl.load(eigenvalues + block * k + j, mask=curved, other=0.0)
    lowest = tl.min(tl.where(curved, eigenvalue, most), 0)
    # The flat coordinates act as one, of curvature 0.
    lowest = tl.where(flat > 0, tl.minimum(lowest, 0.0), lowest)
    gap, flat_gap = tl.where(curved, eigenvalue - lowest, 0.0), -lowest
    place = (block * rows + i[:, None]) * k + j[None, :]
    real = (i[:, None] < rows) & curved[None, :]
    g = tl.load(gradient + place, mask=real, other=0.0)
    size = tl.where(curved[None, :], tl.sqrt(g * g + blur * blur), 0.0)
    largest = tl.max(gap, 0)
    largest = tl.where(flat > 0, tl.maximum(largest, flat_gap), largest)
    delta = tl.max(size / radius - gap[None, :], 1)
    delta = tl.maximum(delta, tl.where(flat > 0, flat / radius - flat_gap, 0.0))
    delta = tl.maximum(delta, tl.sqrt(tl.sum(size * size, 1) + flat * flat) / radius - largest)
    delta = tl.maximum(delta, tl.maximum(lowest, 0.0))
    moving, step = 1, 0
    while (moving > 0) & (step < 60):
        inverse = 1.0 / tl.maximum(gap[None, :] + delta[:, None], tiny)
        square = size * inverse * (size * inverse)
        flat_inverse = 1.0 / tl.maximum(flat_gap + delta, tiny)
        flat_square = flat * flat_inverse * (flat * flat_inverse)
        norm2 = tl.sum(square, 1) + flat_square
        slope = tl.sum(square * inverse, 1) + flat_square * flat_inverse
        new = tl.maximum(delta, delta + norm2 / tl.maximum(slope, tiny) * (tl.sqrt(norm2) / radius - 1.0))
        moving = tl.sum((new - delta > tol * new).to(tl.int32), 0)
        delta = tl.where(moving > 0, new, delta)
        step += 1
    inverse = 1.0 / tl.maximum(gap[None, :] + delta[:, None], tiny)
    flat_inverse = 1.0 / tl.maximum(flat_gap + delta, tiny)
    norm2 = tl.sum(size * inverse * (size * inverse), 1) + flat * flat_inverse * (flat * flat_inverse)
    quotient = tl.sum(size * (size * inverse), 1) + flat * (flat * flat_inverse)
    # Onto the sphere from outside, where rounding left it.
    inside = radius / tl.sqrt(tl.maximum(norm2, radius * radius))
    shrink = inside[:, None] * inverse
    one = block * rows + i
    tl.store(value + one, -0.5 * (quotient + (delta - lowest) * radius * radius), mask=i < rows)
    tl.store(multiplier + one, tl.maximum(delta - lowest, 0.0), mask=i < rows)
    tl.store(e + place, -g * shrink, mask=real)
    tl.store(spread + place, blur * shrink * (blur * shrink), mask=real)


@cache
def kernel() -> Any:
    """The compiled kernel; None where there is no Triton, or it does not work."""
    global triton, tl
    try:
        triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
        # Compiled once a width, whatever the numbers of rows are divisible by.
        found = triton.jit(_blurred, do_not_specialize=["rows", "k", "tiles"])
        one = torch.ones(1, 1, 2, device="cuda" if torch.cuda.is_available() else "cpu")
        _launch(found, one[0], one, 1.0, 0.1, 3)
    except Exception as fault:  # whatever a compiler can raise: the reference does the same, if slower
        logging.getLogger(__name__).warning("Triton does not work here, worst cases take longer: %s", fault)
        return None
    return found


def minimise_blurred(
    eigenvalues: Tensor, gradient: Tensor, radius: float, blur: float, dimension: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Value, multiplier (G, B), minimiser and spread (G, B, k) as in trust_region.minimise_blurred; None: not here.

    Args:
        eigenvalues: (G, k).
        gradient: (G, B, k), on a GPU.
        radius, blur, dimension: as there.
    """
    fits = gradient.ndim == 3 and eigenvalues.shape == (gradient.shape[0], gradient.shape[2]) and gradient.numel() > 0
    found = kernel() if fits else None
    return None if found is None else _launch(found, eigenvalues, gradient, radius, blur, dimension)


def _launch(
    found: Any, eigenvalues: Tensor, gradient: Tensor, radius: float, blur: float, dimension: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks, rows, k = gradient.shape
    information = torch.finfo(gradient.dtype)
    numbers = [radius, blur, blur * (dimension - k) ** 0.5, 4 * information.eps, information.tiny**0.5, information.max]
    settings = torch.tensor(numbers, dtype=gradient.dtype, device=gradient.device)
    value, multiplier = (gradient.new_empty(blocks, rows) for _ in range(2))
    e, spread = (gradient.new_empty(gradient.shape) for _ in range(2))
    wide = triton.next_power_of_2(k)
    high = max(1, _TILE // wide)
    tiles = triton.cdiv(rows, high)
    given = gradient.contiguous(), eigenvalues.contiguous(), settings
    # Triton launches on the device that is current, not on that of its arguments.
    with torch.cuda.device(gradient.device) if gradient.is_cuda else nullcontext():
        found[(blocks * tiles,)](*given, value, multiplier, e, spread, rows, k, tiles, K=wide, R=high)
    return value, multiplier, e, spread
