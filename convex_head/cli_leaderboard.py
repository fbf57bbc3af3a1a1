"""``convex-head leaderboard``: entries in a folder to a page and a Markdown table, and the checks before that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convex_head.cli_common import EXIT_CODES, FAILED, Debug, Quiet, guarded
from convex_head.console import error_line, messages, results
from convex_head.errors import EntryError

if TYPE_CHECKING:
    from convex_head.report import Entry

leaderboard = typer.Typer(help="Build, check and extend a leaderboard.", no_args_is_help=True, epilog=EXIT_CODES)

Folder = Annotated[Path, typer.Option("--dir", help="Folder with entries/, index.html and LEADERBOARD.md.")]
_DEFAULT = Path("leaderboard")


@leaderboard.command(epilog=EXIT_CODES)
@guarded
def build(folder: Folder = _DEFAULT, quiet: Quiet = False, debug: Debug = False) -> None:
    """Write index.html and LEADERBOARD.md from entries/*.json."""
    for path, text in _generated(folder).items():
        path.write_text(text, encoding="utf-8")
        messages(quiet=quiet).print(f"wrote {path}", markup=False)


@leaderboard.command(epilog=EXIT_CODES)
@guarded
def check(folder: Folder = _DEFAULT, quiet: Quiet = False, debug: Debug = False) -> None:
    """Recompute counts, intervals and percentages; refuse flagged entries and out-of-date pages."""
    from convex_head.report import Entry, check_admissible

    problems = []
    paths = sorted((folder / "entries").glob("*.json"))
    for path in paths:
        try:
            check_admissible(Entry.load(path))
        except EntryError as error:
            problems.append(str(error))
    if not problems:
        stale = [
            path.name
            for path, text in _generated(folder).items()
            if not path.exists() or path.read_text(encoding="utf-8") != text
        ]
        problems += [f"{name} is not what the entries give; run 'convex-head leaderboard build'." for name in stale]
    for problem in problems:
        error_line(messages(), problem)
    if problems:
        raise typer.Exit(FAILED)
    messages(quiet=quiet).print(f"{len(paths)} entries are consistent, the pages are current")


@leaderboard.command(epilog=EXIT_CODES)
@guarded
def add(
    records: Annotated[list[Path], typer.Argument(help="Records of 'convex-head evaluate' or 'bench'.")],
    folder: Folder = _DEFAULT,
    link: Annotated[str, typer.Option(help="Paper or code.")] = "",
    authors: Annotated[str, typer.Option()] = "",
    venue: Annotated[str, typer.Option()] = "",
    additional_data: Annotated[bool, typer.Option(help="Trained on more than the dataset.")] = False,
    replace: Annotated[bool, typer.Option(help="Overwrite an entry of the same name.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn records into entries; refuses what 'check' would refuse."""
    from convex_head.records import EvalRecord
    from convex_head.report import Entry, check_admissible

    entries = [
        Entry.from_record(
            EvalRecord.load(path), link=link, authors=authors, venue=venue, additional_data=additional_data
        )
        for path in records
    ]
    for entry in entries:
        check_admissible(entry)
        existing = folder / "entries" / f"{entry.id}.json"
        if existing.exists() and not replace:
            raise EntryError(f"{existing} exists; pass --replace, or give the record another name.")
    for entry in entries:
        path = entry.save(folder / "entries")
        messages(quiet=quiet).print(f"wrote {path}", markup=False)
    build(folder=folder, quiet=quiet, debug=debug)


@leaderboard.command(epilog=EXIT_CODES)
@guarded
def export(
    folder: Folder = _DEFAULT,
    robustbench: Annotated[
        Path | None, typer.Option(help="Folder for one JSON an entry with RobustBench's fields alone.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Print the RobustBench fields of all entries as JSON, or write files for those that RobustBench would list."""
    from convex_head.errors import RecordError
    from convex_head.json_files import write_json
    from convex_head.report import ranked
    from convex_head.robust_bench_json import export_record

    entries = ranked(_entries(folder))
    if robustbench is None:
        results().print_json(json.dumps([entry.robustbench for entry in entries]))
        return
    for entry in entries:
        keys = ("authors", "link", "venue", "architecture", "additional_data", "reported")
        try:
            payload = export_record(entry.record, **{key: entry.robustbench[key] for key in keys})
        except RecordError as error:
            messages().print(f"left out {entry.id}: {error}", markup=False)
        else:
            write_json(robustbench / f"{entry.id}.json", payload, indent=2)


def _entries(folder: Path) -> list[Entry]:
    from convex_head.report import load_entries

    if not (folder / "entries").is_dir():
        raise EntryError(f"{folder}/entries is no folder; add a first record with 'convex-head leaderboard add'.")
    return load_entries(folder / "entries")


def _generated(folder: Path) -> dict[Path, str]:
    """Path -> content of everything that is built from the entries."""
    from convex_head.report import render_markdown, render_page

    entries = _entries(folder)
    return {folder / "index.html": render_page(entries), folder / "LEADERBOARD.md": render_markdown(entries)}
