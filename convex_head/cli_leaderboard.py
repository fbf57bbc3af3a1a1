"""``convex-head leaderboard``: entries in a folder to a page and a Markdown table, and the checks before that."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convex_head.cli_common import EXIT_CODES, FAILED, Debug, Json, OneLineErrors, Quiet, guarded
from convex_head.console import error_line, json_out, messages, printable, results, waiting
from convex_head.errors import EntryError

if TYPE_CHECKING:
    from convex_head.certificate_check import Certificate
    from convex_head.report import Entry

leaderboard = typer.Typer(
    cls=OneLineErrors, help="Build, check and extend a leaderboard.", no_args_is_help=True, epilog=EXIT_CODES
)

Folder = Annotated[Path, typer.Option("--dir", help="Folder with entries/, index.html and LEADERBOARD.md.")]
_DEFAULT = Path("leaderboard")
_NO_FOLDER = "{} is no folder; add a first record with 'convex-head leaderboard add'."


@leaderboard.command(epilog=EXIT_CODES)
@guarded
def build(folder: Folder = _DEFAULT, as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Write index.html and LEADERBOARD.md from entries/*.json."""
    entries = _entries(folder)
    written = _write_pages(folder, entries)
    if as_json:
        json_out({"entries": len(entries), "written": [os.fspath(path) for path in written]})
    _say_written(written, quiet or as_json)


