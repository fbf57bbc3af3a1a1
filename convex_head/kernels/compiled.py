"""What compiled functions share: the decorators, and the tuples of arrays that they work on.

Code is kept on disk by numba, which looks at a function's own file alone to tell whether it is out of date: after a
change here, or of a compiled function that another file uses, delete the folders ``__pycache__``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _inner(fastmath: set[str]) -> Decorator:
    """For functions that compiled code calls: nothing to call them from Python, which takes long to compile."""
    return numba.njit(
        nogil=True, fastmath=fastmath, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
    )


inner = _inner({"contract"})
# For sums over lanes alone: where a small number is added to a large one, the order of the terms matters.
inner_sums = _inner({"contract", "reassoc", "nsz"})


def entry(function: Callable[..., Any]) -> Callable[..., Any]:
    """For functions that Python calls; their code is kept on disk, where numba finds a place for it."""
    try:
        return numba.njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy", no_cfunc_wrapper=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy", no_cfunc_wrapper=True)(function)


class Setting(NamedTuple):
    """Numbers of one evaluation, in the bulk dtype but for the last three."""

    radius: Any
    blur: Any
    threshold: Any  # margins from here on need nothing
    window: Any  # nor do those so far above the smallest of their row
    mu: Any
    share: Any
    zero: Any
    one: Any
    half: Any
    tiny: Any
    tol: Any
    hard: Any
    joint: bool
    features: int
    examples: int


class Compact(NamedTuple):
    """The N neurons of a network in a row, function by function, and the factors of its T forms."""

    offsets: np.ndarray  # (F + 1,) first neuron of every function
    twice: np.ndarray  # (N,) 2 a beta
    linear: np.ndarray  # (N,) b beta nu
    base: np.ndarray  # (F,) c sum beta nu^2
    root: np.ndarray  # (F, M, M) transpose of a factor of V V'
    plus: np.ndarray  # (T,) functions of every form
    minus: np.ndarray  # (T,) or -1
    rank: np.ndarray  # (T,)
    eigenvalues: np.ndarray  # (T, M)
    lift: np.ndarray  # (T, M, M) P
    project: np.ndarray  # (T, M, M) P'
    curvature: np.ndarray  # (2, T) smallest eigenvalue of a form and of its negative, at most 0


class Tables(NamedTuple):
    """Form, sign (1: negative) and rival or function of every (column, label); whether margins are differences."""

    form: np.ndarray
    negative: np.ndarray
    rival: np.ndarray
    pairwise: bool


class Sums(NamedTuple):
    """What a part of a chunk adds up, float64."""

    losses: np.ndarray  # (2,) smoothed, hard
    in_basis: np.ndarray  # (T, M, M) sums of ehat coefficient'
    projections: np.ndarray  # (N,) sums of weight times projection at the worst point
    weights: np.ndarray  # (N,) sums of weights
