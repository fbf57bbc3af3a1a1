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

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convex_head.errors import EntryError, RecordError
from convex_head.json_files import read_json, write_json
from convex_head.records import EvalRecord
from convex_head.report.consistency import check_attacks
from convex_head.report.facts import check_facts
from convex_head.report.values import fact, slug

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
# What follows from the record; the rest is what whoever adds it says.
_FROM_RECORD = (
    *("name", "dataset", "architecture", "number_forward_passes"),
    *("eps", "clean_acc", "autoattack_acc", "external"),
)


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
        _check_fields(fields, os.fspath(path))
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
        _check_fields(self.robustbench, self.id)
        if self.id != _entry_id(self.record):
            raise EntryError(
                f"{self.id}.json holds the entry {_entry_id(self.record)}: dataset, name and threat. Rename it to that."
            )
        expected = Entry.from_record(self.record).robustbench
        for name in _FROM_RECORD:
            if self.robustbench.get(name) != expected.get(name):
                raise EntryError(
                    f"{self.id}: {name} is {self.robustbench.get(name)!r}, but the record gives "
                    f"{expected.get(name)!r}. "
                    "Add the record again with 'convex-head leaderboard add'."
                )
        if not re.fullmatch(r"100\.00|\d?\d\.\d\d", self.robustbench["reported"]):
            raise EntryError(
                f"{self.id}: reported is {self.robustbench['reported']!r}, but is percent with two decimals, as 84.59."
            )
        if self.robustbench["link"] and not self.robustbench["link"].startswith(("https://", "http://")):
            raise EntryError(f"{self.id}: link is {self.robustbench['link']!r}, but is empty or starts with https://.")
        check_attacks(self.id, self.record)
        check_facts(self.id, self.record)


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


def is_bounded(record: EvalRecord) -> bool:
    """The record's gap, if it has one, stands with the objective and the lower bound that it is the gap of."""
    gap, *bounds = (fact(record, key, (int, float)) for key in ("gap", "objective", "lower_bound"))
    return gap is None or None not in bounds


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


def _entry_id(record: EvalRecord) -> str:
    name, dataset = slug(record.name), slug(str(record.dataset.get("name", "")))
    start = name if name == dataset or name.startswith(f"{dataset}-") else f"{dataset}-{name}"
    return f"{start}-{slug(f'{record.threat.norm}-{record.threat.eps_text}')}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _check_fields(fields: dict[str, Any], where: str) -> None:
    missing = sorted(set(ROBUSTBENCH_FIELDS) - set(fields))
    unknown = sorted(set(fields) - set(ROBUSTBENCH_FIELDS) - {"external"})
    if missing or unknown:
        raise EntryError(
            f"{where}: an entry has RobustBench's fields and convex_head; missing {missing}, "
            f"unknown {unknown[:5]}. See schema.json."
        )
    for name, value in fields.items():
        kind = ROBUSTBENCH_FIELDS.get(name, str)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise EntryError(f"{where}: {name} must be {kind.__name__}, is {type(value).__name__}.")
        if isinstance(value, str) and len(value) > TEXT_LIMIT:
            raise EntryError(f"{where}: {name} has {len(value)} characters; at most {TEXT_LIMIT} are allowed.")
