"""torch's threads, where work is too small for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Elements of the feature matrix. On two busy cores two threads were 2 to 7 times slower than one up to 4e6 elements; an
# idle machine gains from two earlier, so this is a compromise.
_THREADS_PAY_FROM = 1_000_000


@contextmanager
def one_thread_if_small(elements: int) -> Iterator[None]:
    """Small tensors gain nothing from torch's threads, and on a busy machine these wait for each other.

    Args:
        elements: n d of the feature matrix that the work is about.
    """
    before = torch.get_num_threads()
    if elements >= _THREADS_PAY_FROM or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
