"""LEADERBOARD.md: one table a dataset and threat, for readers of the repository."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from convex_head.report.entries import Entry, ranked
from convex_head.report.terminal import gap_text, short_attack
from convex_head.report.values import fact, plain

_HEADER = (
    "| # | model | backbone | training | head | clean % | robust % (95 %) | attacks | n | gap |\n"
    "| --: | --- | --- | --- | --- | --: | --: | --- | --: | --: |"
)


def render_markdown(entries: Iterable[Entry]) -> str:
    """The Markdown page of all entries, best first; ends in a newline."""
    parts = [
        "# Leaderboard",
        "Robust accuracy: right without attack and under every attack, over all n points, with its 95 % Wilson "
        "interval. Without `autoattack` among the attacks a number may be too high. Plots, pictures and paired "
        "comparisons: open `index.html`. Generated from `entries/*.json` by `convex-head leaderboard build`; do not "
        "edit.",
    ]
    for (dataset, threat), group in groupby(ranked(entries), key=_board):
        rows = [_row(place, entry) for place, entry in enumerate(group, start=1)]
        parts.append(f"## {_cell(dataset)}, {_cell(threat)}\n\n" + "\n".join([_HEADER, *rows]))
    return "\n\n".join(parts) + "\n"


def _board(entry: Entry) -> tuple[str, str]:
    return str(entry.record.dataset.get("name", "")), str(entry.record.threat)


def _row(place: int, entry: Entry) -> str:
    record = entry.record
    low, high = record.interval
    cells = [
        str(place),
        entry.robustbench["name"],
        entry.robustbench["architecture"],
        fact(record, "training", str) or "",
        fact(record, "head", str) or "",
        f"{100 * record.clean_accuracy:.1f}",
        f"{100 * record.robust_accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})",
        ", ".join(map(short_attack, record.attacks)),
        str(record.n),
        gap_text(record),
    ]
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """Text that cannot leave its cell nor become markup."""
    flat = plain(text, 200)
    for character in "\\`*_[]|<>&#!":
        flat = flat.replace(character, f"&#{ord(character)};" if character in "<>&|" else f"\\{character}")
    return flat
