"""What an evaluation tells while it runs: one event after each batch, to a callable or to a terminal bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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
    """

    attack: str
    stage: str
    batch: int
    batches: int
    stage_index: int
    stages: int
    robust_correct: int
    n: int

    @property
    def fraction(self) -> float:
        """Share of the stages that is done, in [0, 1]."""
        within = self.batch / self.batches if self.batches else 1.0
        return min(1.0, (self.stage_index + within) / max(1, self.stages))


Listener: TypeAlias = Callable[[EvalProgress], None]


@contextmanager
def listening(progress: Listener | bool | None) -> Iterator[Listener]:
    """A listener from what the caller gave: nothing, True for a bar on stderr, or a callable."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda event: None
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("robust {task.fields[robust]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            yield _Bar(bar)


class _Bar:
    """One line a stage."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[int, TaskID] = {}

    def __call__(self, event: EvalProgress) -> None:
        label = event.attack if event.attack == event.stage else f"{event.attack} {event.stage}"
        robust = f"{event.robust_correct}/{event.n}"
        if event.stage_index not in self._tasks:
            self._tasks[event.stage_index] = self._bar.add_task(label, total=event.batches, robust=robust)
        self._bar.update(
            self._tasks[event.stage_index], completed=event.batch, total=max(1, event.batches), robust=robust
        )
        if event.batches == 0:
            self._bar.update(self._tasks[event.stage_index], completed=1)
