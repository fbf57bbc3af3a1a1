"""Compiled: minima over balls of a tile of gradients that share a Hessian, as in adversary/trust_region.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convex_head.kernels.compiled import Setting, inner

_MAX_NEWTON = 60


@inner
def _secular(
    gaps: np.ndarray, size: int, magnitude: np.ndarray, width: int, floor: Any, setting: Setting
) -> np.ndarray:
    """Largest root delta >= floor of |magnitude / (gaps + delta)| = radius, or floor; (width,)."""
    zero, one, tiny = setting.zero, setting.one, setting.tiny
    inverse_radius = one / setting.radius
    delta, norm2, slope = np.empty_like(magnitude[0]), np.empty_like(magnitude[0]), np.empty_like(magnitude[0])
    largest = gaps[0]
    for l in range(width):
        delta[l], norm2[l] = floor, zero
    for i in range(size):
        m, gap = magnitude[i], gaps[i]
        largest = max(largest, gap)
        for l in range(width):
            norm2[l] += m[l] * m[l]
            delta[l] = max(delta[l], m[l] * inverse_radius - gap)
    for l in range(width):
        delta[l] = max(delta[l], math.sqrt(norm2[l]) * inverse_radius - largest)
    for _ in range(_MAX_NEWTON):
        for l in range(width):
            norm2[l], slope[l] = zero, zero
        for i in range(size):
            m, gap = magnitude[i], gaps[i]
            for l in range(width):
                inverse = one / max(gap + delta[l], tiny)
                square = (m[l] * inverse) * (m[l] * inverse)
                norm2[l] += square
                slope[l] += square * inverse
        moving = 0
        for l in range(width):
            step = norm2[l] / max(slope[l], tiny) * (math.sqrt(norm2[l]) * inverse_radius - one)
            new = max(delta[l] + step, delta[l])
            moving += new - delta[l] > setting.tol * new
            slope[l] = new
        if moving == 0:
            break
        for l in range(width):
            delta[l] = slope[l]
    return delta


@inner
def minimise(
    eigenvalues: np.ndarray,
    negative: int,
    rank: int,
    gradient: np.ndarray,
    width: int,
    setting: Setting,
    value: np.ndarray,
    magnitude: np.ndarray,
    gaps: np.ndarray,
    e: np.ndarray,
    spread: np.ndarray,
) -> None:
    """Add the minimum over the ball to value; write e and, with blur, spread (rank, width)."""
    zero, half = setting.zero, setting.half
    radius, blur = setting.radius, setting.blur
    if radius == zero or (rank == 0 and blur == zero):
        return
    size = rank
    for i in range(rank):
        gaps[i] = -eigenvalues[i] if negative else eigenvalues[i]
        g, m = gradient[i], magnitude[i]
        for l in range(width):
            m[l] = math.sqrt(g[l] * g[l] + blur * blur)
    if blur > zero and setting.features > rank:
        gaps[rank] = zero
        flat = blur * magnitude.dtype.type(math.sqrt(setting.features - rank))
        for l in range(width):
            magnitude[rank, l] = flat
        size = rank + 1
    lowest, place = gaps[0], 0
    for i in range(size):
        if gaps[i] < lowest:
            lowest, place = gaps[i], i
    for i in range(size):
        gaps[i] -= lowest
    delta = _secular(gaps, size, magnitude, width, max(lowest, zero), setting)
    norm2, quotient = np.zeros_like(magnitude[0]), np.zeros_like(magnitude[0])
    for i in range(size):
        m, gap = magnitude[i], gaps[i]
        for l in range(width):
            scaled = m[l] / max(gap + delta[l], setting.tiny)
            norm2[l] += scaled * scaled
            quotient[l] += m[l] * scaled
    for l in range(width):
        value[l] -= half * (quotient[l] + (delta[l] - lowest) * radius * radius)
        quotient[l] = radius / math.sqrt(max(norm2[l], radius * radius))
    for i in range(rank):
        g, out, around, gap = gradient[i], e[i], spread[i] if blur > zero else e[i], gaps[i]
        for l in range(width):
            shrink = quotient[l] / max(gap + delta[l], setting.tiny)
            out[l] = -g[l] * shrink
            if blur > zero:
                around[l] = (blur * shrink) * (blur * shrink)
    if blur == zero and lowest < zero:
        # The hard case: onto the sphere along the lowest eigenvector.
        for l in range(width):
            missing = radius * radius - norm2[l]
            if missing > setting.hard * radius * radius:
                length = math.sqrt(max(missing + e[place, l] * e[place, l], zero))
                e[place, l] = -length if gradient[place, l] > zero else length