@leaderboard.command(epilog=EXIT_CODES)
@guarded
def check(
    entry: Annotated[str | None, typer.Argument(help="Entry whose certificate is recomputed; needs --head.")] = None,
    folder: Folder = _DEFAULT,
    head: Annotated[Path | None, typer.Option(help="The entry's head file (safetensors).")] = None,
    features: Annotated[Path | None, typer.Option(help=".npz or .npy of the features it was trained on.")] = None,
    labels: Annotated[Path | None, typer.Option(help=".npy of labels, for a .npy of features.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Limit of the certificate's fresh solve.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Recompute counts, intervals and percentages; refuse flagged entries and out-of-date pages.

    With an entry, its head file and its training features, the certificate too.
    """
    from convex_head.report import Entry, check_admissible, check_together

    given = (entry, head, features)
    if any(item is None for item in given) and any(item is not None for item in given):
        raise EntryError("A certificate is recomputed from an entry, --head and --features; give all three.")
    if not folder.is_dir():
        raise EntryError(_NO_FOLDER.format(folder))
    problems, entries = [], []
    paths = sorted((folder / "entries").glob("*.json"))
    for path in paths:
        try:
            entries.append(Entry.load(path))
            check_admissible(entries[-1])
        except EntryError as error:
            problems.append(str(error))
    try:
        check_together(entries)
    except EntryError as error:
        problems.append(str(error))
    if not problems:
        stale = [
            path.name
            for path, text in _pages(folder, entries).items()
            if not path.exists() or path.read_text(encoding="utf-8") != text
        ]
        problems += [f"{name} is not what the entries give; run 'convex-head leaderboard build'." for name in stale]
    notes = _notes(entries)
    facts: dict[str, Any] = {"entries": len(paths), "consistent": True, "problems": problems, "notes": notes}
    if not problems and entry is not None and head is not None and features is not None:
        try:
            found = _certificate(folder, entry, head, features, labels, max_seconds, quiet)
        except EntryError as error:
            problems.append(str(error))
        else:
            facts["certificate"] = {"entry": entry, **asdict(found)}
            messages(quiet=quiet or as_json).print(
                f"{entry}: objective {found.objective:.6g}, lower bound {found.lower_bound:.6g}, gap {found.gap:.2e}: "
                "the certificate holds",
                markup=False,
            )
    facts["consistent"] = not problems
    if as_json:
        json_out(facts)
    for note in notes:
        messages(quiet=quiet or as_json).print(printable(f"note: {note}"), markup=False, soft_wrap=True)
    for problem in problems:
        error_line(messages(), problem)
    if problems:
        raise typer.Exit(FAILED)
    messages(quiet=quiet or as_json).print(f"{len(paths)} entries are consistent, the pages are current")


def _certificate(
    folder: Path, name: str, head: Path, features: Path, labels: Path | None, max_seconds: float | None, quiet: bool
) -> Certificate:
    """The certificate of an entry, recomputed.

    Raises:
        EntryError: the weights or a fresh lower bound contradict the entry.
    """
    from convex_head.certificate_check import check_certificate
    from convex_head.feature_files import read_features
    from convex_head.head import ConvexRobustHead
    from convex_head.report import Entry

    record = Entry.load(folder / "entries" / f"{name.removesuffix('.json')}.json").record
    fitted, data = ConvexRobustHead.load(head), read_features(features, labels)
    with waiting(messages(quiet=quiet), "solving again for a lower bound"):
        return check_certificate(record, fitted, *data[:2], max_seconds=max_seconds)


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
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn records into entries, one a name and threat; what 'check' would refuse is left out, with exit code 1."""
    from convex_head.records import EvalRecord
    from convex_head.report import Entry, check_admissible, check_together, is_bounded, load_entries

    listed = load_entries(folder / "entries")
    entries: dict[str, Entry] = {}
    refused = []
    for path in records:
        entry = Entry.from_record(
            EvalRecord.load(path), link=link, authors=authors, venue=venue, additional_data=additional_data
        )
        existing = folder / "entries" / f"{entry.id}.json"
        if entry.id in entries:
            raise EntryError(f"{path} makes the entry {entry.id} a second time; give one of the records another name.")
        if existing.exists() and not replace:
            raise EntryError(f"{existing} exists; pass --replace, or give the record another name.")
        try:
            entry.check()
            check_admissible(entry)
            if not is_bounded(entry.record):
                raise EntryError(
                    f"{entry.id} has a gap without objective and lower_bound, so it cannot be recomputed. "
                    "Put all three into the record's metadata, as 'convex-head evaluate --head' does."
                )
            others = [one for one in [*listed, *entries.values()] if one.id != entry.id]
            check_together([*others, entry])
        except EntryError as error:
            refused.append(str(error))
        else:
            entries[entry.id] = entry
    written = [entry.save(folder / "entries") for entry in entries.values()]
    if entries:
        written += _write_pages(folder, _entries(folder))
    notes = _notes(entries.values())
    if as_json:
        written_text = [os.fspath(path) for path in written]
        json_out({"added": list(entries), "refused": refused, "written": written_text, "notes": notes})
    _say_written(written, quiet or as_json)
    for note in notes:
        messages(quiet=quiet or as_json).print(printable(f"note: {note}"), markup=False, soft_wrap=True)
    for problem in refused:
        error_line(messages(), problem)
    if refused:
        raise typer.Exit(FAILED)


@leaderboard.command(epilog=EXIT_CODES)
@guarded
def serve(
    folder: Folder = _DEFAULT,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show the built page at http://127.0.0.1:PORT, to this machine only, until Ctrl-C."""
    from convex_head.page_server import page_server

    with page_server(folder, port) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        if as_json:
            json_out({"url": url, "folder": os.fspath(folder)})
        messages(quiet=quiet or as_json).print(f"{url} shows {folder}; Ctrl-C ends", markup=False)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


@leaderboard.command(epilog=EXIT_CODES)
@guarded
def export(
    folder: Folder = _DEFAULT,
    robustbench: Annotated[
        Path | None, typer.Option(help="Folder for one JSON an entry with RobustBench's fields alone.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print the RobustBench fields of all entries as JSON, or write files for those that RobustBench would list."""
    from convex_head.errors import RecordError
    from convex_head.json_files import write_json
    from convex_head.report import ranked
    from convex_head.robust_bench_json import export_record

    entries = ranked(_entries(folder))
    if robustbench is None:
        listed = [entry.robustbench for entry in entries]
        if as_json:
            json_out(listed)
        else:
            results().print_json(data=listed)
        return
    written, left_out = [], {}
    for entry in entries:
        keys = ("authors", "link", "venue", "architecture", "additional_data", "reported")
        try:
            payload = export_record(entry.record, **{key: entry.robustbench[key] for key in keys})
        except RecordError as error:
            left_out[entry.id] = str(error)
        else:
            written.append(robustbench / f"{entry.id}.json")
            write_json(written[-1], payload, indent=2)
    if as_json:
        json_out({"written": [os.fspath(path) for path in written], "left_out": left_out})
    _say_written(written, quiet or as_json)
    for name, reason in left_out.items():
        messages(quiet=quiet or as_json).print(printable(f"left out {name}: {reason}"), markup=False)


def _entries(folder: Path) -> list[Entry]:
    from convex_head.report import load_entries

    if not folder.is_dir():
        raise EntryError(_NO_FOLDER.format(folder))
    return load_entries(folder / "entries")


def _notes(entries: Iterable[Entry]) -> list[str]:
    """What a reader of these entries should know, though it contradicts nothing."""
    from convex_head.history import unknown_commits
    from convex_head.report import is_bounded

    listed = list(entries)
    unknown = unknown_commits(entry.record.commit for entry in listed if entry.record.commit)
    notes = [
        f"{entry.id}: a gap without its bounds was not recomputed" for entry in listed if not is_bounded(entry.record)
    ]
    for entry in listed:
        if entry.record.commit in unknown:
            why = "of a modified checkout" if entry.record.commit.endswith("+") else "not in this checkout's history"
            notes.append(f"{entry.id}: its commit {entry.record.commit[:12]} is {why}, so no one can repeat it exactly")
    return notes


def _pages(folder: Path, entries: list[Entry]) -> dict[Path, str]:
    """Path -> content of everything that is built from the entries."""
    from convex_head.report import render_markdown, render_page

    return {folder / "index.html": render_page(entries), folder / "LEADERBOARD.md": render_markdown(entries)}


def _write_pages(folder: Path, entries: list[Entry]) -> list[Path]:
    pages = _pages(folder, entries)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return list(pages)


def _say_written(paths: list[Path], quiet: bool) -> None:
    for path in paths:
        messages(quiet=quiet).print(f"wrote {path}", markup=False)
