"""What an evaluation tells while it runs: one event after each batch, to a callable or to a terminal bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import monotonic
from typing import TypeAlias

from rich.progress import Progress, TaskID

from convex_head.console import clock, finish_task, messages, progress_bars


@dataclass(frozen=True)
class EvalProgress:
    """One event.

    Attributes:
        attack: name of the attack, "clean" before the first one.
        stage: part of a composite attack; equal to ``attack`` for a simple one.
        batch, batches: batches of this stage that are done, and all of them.
        stage_index, stages: position among the stages of all attacks, from 0, and their number.
        robust_correct: points right without attack and under everything so far.
        n: all points.
        eps: text of the radius, where several are attacked one after the other.
    """

    attack: str
    stage: str
    batch: int
    batches: int
    stage_index: int
    stages: int
    robust_correct: int
    n: int
    eps: str = ""

    @property
    def fraction(self) -> float:
        """Share of the stages that is done, in [0, 1]."""
        within = self.batch / self.batches if self.batches else 1.0
        return min(1.0, (self.stage_index + within) / max(1, self.stages))


Listener: TypeAlias = Callable[[EvalProgress], None]


@contextmanager
def listening(progress: Listener | bool | None) -> Iterator[Listener]:
    """A listener from what the caller gave: nothing, True for bars on stderr, or a callable."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda event: None
    else:
        with progress_bars(messages()) as bars:
            yield _Bars(bars)


def at_radius(listener: Listener, eps: str, number: int, count: int) -> Listener:
    """What an evaluation at radius ``number`` (from 0) of ``count`` tells, as a part of all of them."""

    def tell(event: EvalProgress) -> None:
        index = event.stage_index + number * event.stages
        listener(replace(event, eps=eps, stage_index=index, stages=count * event.stages))

    return tell


class _Bars:
    """A bar for all attacks and one for the present stage; a line that stays for each finished stage."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._all = bars.add_task("checking the model", total=None, note="")
        self._stage: tuple[int, TaskID, float] | None = None

    def __call__(self, event: EvalProgress) -> None:
        label = event.attack if event.attack == event.stage else f"{event.attack} {event.stage}"
        label = f"eps {event.eps} {label}" if event.eps else label
        robust = f"robust {event.robust_correct}/{event.n}"
        total = max(1, event.batches)
        if self._stage is None:
            self._bars.reset(self._all, description="all attacks", total=1.0, note="", begun=event.fraction)
        if self._stage is None or self._stage[0] != event.stage_index:
            task = self._bars.add_task(label, total=total, note=robust, begun=event.batch / total)
            self._stage = (event.stage_index, task, monotonic())
        _, task, began = self._stage
        self._bars.update(task, completed=event.batch, note=robust)
        self._bars.update(self._all, completed=event.fraction)
        if event.batch >= event.batches:
            finish_task(self._bars, task, f"{label}: {robust} in {clock(monotonic() - began)}")
