"""The record of one evaluation: what was attacked, point by point, and how to trust it.

Counts and accuracies are over all n points:

    clean accuracy  = |{i: right without attack}| / n
    robust accuracy = |{i: right without attack and under every attack}| / n

Per attack, ``attacks[name]`` holds

    attempted       points given to the attack: right without attack and not yet broken
    broken          of these, points for which a point inside the threat set is classified wrongly
    skipped         points not given to it because an earlier attack had broken them
    robust_correct  attempted - broken; the attack's own robust count when skipped == 0, otherwise the
                    count of the union with the attacks before it (AutoAttack's convention)
    success_rate    broken / attempted (null when nothing was attempted)
    forwards, backwards   examples sent through the model, the re-measurement included
    seconds         wall clock
    settings        what the attack was, as it names itself
    stages          the same counts for each part of a composite attack such as AutoAttack

``curve`` is what is right at other radii, as :mod:`convex_head.eps_curve` makes it: ascending points with "eps",
"eps_text", "robust_correct" and "robust", one character a point. Nothing broken at an eps is right at a larger one.

One character a point: ``clean`` has "1" right and "0" wrong; ``outcomes[name]`` has "1" still right under
that attack, "0" broken by it and "-" not given to it.

This module imports no torch, so that the leaderboard can be built without it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from convex_head.errors import RecordError, ThreatModelError
from convex_head.json_files import read_json, write_json
from convex_head.statistics import wilson_interval
from convex_head.threat import ThreatModel

SCHEMA = 1

# Fields that may differ between two runs of the same evaluation.
_CIRCUMSTANCES = ("created", "seconds", "hardware", "commit", "command", "metadata")
_DERIVED = ("clean_accuracy", "robust_accuracy", "interval")
# Fields that records of this schema may lack, because they were written before there was such a thing.
_OPTIONAL = frozenset({"curve"})
_LONGEST_CURVE = 100


@dataclass(frozen=True)
class EvalRecord:
    """One model under one threat model on n points.

    Attributes:
        name: name of the entry.
        model: "class", "parameters" (count) and "fingerprint" of the weights.
        dataset: "name", "fingerprint" of the points, "image_shape", "num_classes".
        threat: norm and eps in pixel space.
        n: number of points.
        clean_correct, robust_correct: counts over all n points.
        attacks: name -> counts and cost, see the module's docstring; in the order of the runs.
        clean: n characters "0" or "1"; empty in records imported without per-example results.
        outcomes: attack name -> n characters "1", "0" or "-".
        labels: n class indices, for accuracies a class; empty if unknown.
        curve: results at other radii, ascending, without the record's own; empty if there are none.
        flags: names of what makes the number doubtful; empty for an honest model.
        flag_details: flag -> one sentence with the value found.
        seed, batch_size: as given to ``evaluate``.
        versions: package -> version.
        hardware: what it ran on.
        commit: revision of this package's checkout, if it is one.
        command: the command that reproduces the record, if known.
        created: UTC time of the end, ISO 8601.
        seconds: wall clock of gates and attacks.
        metadata: whatever the caller wants kept (certificate gap, radius, backbone); plain JSON.
        schema: version of this layout.
    """

    name: str
    model: dict[str, Any]
    dataset: dict[str, Any]
    threat: ThreatModel
    n: int
    clean_correct: int
    robust_correct: int
    attacks: dict[str, dict[str, Any]]
    clean: str = ""
    outcomes: dict[str, str] = field(default_factory=dict)
    labels: tuple[int, ...] = ()
    curve: tuple[dict[str, Any], ...] = ()
    flags: tuple[str, ...] = ()
    flag_details: dict[str, str] = field(default_factory=dict)
    seed: int | None = 0
    batch_size: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    command: str | None = None
    created: str = ""
    seconds: float = 0.0
    metadata: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _check(self)

    @property
    def clean_accuracy(self) -> float:
        """clean_correct / n."""
        return self.clean_correct / self.n

    @property
    def robust_accuracy(self) -> float:
        """robust_correct / n."""
        return self.robust_correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the robust accuracy."""
        return wilson_interval(self.robust_correct, self.n)

    @property
    def attack_success(self) -> float:
        """Share of the points right without attack that some attack broke; 0 when none was right."""
        return 1.0 - self.robust_correct / self.clean_correct if self.clean_correct else 0.0

    @property
    def per_example(self) -> np.ndarray:
        """(n, number of attacks) bool, columns as ``attacks``: still right under that attack.

        A point that was wrong without attack, or was skipped because an earlier attack had broken it,
        is False; so ``per_example.all(axis=1)`` is the robust vector when there is an attack.
        """
        columns = [_mask(self.outcomes[name]) for name in self.attacks if name in self.outcomes]
        return np.stack(columns, axis=1) if columns else np.zeros((len(self.clean), 0), dtype=bool)

    @property
    def robust(self) -> np.ndarray:
        """(n,) bool: right without attack and under every attack."""
        return _mask(self.clean) & self.per_example.all(axis=1)

    def identity(self) -> dict[str, Any]:
        """Everything that must be equal between two runs of the same evaluation.

        Leaves out time, machine, commit, command and metadata.
        """
        payload = self.to_dict()
        for key in _CIRCUMSTANCES:
            del payload[key]
        payload["attacks"] = {name: _without_seconds(entry) for name, entry in self.attacks.items()}
        return payload

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, derived accuracies and interval included."""
        payload: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        payload["threat"] = self.threat.to_dict()
        payload["flags"] = list(self.flags)
        payload["labels"] = list(self.labels)
        payload["curve"] = list(self.curve)
        payload["clean_accuracy"] = self.clean_accuracy
        payload["robust_accuracy"] = self.robust_accuracy
        payload["interval"] = list(self.interval)
        return payload

    @classmethod
    def from_dict(cls, payload: dict[str, Any]) -> EvalRecord:
        """The inverse of :meth:`to_dict`; checks what can be recomputed.

        Raises:
            RecordError: another schema, a missing or unknown field, or counts, per-example results,
                accuracies and interval that contradict each other.
        """
        if payload.get("schema") != SCHEMA:
            raise RecordError(
                f"A record has schema {SCHEMA}; found {payload.get('schema')!r}. Evaluate the model again."
            )
        known = {item.name for item in fields(cls)}
        missing = sorted((known | set(_DERIVED)) - _OPTIONAL - set(payload))
        unknown = sorted(set(payload) - known - set(_DERIVED))
        if missing or unknown:
            raise RecordError(
                f"A record has exactly the fields of schema {SCHEMA}; missing {missing}, unknown {unknown}. "
                "Evaluate the model again."
            )
        values = {key: payload[key] for key in known if key in payload}
        try:
            values["threat"] = ThreatModel.from_dict(payload["threat"])
            values["flags"] = tuple(payload["flags"])
            values["labels"] = tuple(payload["labels"])
            values["curve"] = tuple(payload.get("curve", ()))
        except (ThreatModelError, TypeError, KeyError, AttributeError) as problem:
            raise RecordError(f"A record's threat, flags, labels or curve cannot be read: {problem}") from problem
        record = cls(**values)
        _check_derived(record, payload)
        return record

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as JSON, atomically."""
        write_json(path, self.to_dict(), indent=1)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvalRecord:
        """Read a record and check it, see :meth:`from_dict`.

        Raises:
            RecordError: the file is missing, damaged, of another schema, or contradicts itself.
        """
        return cls.from_dict(read_json(path, RecordError, "record"))


