"""What a fit shows while it runs: a bar on a terminal, now and then a line in a log.

A fit has no known number of steps. The share that is done is read from the gap on a logarithmic scale,

    share = log(first gap / gap) / log(first gap / tol),

or from the time limit where that is further.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console

from convex_head.console import clock, is_live, progress_bars
from convex_head.solvers.result import Progress

_LINE_SECONDS = 30.0
_QUIET_SECONDS = 2.0

Show = Callable[[float, str], None]


@contextmanager
def fit_progress(
    console: Console, tol: float, max_seconds: float | None, *, show: bool | None = True
) -> Iterator[FitProgress | None]:
    """A callback for ``ConvexRobustHead.fit`` that shows gap and time left on ``console``, or None.

    Args:
        console: where to.
        tol: relative gap aimed at.
        max_seconds: limit of the fit, or None.
        show: True, False, or None for: on a terminal alone, once the fit has taken two seconds.
    """
    live = is_live(console)
    if show is False or (show is None and not live):
        yield None
        return
    with ExitStack() as stack:

        def start() -> Show:
            bars = stack.enter_context(progress_bars(console))
            task = bars.add_task("fit", total=1.0, note="")
            return lambda share, text: bars.update(task, completed=share, note=text)

        display = FitProgress(console, tol, max_seconds, start if live else None, 0.0 if show else _QUIET_SECONDS)
        yield display
        display.close()


class FitProgress:
    """Called with each :class:`~convex_head.solvers.result.Progress`.

    Args:
        console: where a log gets a line each half minute.
        tol: relative gap aimed at.
        max_seconds: limit of the fit, or None.
        start: makes what gets share done and text; None writes lines instead.
        quiet_seconds: how long nothing is shown.
    """

    def __init__(
        self,
        console: Console,
        tol: float,
        max_seconds: float | None,
        start: Callable[[], Show] | None = None,
        quiet_seconds: float = 0.0,
    ) -> None:
        self.console, self.tol, self.max_seconds = console, tol, max_seconds
        self.start, self.quiet_seconds = start, quiet_seconds
        self.show: Show | None = None
        self.line = ""
        self.first = math.nan
        self.told = 0.0
        self.share = 0.0

    def __call__(self, progress: Progress) -> None:
        self.share = max(self.share, self._share(progress))
        text = (
            f"gap {progress.gap:.1e}, aim {self.tol:.0e}, objective {progress.primal:.4g}, {progress.neurons} neurons"
        )
        if self.start is not None and self.show is None and progress.seconds >= self.quiet_seconds:
            self.show = self.start()
        if self.start is not None:
            if self.show is not None:
                self.show(self.share, text)
        else:
            left = f", about {clock(progress.seconds * (1 / self.share - 1))} left" if self.share > 0 else ""
            self.line = f"{clock(progress.seconds)} fit: {text}"
            if progress.seconds - self.told >= _LINE_SECONDS:
                self.told = progress.seconds
                self._print(f"{self.line}{left}")

    def close(self) -> None:
        """The last line of a log."""
        if self.line:
            self._print(self.line)

    def _print(self, line: str) -> None:
        self.console.print(line, style="dim", markup=False)

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
