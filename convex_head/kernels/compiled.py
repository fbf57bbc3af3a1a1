"""What compiled functions share: the decorators, and the tuples of arrays that they work on.

Compiled code is kept on disk, in a folder named by a digest of all files here, because numba itself looks only at the
file of a function to tell whether its code is out of date. Where no folder can be written, every process compiles anew.
Processes save under a lock: numba's own saving is a read and a write, between which another process may take the same
file for the code of other types.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

# Its types leave out options of the decorator and the configuration that are used here.
numba: Any = importlib.import_module("numba")
_FOLDER = Path("~/.cache/convex_head/kernels")
# Seconds to wait for another process that saves; it takes a fraction of one.
_PATIENCE = 30.0

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
    """For functions that Python calls; their code is kept on disk."""
    options = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy", "no_cfunc_wrapper": True}
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str((Path(before) if before else _FOLDER).expanduser() / _digest())
    try:
        return _saving_alone(numba.njit(cache=True, **options)(function))
    except (RuntimeError, OSError):
        return numba.njit(**options)(function)
    finally:
        numba.config.CACHE_DIR = before


def _saving_alone(dispatcher: Any) -> Any:
    """The dispatcher, whose code one process at a time saves."""
    cache = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if cache is not None:  # numba's, and not public
        save = cache.save

        def alone(key: Any, data: Any) -> None:
            with ExitStack() as held:
                with suppress(OSError, NotImplementedError):  # no locks in this file system, or nobody lets go
                    held.enter_context(FileLock(Path(cache._cache_path) / "saving.lock", timeout=_PATIENCE))
                save(key, data)

        cache.save = alone
    return dispatcher


def _digest() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


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
    """The N neurons of a network in a row, function by function, and the factors of S of its T forms.

    S is T where all forms are factored before the rows are passed over; else it is the number of a few that some rows
    need (:class:`Lanes`).
    """

    offsets: np.ndarray  # (F + 1,) first neuron of every function
    twice: np.ndarray  # (N,) 2 a beta
    linear: np.ndarray  # (N,) b beta nu
    base: np.ndarray  # (F,) c sum beta nu^2
    root: np.ndarray  # (F, M, M) transpose of a factor of V V'
    plus: np.ndarray  # (T,) functions of every form
    minus: np.ndarray  # (T,) or -1
    rank: np.ndarray  # (S,)
    eigenvalues: np.ndarray  # (S, M)
    lift: np.ndarray  # (S, M, M) P
    project: np.ndarray  # (S, M, M) P'
    curvature: np.ndarray  # (2, T) lower bounds, at most 0, of the eigenvalues of a form and of its negative


class Tables(NamedTuple):
    """Form, sign (1: negative) and rival or function of every (label, column); whether margins are differences."""

    form: np.ndarray
    negative: np.ndarray
    rival: np.ndarray
    pairwise: bool


class Few(NamedTuple):
    """What it takes to factor the forms that a few rows need when they need them."""

    gram: np.ndarray  # (N, N) products of the neurons, float64
    beta: np.ndarray  # (N,) signs
    a: float
    rows: int  # how many rows are worked on together
    mixed: np.ndarray  # (N, N) float64, in which combinations of neurons are added up


class Lanes(NamedTuple):
    """Entries (row, column) of the margins that are solved together, those of a form and sign next to each other.

    Each key is filled up to a multiple of some lanes with column -1.
    """

    keys: np.ndarray  # (L,) 2 form + negative
    slots: np.ndarray  # (L,) place of its factors in Compact
    first: np.ndarray  # (L + 1,) first lane of every key and past the last
    row: np.ndarray
    column: np.ndarray


class Sums(NamedTuple):
    """What a part of a chunk adds up, float64."""

    losses: np.ndarray  # (2,) smoothed, hard
    in_basis: np.ndarray  # (S, M, M) sums of ehat coefficient'
    spread: np.ndarray  # (S, M) with blur, sums of signed weight times spread
    projections: np.ndarray  # (N,) sums of weight times projection at the worst point
    weights: np.ndarray  # (N,) sums of weights
