"""A one-line display of a running solve."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status as Spinner

from convex_head.solvers.result import Progress

_QUIET_SECONDS = 2.0


@contextmanager
def progress_line(show: bool | None, tol: float) -> Iterator[Callable[[Progress], None] | None]:
    """Yield a solver callback that shows objective, gap, neurons and the time left, or None.

    Args:
        show: True, False, or None for: on a terminal, once the solve has taken two seconds.
        tol: the gap aimed at; time left extrapolates the gap's decay towards it.
    """
    if show is False or (show is None and not sys.stderr.isatty()):
        yield None
        return
    line = _Line(tol, 0.0 if show else _QUIET_SECONDS)
    try:
        yield line
    finally:
        line.close()


class _Line:
    def __init__(self, tol: float, quiet_seconds: float):
        self.tol, self.quiet_seconds = tol, quiet_seconds
        self.history: list[Progress] = []
        self.console = Console(stderr=True)
        self.spinner: Spinner | None = None

    def __call__(self, progress: Progress) -> None:
        self.history.append(progress)
        if progress.seconds < self.quiet_seconds:
            return
        text = (
            f"objective {progress.primal:.5g}, gap {progress.gap:.2e} (aim {self.tol:.0e}), "
            f"{progress.neurons} neurons, {progress.seconds:.0f} s{self._time_left()}"
        )
        if not self.console.is_terminal:
            self.console.print(text)
            return
        if self.spinner is None:
            self.spinner = self.console.status(text)
            self.spinner.start()
        self.spinner.update(text)

    def _time_left(self) -> str:
        first, last = self.history[0], self.history[-1]
        if len(self.history) < 3 or not 0 < last.gap < first.gap or last.gap <= self.tol:
            return ""
        rate = math.log(first.gap / last.gap) / max(1e-9, last.seconds - first.seconds)
        return f", about {math.log(last.gap / self.tol) / rate:.0f} s left"

    def close(self) -> None:
        if self.spinner is not None:
            self.spinner.stop()
