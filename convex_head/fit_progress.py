"""What ``convex-head fit`` shows while it runs: a bar on a terminal, now and then a line in a log.

A fit has no known number of steps. The share that is done is read from the gap on a logarithmic scale,

    share = log(first gap / gap) / log(first gap / tol),

or from the time limit where that is further.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from convex_head.console import clock, is_live, progress_bars
from convex_head.solvers.result import Progress

_LINE_SECONDS = 30.0


@contextmanager
def fit_progress(console: Console, tol: float, max_seconds: float | None) -> Iterator[FitProgress]:
    """A callback for ``ConvexRobustHead.fit`` that shows gap and time left on ``console``."""
    with progress_bars(console) as bars:
        task = bars.add_task("fit", total=1.0, note="")

        def show(share: float, text: str) -> None:
            bars.update(task, completed=share, note=text)

        yield FitProgress(console, tol, max_seconds, show if is_live(console) else None)


class FitProgress:
    """Called with each :class:`~convex_head.solvers.result.Progress`.

    Args:
        console: where a log gets a line each half minute.
        tol: relative gap aimed at.
        max_seconds: limit of the fit, or None.
        show: gets share done and text; None writes lines instead.
    """

    def __init__(self, console: Console, tol: float, max_seconds: float | None, show: object = None) -> None:
        self.console, self.tol, self.max_seconds, self.show = console, tol, max_seconds, show
        self.first = math.nan
        self.told = 0.0
        self.share = 0.0

    def __call__(self, progress: Progress) -> None:
        self.share = max(self.share, self._share(progress))
        text = (
            f"gap {progress.gap:.1e}, aim {self.tol:.0e}, objective {progress.primal:.4g}, {progress.neurons} neurons"
        )
        if callable(self.show):
            self.show(self.share, text)
        elif progress.seconds - self.told >= _LINE_SECONDS:
            self.told = progress.seconds
            left = f", about {clock(progress.seconds * (1 / self.share - 1))} left" if self.share > 0 else ""
            self.console.print(f"{clock(progress.seconds)} fit: {text}{left}", style="dim", markup=False)

    def _share(self, progress: Progress) -> float:
        """Share done, in [0, 1]."""
        if not self.first > 0 and math.isfinite(progress.gap) and progress.gap > 0:
            self.first = progress.gap
        found = 0.0
        if progress.gap <= self.tol:
            found = 1.0
        elif 0 < self.tol < self.first and progress.gap < self.first:
            found = math.log(self.first / progress.gap) / math.log(self.first / self.tol)
        if self.max_seconds:
            found = max(found, progress.seconds / self.max_seconds)
        return min(1.0, found)
