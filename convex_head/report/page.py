"""The leaderboard page: one HTML file that needs no network.

Python computes everything that can be shown (numbers, intervals, plot coordinates); the template escapes it all;
the script sorts, filters and compares. The page's security policy admits no script but that one, by its
hash, so that markup in an entry stays text even if an escape were missing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from itertools import groupby
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from convex_head.records import EvalRecord
from convex_head.report.entries import Entry, fact, ranked
from convex_head.report.plots import curves, frontier
from convex_head.report.terminal import gap_text, short_attack

_TEMPLATES = files("convex_head.report") / "templates"


def render_page(entries: Iterable[Entry], *, title: str = "Robustness leaderboard", note: str = "") -> str:
    """The page as HTML text.

    Args:
        entries: in any order; ids are unique.
        title: heading of the page.
        note: one paragraph below it.
    """
    listed = ranked(entries)
    style, script = _read("page.css"), _read("page.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=_percent, clip=_clip)
    template = environment.from_string(_read("page.html.j2"))
    return template.render(
        title=title,
        note=note,
        rows=[_row(entry) for entry in listed],
        boards=[_board(list(group)) for _, group in groupby(listed, key=_board_key)],
        curves=curves(listed),
        filters=_filters(listed),
        pairs={entry.id: _pair(entry) for entry in listed if entry.record.clean},
        # Both files are the package's own.
        style=Markup(style),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _clip(value: Any, limit: int = 300) -> str:
    """Text of bounded length, in one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _board_key(entry: Entry) -> tuple[str, str, float]:
    threat = entry.record.threat
    return str(entry.record.dataset.get("name", "")), threat.norm, threat.eps


def _board(group: Sequence[Entry]) -> dict[str, Any]:
    """Entries under one threat on one dataset, with their frontier plot."""
    record = group[0].record
    return {
        "dataset": str(record.dataset.get("name", "")),
        "threat": str(record.threat),
        "plot": frontier(group) if len(group) > 1 else None,
    }


def _filters(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Drop-down lists over the columns that have more than one value."""
    columns = {
        "dataset": [str(entry.record.dataset.get("name", "")) for entry in entries],
        "threat": [str(entry.record.threat) for entry in entries],
        "training": [fact(entry.record, "training", str) or "" for entry in entries],
        "head": [fact(entry.record, "head", str) or "" for entry in entries],
    }
    return [
        {"column": column, "values": list(dict.fromkeys(values))}
        for column, values in columns.items()
        if len(set(values)) > 1
    ]


def _row(entry: Entry) -> dict[str, Any]:
    record = entry.record
    link = entry.robustbench["link"]
    return {
        "id": entry.id,
        "name": entry.robustbench["name"],
        "link": link if link.startswith(("https://", "http://")) else "",
        "robustbench": entry.robustbench,
        "record": record,
        "dataset": str(record.dataset.get("name", "")),
        "threat": str(record.threat),
        "training": fact(record, "training", str) or "",
        "head": fact(record, "head", str) or "",
        "radius": fact(record, "radius", (int, float)),
        "gap": fact(record, "gap", (int, float)),
        "gap_text": gap_text(record),
        "facts": _facts(record),
        "attacks": [(name, short_attack(name), counts) for name, counts in record.attacks.items()],
        "classes": _classes(record),
    }


def _facts(record: EvalRecord) -> list[tuple[str, str]]:
    """Name and value of what the caller kept in the metadata, numbers rounded; nested values are left out."""
    shown = []
    for key, value in record.metadata.items():
        if isinstance(value, float):
            shown.append((key, f"{value:.4g}"))
        elif isinstance(value, (str, int)):
            shown.append((key, str(value)))
    return shown


def _classes(record: EvalRecord) -> list[tuple[int, int, int, int]]:
    """(class, points, right without attack, right under attack), where labels and results are known."""
    if not record.labels or not record.clean:
        return []
    labels, robust = np.asarray(record.labels), record.robust
    clean = np.frombuffer(record.clean.encode("ascii"), dtype=np.uint8) == ord("1")
    found = []
    for label in np.unique(labels):
        mine = labels == label
        found.append((int(label), int(mine.sum()), int(clean[mine].sum()), int(robust[mine].sum())))
    return found


def _pair(entry: Entry) -> dict[str, str]:
    """What the paired comparison of two entries needs: the points they share, and who is right where."""
    record = entry.record
    return {
        "points": f"{record.dataset.get('fingerprint')} {record.threat.norm} {record.threat.eps!r} {record.n}",
        "robust": "".join("1" if right else "0" for right in record.robust),
    }
