"""Leaderboard entries: RobustBench's fields, and the whole evaluation record in one object ``convex_head``.

    {"link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue",
     "architecture", "eps", "clean_acc", "reported", "autoattack_acc",     <- exactly RobustBench's
     "external",                  <- too, where attacks beside AutoAttack broke more points
     "convex_head": {...}}        <- EvalRecord.to_dict()

RobustBench writes accuracies as percent strings ("84.59") and eps as text ("8/255"). What can be recomputed is:
the record checks its counts against its per-example results, and the percentages must be those of the counts.
"reported" is the authors' own claim, which nothing here can check.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convex_head.errors import EntryError, RecordError
from convex_head.json_files import read_json, write_json
from convex_head.records import EvalRecord
from convex_head.report.consistency import check_attacks

TEXT_LIMIT = 300
ROBUSTBENCH_FIELDS: dict[str, type] = {
    "link": str,
    "name": str,
    "authors": str,
    "additional_data": bool,
    "number_forward_passes": int,
    "dataset": str,
    "venue": str,
    "architecture": str,
    "eps": str,
    "clean_acc": str,
    "reported": str,
    "autoattack_acc": str,
}


@dataclass(frozen=True)
class Entry:
    """One row of the leaderboard.

    Attributes:
        id: file name without suffix: lower-case letters, digits and hyphens. :meth:`from_record` makes it of
            dataset, name and threat, so that one model at several eps makes several entries.
        robustbench: RobustBench's twelve fields, and "external" where it applies.
        record: the evaluation.
    """

    id: str
    robustbench: dict[str, Any]
    record: EvalRecord

    @classmethod
    def from_record(
        cls,
        record: EvalRecord,
        *,
        link: str = "",
        authors: str = "",
        venue: str = "",
        additional_data: bool = False,
    ) -> Entry:
        """The entry of a record; what RobustBench asks beyond it is passed by name."""
        auto = record.attacks.get("autoattack")
        percent = _percent(auto["robust_correct"] / record.n) if auto else ""
        robust = _percent(record.robust_accuracy)
        fields = {
            "link": link,
            "name": record.name,
            "authors": authors,
            "additional_data": additional_data,
            "number_forward_passes": 1,
            "dataset": str(record.dataset.get("name", "")),
            "venue": venue,
            "architecture": str(record.metadata.get("backbone") or record.model.get("class", "")),
            "eps": record.threat.eps_text,
            "clean_acc": _percent(record.clean_accuracy),
            "reported": percent or robust,
            "autoattack_acc": percent,
        }
        if robust != percent:
            fields["external"] = robust
        return cls(_entry_id(record), fields, record)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Entry:
        """Read and check one entry.

        Raises:
            EntryError: the file is damaged, a field is missing, unknown, of the wrong type or too long, or the
                percentages or counts contradict the per-example results.
        """
        payload = read_json(path, EntryError, "leaderboard entry")
        fields = {key: value for key, value in payload.items() if key != "convex_head"}
        _check_fields(fields, path)
        try:
            record = EvalRecord.from_dict(payload.get("convex_head") or {})
        except RecordError as problem:
            raise EntryError(f"{os.fspath(path)}: {problem}") from problem
        entry = cls(Path(path).stem, fields, record)
        entry.check()
        return entry

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``<folder>/<id>.json``, atomically; returns the path."""
        path = Path(folder) / f"{self.id}.json"
        write_json(path, {**self.robustbench, "convex_head": self.record.to_dict()}, indent=1)
        return path

    def check(self) -> None:
        """Fields agree with the record.

        Raises:
            EntryError: one does not.
        """
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.id) or len(self.id) > 200:
            raise EntryError(
                f"An entry's file name has lower-case letters, digits and hyphens; found {self.id!r}. "
                f"Rename it to {slug(self.id)}.json."
            )
        expected = Entry.from_record(self.record).robustbench
        for name in ("eps", "clean_acc", "autoattack_acc", "external", "dataset"):
            if self.robustbench.get(name) != expected.get(name):
                raise EntryError(
                    f"{self.id}: {name} is {self.robustbench.get(name)!r}, but the record gives "
                    f"{expected.get(name)!r}. "
                    "Add the record again with 'convex-head leaderboard add'."
                )
        _check_certificate(self.id, self.record)
        check_attacks(self.id, self.record)


