"""One look for everything that the command line prints: results on stdout, progress and errors on stderr.

Colours and moving bars appear on a terminal only (rich decides; NO_COLOR and TERM=dumb are respected); a log file
gets plain lines.
"""

from __future__ import annotations

import contextlib
import json
import sys
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TaskProgressColumn, TextColumn
from rich.table import Column, Table
from rich.text import Text

_WIDE, _MIDDLE = 100, 76


def results() -> Console:
    """Where results go: stdout. A pipe has no width; 160 columns keep tables whole."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def messages(*, quiet: bool = False) -> Console:
    """Where progress and notes go: stderr; ``quiet`` drops all of it."""
    return Console(stderr=True, highlight=False, quiet=quiet, soft_wrap=not sys.stderr.isatty())


def is_live(console: Console) -> bool:
    """Can show something that moves: a terminal, and not a dumb one."""
    return console.is_terminal and not console.is_dumb_terminal and not console.quiet


def progress_bars(console: Console) -> Progress:
    """Bars with the share done and the time left, on one line each at any width; they go when done, a log gets none.

    A task has the field ``note``, which narrow terminals do not show, and may have ``begun``, the share that an earlier
    run had done.
    """
    width = console.width
    room = 40 if width >= _WIDE else max(8, min(26, width - 20))
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False, table_column=_one_line(room))]
    bar = 24 if width >= _WIDE else 12
    if width >= _MIDDLE:
        columns.append(BarColumn(bar_width=bar))
    columns += [TaskProgressColumn("{task.percentage:>3.0f}%"), TimeLeftColumn()]
    if width >= _MIDDLE:
        note = _one_line(width - room - bar - 22)
        columns.append(TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=note))
    return Progress(*columns, console=console, transient=True, disable=not is_live(console))


def finish_task(bars: Progress, task: TaskID, text: str) -> None:
    """A line that stays in place of a task's bar.

    The line first, and a refresh last: the thread that redraws must not find another height while a line is printed.
    """
    bars.console.print(Text(text, style="dim"))
    bars.remove_task(task)
    bars.refresh()


def waiting(console: Console, text: str) -> AbstractContextManager[Any]:
    """A spinner beside ``text`` while something without steps runs; nothing in a log."""
    return console.status(Text(text, no_wrap=True)) if is_live(console) else contextlib.nullcontext()


class TimeLeftColumn(ProgressColumn):
    """ "~1:23 left", from the share done since the start; the time taken while there is none and at the end."""

    def render(self, task: Task) -> Text:
        """The column's text for ``task``."""
        if task.finished:
            return Text(f"in {clock(task.finished_time or 0.0)}", no_wrap=True)
        elapsed, total = task.elapsed or 0.0, task.total or 0.0
        share = task.completed / total if total else 0.0
        begun = float(task.fields.get("begun", 0.0))
        left = f"~{clock(elapsed * (1.0 - share) / (share - begun))}" if share > begun else f"{clock(elapsed)}, ?"
        return Text(f"{left} left", no_wrap=True)


def clock(seconds: float) -> str:
    """83 as "1:23", 5000 as "1:23:20"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _one_line(width: int) -> Column:
    return Column(max_width=width, no_wrap=True, overflow="ellipsis")


def table(title: str, columns: list[str], *, right: frozenset[str] = frozenset()) -> Table:
    """An empty table in the house's look; the columns in ``right`` are numbers, which never wrap."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
    for column in columns:
        result.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column in right,
            overflow="ellipsis" if column in right else "fold",
            min_width=min(8, len(column)),
        )
    return result


def percent(value: float) -> str:
    """0.1234 as "12.3"."""
    return f"{100 * value:.1f}"


def printable(text: str) -> str:
    """One line without what a terminal would obey: a name in a record may hold escape sequences."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def error_line(console: Console, message: str) -> None:
    """One line, "error: what is wrong and what to do", whatever characters the message holds."""
    _labelled(console, "error: ", "bold red", message)


def warning_line(console: Console, message: str) -> None:
    """One line, "warning: what is not as it should be"."""
    _labelled(console, "warning: ", "bold yellow", message)


def _labelled(console: Console, label: str, style: str, message: str) -> None:
    line = Text(label, style=style).append(Text(printable(message), style="not bold default"))
    console.print(line, soft_wrap=True)


def json_out(value: Any) -> None:
    """One JSON document on stdout, for --json."""
    print(json.dumps(value, allow_nan=False), flush=True)
