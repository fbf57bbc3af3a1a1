"""One look for everything that the command line prints: results on stdout, progress and errors on stderr.

Colours and moving bars appear on a terminal only (rich decides, NO_COLOR is respected); a log file gets plain
lines.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def results() -> Console:
    """Where results go: stdout. A pipe has no width; 160 columns keep tables whole."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def messages(*, quiet: bool = False) -> Console:
    """Where progress and notes go: stderr; ``quiet`` drops all of it."""
    return Console(stderr=True, highlight=False, quiet=quiet, soft_wrap=not sys.stderr.isatty())


def progress_bars(console: Console) -> Progress:
    """Bars with the share done, time spent and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


def table(title: str, columns: list[str], *, right: frozenset[str] = frozenset()) -> Table:
    """An empty table in the house's look; the columns in ``right`` are numbers, which never wrap."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
    for column in columns:
        result.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column in right,
            min_width=min(8, len(column)),
        )
    return result


def percent(value: float) -> str:
    """0.1234 as "12.3"."""
    return f"{100 * value:.1f}"


def error_line(console: Console, message: str) -> None:
    """One line, "error: what is wrong and what to do", whatever characters the message holds."""
    line = Text("error: ", style="bold red").append(Text(" ".join(message.split()), style="not bold default"))
    console.print(line, soft_wrap=True)
