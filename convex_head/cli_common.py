"""What the commands share: option types, exit codes, and one line for every error.

0    done
1    it ran, and the answer is bad: a row failed, a record is flagged, a check found something
2    the command or its input is wrong; nothing ran
70   an error that this program did not expect: please report it, with --debug
130  interrupted; what was finished is kept, and the same command goes on
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from convex_head.console import error_line, messages
from convex_head.errors import ConvexHeadError

EXIT_CODES = (
    "Exit codes: 0 done; 1 ran, with a bad answer (a failed row, a flagged record, a failed check); "
    "2 wrong command or input; 70 unexpected error; 130 interrupted (the same command goes on)."
)
FAILED, USAGE, UNEXPECTED, INTERRUPTED = 1, 2, 70, 130

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
EpsCurve = Annotated[
    str | None, typer.Option("--eps-curve", "--eps_curve", help="Further radii, for a curve: 1/255,2/255,4/255.")
]
DataDir = Annotated[str | None, typer.Option("--data-dir", "--data_dir", help="Folder of the dataset's files.")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one line on stderr and an exit code; its keyword ``debug`` shows tracebacks."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            messages().print("interrupted; what is finished is kept, the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
        except ConvexHeadError as error:
            _show(error, str(error), kwargs)
            raise typer.Exit(USAGE) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            text = f"unexpected {type(error).__name__}: {error}; --debug shows where"
            _show(error, text, kwargs)
            raise typer.Exit(UNEXPECTED) from None

    return run


def _show(error: Exception, text: str, kwargs: dict[str, Any]) -> None:
    console = messages()
    if kwargs.get("debug"):
        import traceback

        console.print("".join(traceback.format_exception(error)), markup=False)
    error_line(console, text)