def _mask(characters: str) -> np.ndarray:
    return np.frombuffer(characters.encode("ascii"), dtype=np.uint8) == ord("1")


def _without_seconds(entry: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in entry.items() if key != "seconds"}
    if "stages" in kept:
        kept["stages"] = {name: _without_seconds(stage) for name, stage in kept["stages"].items()}
    return kept


def _check(record: EvalRecord) -> None:
    """Types and counts of a record, against its per-example results where it has them."""
    _check_types(record)
    if not 0 <= record.robust_correct <= record.clean_correct <= record.n or record.n == 0:
        raise RecordError(
            "A record needs 0 <= robust_correct <= clean_correct <= n and n >= 1; found "
            f"{record.robust_correct}, {record.clean_correct}, {record.n}. Evaluate the model again."
        )
    if record.labels and len(record.labels) != record.n:
        raise RecordError(f"A record has one label a point; found {len(record.labels)} for {record.n} points.")
    if record.clean or record.outcomes:
        _check_outcomes(record)
    if record.curve:
        _check_curve(record)


def _check_types(record: EvalRecord) -> None:
    kinds: dict[str, type | tuple[type, ...]] = {
        "name": str,
        "model": dict,
        "dataset": dict,
        "threat": ThreatModel,
        "n": int,
        "clean_correct": int,
        "robust_correct": int,
        "attacks": dict,
        "clean": str,
        "outcomes": dict,
        "flag_details": dict,
        "versions": dict,
        "hardware": dict,
        "metadata": dict,
        "created": str,
        "seconds": (int, float),
    }
    for name, kind in kinds.items():
        value = getattr(record, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RecordError(f"The field {name} of a record has the wrong type: {type(value).__name__}.")
    if not all(isinstance(flag, str) for flag in record.flags):
        raise RecordError(f"Flags are names; found {record.flags!r}.")
    if not all(isinstance(entry, dict) for entry in record.attacks.values()):
        raise RecordError("Each attack of a record is an object of counts.")


def _check_outcomes(record: EvalRecord) -> None:
    """Per-example results agree with every count."""
    if set(record.outcomes) != set(record.attacks):
        raise RecordError(
            f"Per-example results are of {sorted(record.outcomes)}, attacks are {sorted(record.attacks)}."
        )
    rows = {"clean": record.clean, **record.outcomes}
    for name, characters in rows.items():
        alphabet = "01" if name == "clean" else "01-"
        if not isinstance(characters, str) or len(characters) != record.n or set(characters) - set(alphabet):
            raise RecordError(f"Per-example results of {name} are not {record.n} characters of {alphabet!r}.")
    clean = _mask(record.clean)
    counts = {"clean_correct": int(clean.sum()), "robust_correct": int(record.robust.sum())}
    for name, found in counts.items():
        if found != getattr(record, name):
            raise RecordError(
                f"{name} is {getattr(record, name)}, but the per-example results give {found}. "
                "Evaluate the model again."
            )
    for name, entry in record.attacks.items():
        row = record.outcomes[name]
        expected = {"broken": row.count("0"), "robust_correct": row.count("1")}
        expected["attempted"] = expected["broken"] + expected["robust_correct"]
        wrong = {key: entry.get(key) for key, value in expected.items() if entry.get(key) != value}
        if wrong:
            raise RecordError(f"The counts {wrong} of {name} contradict its per-example results {expected}.")


def _check_curve(record: EvalRecord) -> None:
    """Ascending radii, counts of their points, and nothing right that is broken at a smaller radius."""
    if len(record.curve) > _LONGEST_CURVE:
        raise RecordError(f"A curve has at most {_LONGEST_CURVE} points; found {len(record.curve)}. Leave some out.")
    points = [(record.threat.eps, record.threat.eps_text, record.robust_correct, record.robust)]
    for item in record.curve:
        try:
            threat = ThreatModel(record.threat.norm, item["eps_text"])
            marks, count = item["robust"], item["robust_correct"]
            whole = set(item) == {"eps", "eps_text", "robust_correct", "robust"} and threat.eps == item["eps"] > 0
            whole = whole and isinstance(marks, str) and len(marks) == record.n and not set(marks) - set("01")
        except (ThreatModelError, KeyError, TypeError) as problem:
            raise RecordError(f"A point of a curve cannot be read: {problem}. Evaluate the model again.") from problem
        if not whole or type(count) is not int or marks.count("1") != count:
            raise RecordError(
                f"A point of a curve is eps > 0 with its text, {record.n} marks and the number of ones; the point at "
                f"{item['eps_text']!r} is not. Evaluate the model again."
            )
        points.append((threat.eps, threat.eps_text, count, _mask(marks)))
    listed = [eps for eps, *_ in points[1:]]
    if listed != sorted(set(listed)) or record.threat.eps in listed:
        raise RecordError("The radii of a curve ascend, without the record's own. Evaluate the model again.")
    right = _mask(record.clean)
    for _, text, _, robust in sorted(points, key=lambda point: point[0]):
        if len(right) != record.n or bool((robust & ~right).any()):
            raise RecordError(f"The curve says right at eps {text} of a point broken before. Evaluate the model again.")
        right = robust


def _check_derived(record: EvalRecord, payload: dict[str, Any]) -> None:
    """Stored accuracies and interval are those of the counts."""
    expected = {
        "clean_accuracy": [record.clean_accuracy],
        "robust_accuracy": [record.robust_accuracy],
        "interval": list(record.interval),
    }
    for name, values in expected.items():
        stored = payload[name] if isinstance(payload[name], list) else [payload[name]]
        try:
            agrees = len(stored) == len(values) and np.allclose(stored, values, rtol=0, atol=1e-9)
        except TypeError:
            agrees = False
        if not agrees:
            raise RecordError(f"{name} is {payload[name]}, but the counts give {values}. Evaluate again.")
