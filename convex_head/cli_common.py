"""What the commands share: option types, exit codes, and one line for every error.

0    done
1    it ran, and the answer is bad: a row failed, a record is flagged, a check found something
2    the command or its input is wrong; nothing ran
70   an error that this program did not expect: please report it, with --debug
130  interrupted; the same command goes on: bench always, evaluate with --state, fit with --checkpoint
"""

from __future__ import annotations

import functools
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from convex_head.console import error_line, messages, warning_line
from convex_head.errors import ConvexHeadError

EXIT_CODES = (
    "Exit codes: 0 done; 1 ran, with a bad answer (a failed row, a flagged record, a failed check); "
    "2 wrong command or input; 70 unexpected error; 130 interrupted (bench, evaluate --state, fit --checkpoint go on)."
)
FAILED, USAGE, UNEXPECTED, INTERRUPTED = 1, 2, 70, 130
# Options of 'evaluate' that say where things go and what is shown.
_NO_RESULT = frozenset({"out", "state", "as_json", "quiet", "debug"})
_PATH_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
EpsCurve = Annotated[
    str | None, typer.Option("--eps-curve", "--eps_curve", help="Further radii, for a curve: 1/255,2/255,4/255.")
]
DataDir = Annotated[str | None, typer.Option("--data-dir", "--data_dir", help="Folder of the dataset's files.")]


class OneLineErrors(TyperGroup):
    """A command group that answers wrong usage with one line and the next step, like every other error."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run; with ``standalone_mode`` end the process with the exit code."""
        run = functools.partial(super().main, args, prog_name, complete_var, False, windows_expand_args, **extra)
        if not standalone_mode:
            return run()
        try:
            code = run()
        except Exception as error:
            # The class of a usage error differs between Typer's versions.
            say = getattr(error, "format_message", None)
            if say is None:
                raise
            context = getattr(error, "ctx", None)
            if type(error).__name__ == "NoArgsIsHelpError" and context is not None:
                print(context.get_help())
            else:
                path = context.command_path if context is not None else "convex-head"
                error_line(messages(), f"{say().rstrip('.')}. '{path} --help' lists what there is.")
            code = USAGE
        sys.exit(code if isinstance(code, int) else 0)


def command_line(context: typer.Context) -> str:
    """The command as it was given, without what changes no result, for a record: it computes the record again."""
    words = ["convex-head", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if name in _NO_RESULT or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words += (parameter.opts if value else parameter.secondary_opts)[:1]
        else:
            for item in value if isinstance(value, (list, tuple)) else [value]:
                words += [parameter.opts[0], str(item)]
    return shlex.join(words)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors and warnings are one line each on stderr; its keyword ``debug`` shows where they arose."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings(record=not kwargs.get("debug")) as caught:
            try:
                _run(args, kwargs)
            finally:  # after the last bar
                _show_warnings(caught or [], bool(kwargs.get("quiet")))

    def _run(args: Any, kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # the reader of a pipe has seen enough
            raise
        except KeyboardInterrupt:
            messages().print(_interrupted(command.__name__, kwargs), markup=False)
            raise typer.Exit(INTERRUPTED) from None
        except ConvexHeadError as error:
            _show(error, str(error), kwargs)
            raise typer.Exit(USAGE) from None
        except (typer.Exit, typer.Abort):
            raise
        except _PATH_ERRORS as error:
            path = error.filename if error.filename is not None else "a file"
            _show(error, f"{path}: {error.strerror or error}. Give a path that can be used.", kwargs)
            raise typer.Exit(USAGE) from None
        except Exception as error:
            text = f"unexpected {type(error).__name__}: {error}; --debug shows where"
            _show(error, text, kwargs)
            raise typer.Exit(UNEXPECTED) from None

    return run


def _interrupted(command: str, kwargs: dict[str, Any]) -> str:
    """What becomes of the work: only some commands can keep it."""
    option = {"evaluate": "state", "fit": "checkpoint"}.get(command)
    if command == "bench" or (option and kwargs.get(option)):
        return "interrupted; what is finished is kept, the same command goes on"
    return f"interrupted; nothing is kept without --{option}" if option else "interrupted"


def _show_warnings(caught: Sequence[warnings.WarningMessage], quiet: bool) -> None:
    """This package's own warnings, one line each; those of other packages are for --debug."""
    for item in caught:
        if item.category.__module__.startswith("convex_head"):
            warning_line(messages(quiet=quiet), str(item.message))


def _show(error: Exception, text: str, kwargs: dict[str, Any]) -> None:
    console = messages()
    if kwargs.get("debug"):
        import traceback

        console.print("".join(traceback.format_exception(error)), markup=False)
    error_line(console, text)
