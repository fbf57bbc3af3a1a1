"""A report of chosen records for a paper's appendix: one HTML file without script.

It needs no network and prints well. A PDF is written by :mod:`convex_head.report.pdf`, a LaTeX table by
:mod:`convex_head.report.latex`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from markupsafe import Markup

from convex_head.records import EvalRecord
from convex_head.report.entries import Entry
from convex_head.report.plots import curves
from convex_head.report.rows import environment, read_template, row
from convex_head.report.terminal import footnotes

_Item = TypeVar("_Item")


def render_report(records: Sequence[EvalRecord], *, title: str = "Robustness evaluation", pictures: bool = True) -> str:
    """HTML with a table of all records, curves against eps, and a section a record.

    Args:
        records: in the order in which they are shown.
        title: heading.
        pictures: show the adversarial examples that records carry in ``metadata["examples"]``.
    """
    entries = numbered(records)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            # Each without siblings: the curves stand once, above the sections.
            rows=[row(entry, [], with_pictures=pictures) for entry in entries],
            curves=curves(entries),
            notes=board_notes(records),
            style=Markup(read_template("page.css")),
        )
    )


def numbered(records: Sequence[EvalRecord]) -> list[Entry]:
    """Entries with ids of their own: a report may show two evaluations of one model under one threat."""
    made = [Entry.from_record(record) for record in records]
    return [Entry(f"{k}-{entry.id}", entry.robustbench, entry.record) for k, entry in enumerate(made, start=1)]


def board(record: EvalRecord) -> tuple[str, str]:
    """Dataset and threat, which two records of one table share."""
    threat = record.threat
    norm = {"Linf": "l-infinity", "L2": "l2", "L1": "l1"}[threat.norm]
    return str(record.dataset.get("name", "")), f"{norm}, eps = {threat.eps_text}, n = {record.n}"


def by_board(items: Iterable[_Item], record: Callable[[_Item], EvalRecord]) -> dict[tuple[str, str], list[_Item]]:
    """Items by the board of their record, in the order in which boards first appear."""
    found: dict[tuple[str, str], list[_Item]] = {}
    for item in items:
        found.setdefault(board(record(item)), []).append(item)
    return found


def board_notes(records: Sequence[EvalRecord]) -> list[str]:
    """The footnotes of each board, once each."""
    groups = by_board(records, lambda record: record).values()
    return list(dict.fromkeys(line for group in groups for line in footnotes(group)))
