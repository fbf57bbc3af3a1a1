"""What the pages show of one entry, as plain values for the templates; shared by the leaderboard and the report.

Metadata belong to whoever made the record: every value is checked for its kind here, and text is bounded by the
templates' filter ``clip``.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from convex_head.records import EvalRecord
from convex_head.report.entries import Entry, is_bounded
from convex_head.report.pictures import pictures, pictures_attack
from convex_head.report.plots import curves
from convex_head.report.terminal import gap_text, short_attack
from convex_head.report.values import fact, is_finite, plain

_TEMPLATES = files("convex_head.report") / "templates"
_CERTIFICATE = ("status", "objective", "lower_bound", "gap", "radius", "reg", "neurons")
_COSTS = ("attempted", "broken", "robust_correct", "forwards", "backwards", "seconds")
_MANY = 40


def read_template(name: str) -> str:
    """A file of the folder ``templates``."""
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def environment() -> Environment:
    """Templates that escape everything and know no undefined name."""
    made = Environment(
        loader=FunctionLoader(read_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(percent=lambda value: f"{100 * value:.1f}", clip=plain, breakable=_breakable)
    return made


def _breakable(text: str, limit: int) -> Markup:
    """Escaped text whose lines may end after an underscore."""
    return escape(plain(text, limit)).replace("_", Markup("_<wbr>"))


def row(entry: Entry, siblings: Iterable[Entry], *, place: int = 0, with_pictures: bool = True) -> dict[str, Any]:
    """Everything that a template shows of ``entry``.

    Args:
        entry: the entry.
        siblings: entries among which the same weights at other eps are looked for.
        place: rank under its threat.
        with_pictures: show the adversarial examples that the record carries.
    """
    record, link = entry.record, entry.robustbench["link"]
    weights = record.model.get("fingerprint")
    family = [other for other in siblings if weights and other.record.model.get("fingerprint") == weights]
    lines = [plot for plot in curves(family) if any(entry.id in line["ids"] for line in plot["lines"])]
    return {
        "id": entry.id,
        "place": place,
        "name": entry.robustbench["name"],
        "link": link if link.startswith(("https://", "http://")) else "",
        "record": record,
        "flags": [(flag, record.flag_details.get(flag, "")) for flag in record.flags],
        "dataset": dataset_name(entry),
        "norm": record.threat.norm,
        "eps": record.threat.eps_text,
        "threat": str(record.threat),
        "training": fact(record, "training", str) or "",
        "head": fact(record, "head", str) or "",
        "radius": fact(record, "radius", (int, float)),
        "gap": fact(record, "gap", (int, float)),
        "gap_text": gap_text(record),
        "attacks": ", ".join(short_attack(name) for name in record.attacks),
        "autoattack": "autoattack" in record.attacks,
        "attack_rows": _attack_rows(record),
        "classes": _classes(record),
        "certificate": _certificate(record),
        "bounded": is_bounded(record),
        "facts": _facts(entry),
        "pictures": pictures(record) if with_pictures else [],
        "pictures_attack": pictures_attack(record),
        "curve": lines[0] if lines else None,
        "command": record.command if isinstance(record.command, str) else "",
    }


def dataset_name(entry: Entry) -> str:
    """Name of the dataset, as text whatever the record holds."""
    return str(entry.record.dataset.get("name", ""))


def _attack_rows(record: EvalRecord) -> list[tuple[str, list[str]]]:
    """Name and counts of each attack; what is no finite number stays empty."""
    return [
        (name, [_count(key, counts[key]) if is_finite(counts.get(key)) else "" for key in _COSTS])
        for name, counts in list(record.attacks.items())[:_MANY]
    ]


def _count(key: str, value: float) -> str:
    """Whole numbers; seconds below ten with a decimal."""
    return f"{value:.1f}" if key == "seconds" and abs(value) < 10 else f"{value:.0f}"


def _classes(record: EvalRecord) -> list[tuple[int, int, int, int]]:
    """(class, points, right without attack, right under attack), where labels and results are known."""
    labels = record.labels
    if not labels or not record.clean or not all(type(label) is int and 0 <= label < 10_000 for label in labels):
        return []
    known, robust = np.asarray(labels), record.robust
    clean = np.frombuffer(record.clean.encode("ascii"), dtype=np.uint8) == ord("1")
    found = []
    for label in np.unique(known):
        mine = known == label
        found.append((int(label), int(mine.sum()), int(clean[mine].sum()), int(robust[mine].sum())))
    return found


def _certificate(record: EvalRecord) -> list[tuple[str, str]]:
    """What is known of the head's training problem; empty for a head without a gap."""
    if fact(record, "gap", (int, float)) is None:
        return []
    found = [(key.replace("_", " "), fact(record, key, (str, int, float))) for key in _CERTIFICATE]
    return [(key, _text(value)) for key, value in found if value is not None]


def _facts(entry: Entry) -> list[tuple[str, str]]:
    """The rest of the metadata, rounded, nested values left out; and where the numbers come from."""
    record = entry.record
    hidden = _CERTIFICATE if fact(record, "gap", (int, float)) is not None else ()
    shown = [
        (key, _text(value))
        for key, value in record.metadata.items()
        if key not in hidden and isinstance(value, (str, int, float))
    ]
    parameters = record.model.get("parameters")
    origin = {
        "parameters": f"{parameters:,}" if isinstance(parameters, int) else None,
        "points": record.n,
        "seed": record.seed,
        "batch size": record.batch_size,
        "versions": _joined(record.versions),
        "hardware": _joined(record.hardware),
        "commit": record.commit,
        "created": record.created,
        "additional data": "yes" if entry.robustbench["additional_data"] else None,
        "venue": entry.robustbench["venue"],
        "authors": entry.robustbench["authors"],
    }
    return shown[:_MANY] + [(key, plain(value)) for key, value in origin.items() if value not in (None, "")]


def _joined(values: dict[str, Any]) -> str:
    return ", ".join(f"{plain(key, 40)} {plain(value, 60)}" for key, value in list(values.items())[:_MANY])


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else plain(value)