def check_admissible(entry: Entry) -> None:
    """An entry of the leaderboard has per-example results, AutoAttack or white-box attacks, and no flag.

    Raises:
        EntryError: the entry is flagged, has no per-example results or no attack.
    """
    record = entry.record
    if record.flags:
        details = "; ".join(f"{flag}: {record.flag_details.get(flag, '')}" for flag in record.flags)
        raise EntryError(f"{entry.id} is flagged and cannot be listed: {details}. Fix the model, evaluate again.")
    if not record.clean or not record.attacks:
        raise EntryError(
            f"{entry.id} has no per-example results, so nothing can be recomputed. "
            "Evaluate it with 'convex-head evaluate'."
        )


def load_entries(folder: str | os.PathLike[str]) -> list[Entry]:
    """All entries of a folder, checked, in the order of their ids."""
    return [Entry.load(path) for path in sorted(Path(folder).glob("*.json"))]


def ranked(entries: Iterable[Entry]) -> list[Entry]:
    """By dataset and threat; within these the most robust first, then the most accurate, then by name."""

    def order(entry: Entry) -> tuple[Any, ...]:
        record = entry.record
        threat = record.threat
        dataset = str(record.dataset.get("name", ""))
        return (dataset, threat.norm, threat.eps, -record.robust_accuracy, -record.clean_accuracy, entry.id)

    return sorted(entries, key=order)


def slug(text: str) -> str:
    """A file name and HTML id: lower-case letters, digits, hyphens; at most 80 characters, never empty."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80].strip("-") or "entry"


def fact(record: EvalRecord, key: str, kind: type | tuple[type, ...]) -> Any:
    """``record.metadata[key]`` if it is of that kind (and a finite float), else None: metadata is the caller's."""
    value = record.metadata.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return None
    return None if isinstance(value, (int, float)) and not is_finite(value) else value


def is_finite(value: Any) -> bool:
    """A number, not a bool, that a float can hold: JSON has integers of any length."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def plain(value: Any, limit: int = 300) -> str:
    """Text in one line and of bounded length, without what would disturb its neighbours.

    Control characters, direction marks and lone surrogates (which no file can hold) are left out.
    """
    text = str(value)
    short = " ".join(text[: 8 * limit].split())
    kept = "".join(letter for letter in short if unicodedata.category(letter) not in ("Cc", "Cf", "Cs"))
    return kept if len(kept) <= limit and len(text) <= 8 * limit else kept[: limit - 1] + "…"


def _entry_id(record: EvalRecord) -> str:
    name, dataset = slug(record.name), slug(str(record.dataset.get("name", "")))
    start = name if name == dataset or name.startswith(f"{dataset}-") else f"{dataset}-{name}"
    return f"{start}-{slug(f'{record.threat.norm}-{record.threat.eps_text}')}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _check_certificate(name: str, record: EvalRecord) -> None:
    """The gap is that of objective and lower bound, and a bound is below its objective."""
    primal, dual, gap = (fact(record, key, (int, float)) for key in ("objective", "lower_bound", "gap"))
    if primal is None or dual is None:
        return
    expected = (primal - dual) / max(1e-12, primal)
    if gap is None or expected < -1e-6 or abs(gap - expected) > 1e-6 + 1e-3 * abs(expected):
        raise EntryError(
            f"{name}: an objective of {primal:g} above a lower bound of {dual:g} has the relative gap {expected:.3g}; "
            f"the record says {gap}. Evaluate the head again."
        )


def _check_fields(fields: dict[str, Any], path: str | os.PathLike[str]) -> None:
    missing = sorted(set(ROBUSTBENCH_FIELDS) - set(fields))
    unknown = sorted(set(fields) - set(ROBUSTBENCH_FIELDS) - {"external"})
    if missing or unknown:
        raise EntryError(
            f"{os.fspath(path)}: an entry has RobustBench's fields and convex_head; missing {missing}, "
            f"unknown {unknown[:5]}. See schema.json."
        )
    for name, value in fields.items():
        kind = ROBUSTBENCH_FIELDS.get(name, str)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise EntryError(f"{os.fspath(path)}: {name} must be {kind.__name__}, is {type(value).__name__}.")
        if isinstance(value, str) and len(value) > TEXT_LIMIT:
            raise EntryError(
                f"{os.fspath(path)}: {name} has {len(value)} characters; at most {TEXT_LIMIT} are allowed."
            )
