"""The leaderboard page: one HTML file that needs no network.

Python computes everything that can be shown (numbers, intervals, plot coordinates); the template escapes it all;
the script sorts, filters and compares. The page's security policy admits no script but that one, by its
hash, so that markup in an entry stays text even if an escape were missing. The same entries give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup

from convex_head.report.entries import Entry, ranked
from convex_head.report.plots import curves, frontier
from convex_head.report.rows import dataset_name, environment, read_template, row
from convex_head.report.values import fact


def render_page(entries: Iterable[Entry], *, title: str = "Robustness leaderboard", note: str = "") -> str:
    """The page as HTML text.

    Args:
        entries: in any order; ids are unique.
        title: heading of the page.
        note: one paragraph below it.
    """
    boards = [list(group) for _, group in groupby(ranked(entries), key=_board_key)]
    listed = [entry for group in boards for entry in group]
    script = read_template("page.js")
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            note=note,
            rows=[row(entry, listed, place=k) for group in boards for k, entry in enumerate(group, start=1)],
            boards=[_board(group) for group in boards],
            curves=curves(listed),
            filters=_filters(listed),
            pairs={entry.id: _pair(entry) for entry in listed if entry.record.clean},
            # Both files are the package's own.
            style=Markup(read_template("page.css")),
            script=Markup(script),
            script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def _board_key(entry: Entry) -> tuple[str, str, float]:
    threat = entry.record.threat
    return dataset_name(entry), threat.norm, threat.eps


def _board(group: Sequence[Entry]) -> dict[str, Any]:
    """Entries under one threat on one dataset, with their frontier plot."""
    return {
        "dataset": dataset_name(group[0]),
        "threat": str(group[0].record.threat),
        "plot": frontier(group) if len(group) > 1 else None,
    }


def _filters(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Drop-down lists over what entries are compared by; AutoAttack's only where it tells entries apart."""
    columns = {
        ("dataset", "dataset"): [dataset_name(entry) for entry in entries],
        ("norm", "norm"): [entry.record.threat.norm for entry in entries],
        ("eps", "eps"): [entry.record.threat.eps_text for entry in entries],
        ("training", "backbone training"): [fact(entry.record, "training", str) or "" for entry in entries],
        ("head", "head"): [fact(entry.record, "head", str) or "" for entry in entries],
        ("autoattack", "AutoAttack"): ["yes" if "autoattack" in entry.record.attacks else "no" for entry in entries],
    }
    return [
        {"column": column, "label": label, "values": list(dict.fromkeys(values))}
        for (column, label), values in columns.items()
        if column != "autoattack" or len(set(values)) > 1
    ]


def _pair(entry: Entry) -> dict[str, str]:
    """What the paired comparison of two entries needs: the points they share, and who is right where."""
    record = entry.record
    return {
        "points": f"{record.dataset.get('fingerprint')} {record.threat.norm} {record.threat.eps!r} {record.n}",
        "robust": "".join("1" if right else "0" for right in record.robust),
    }
