"""What must agree inside one entry beyond the record's own checks, and between the entries of one leaderboard.

The attacks of a record ran one after the other, in the order in which the record names them. So for each attack

    still right before it  <=  given to it  <=  right without attack        (as sets of points),

and the stages of a composite attack hand on what they leave: attempted(k + 1) = robust_correct(k), and what they broke
adds up to what the attack broke.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from convex_head.errors import EntryError
from convex_head.records import EvalRecord

if TYPE_CHECKING:
    from convex_head.report.entries import Entry

_AGAIN = "Evaluate the model again."
# Rounding may move single points when the same weights are evaluated on another machine.
_MOVED = 0.01
_COSTS = ("forwards", "backwards", "seconds")


def check_attacks(name: str, record: EvalRecord) -> None:
    """The sequence of attacks is possible, and the counts that follow from it are those of the record.

    Raises:
        EntryError: a point was left out by an attack that nothing had broken, or a count does not follow.
    """
    if not record.clean:
        return
    alive = clean = _is(record.clean, "1")
    for attack, counts in record.attacks.items():
        row = record.outcomes[attack]
        given = ~_is(row, "-")
        if (alive & ~given).any() or (given & ~clean).any():
            point = int(np.flatnonzero((alive & ~given) | (given & ~clean))[0])
            raise EntryError(
                f"{name}: {attack} has {row[point]!r} at point {point}; an attack is given the points that are right "
                f"without attack, and leaves out only what an attack before it broke. {_AGAIN}"
            )
        alive = alive & ~_is(row, "0")
        broken, attempted = row.count("0"), int(given.sum())
        expected = {
            "skipped": record.clean_correct - attempted,
            "success_rate": broken / attempted if attempted else None,
        }
        for key, value in expected.items():
            if key in counts and counts[key] != value:
                raise EntryError(f"{name}: {key} of {attack} is {counts[key]}, the points give {value}. {_AGAIN}")
        _check_stages(f"{name}: {attack}", counts, attempted, broken)
    unknown = sorted(set(record.flag_details) - set(record.flags))
    if unknown:
        raise EntryError(f"{name} explains the flags {unknown}, which it does not have. {_AGAIN}")
    classes = record.dataset.get("num_classes")
    if isinstance(classes, int) and any(type(label) is not int or not 0 <= label < classes for label in record.labels):
        raise EntryError(f"{name}: labels are class indices below {classes}; one is not. {_AGAIN}")


def check_together(entries: Sequence[Entry]) -> None:
    """Entries that say they share points or weights do.

    Raises:
        EntryError: one name of a dataset stands for two sets of images with the same labels, one fingerprint of points
            for two lists of labels, or one fingerprint of weights for two models.
    """
    images: dict[Any, tuple[str, Any]] = {}
    labels: dict[Any, tuple[str, Any]] = {}
    shapes: dict[Any, tuple[str, Any]] = {}
    models: dict[Any, tuple[str, Any]] = {}
    clean: dict[Any, tuple[str, str]] = {}
    for entry in entries:
        record = entry.record
        points, weights = record.dataset.get("fingerprint"), record.model.get("fingerprint")
        if not isinstance(points, str) or not isinstance(weights, str) or not record.labels:
            continue
        shape = str(record.dataset.get("image_shape"))
        kind = (str(record.dataset.get("name")), record.n, shape, record.labels)
        _same(images, kind, entry.id, points, "the same dataset and labels, but other fingerprints of the images")
        _same(labels, points, entry.id, record.labels, "the same fingerprint of the images, but other labels")
        parameters = (record.model.get("parameters"), record.model.get("class"))
        sizes = (record.dataset.get("num_classes"), record.dataset.get("image_shape"))
        _same(shapes, points, entry.id, sizes, "the same fingerprint of the images, but other sizes or classes")
        _same(models, weights, entry.id, parameters, "the same fingerprint of the weights, but other models")
        first, row = clean.setdefault((points, weights), (entry.id, record.clean))
        if np.mean(_is(row, "1") != _is(record.clean, "1")) > _MOVED:
            raise EntryError(
                f"{first} and {entry.id} have the same weights and points, but other predictions without attack. "
                "Evaluate one of them again."
            )


def _check_stages(name: str, attack: dict[str, Any], attempted: int, broken: int) -> None:
    """Stages hand on what they leave, and points and costs add up to the attack's."""
    stages = attack.get("stages")
    if not stages:
        return
    try:
        counts = [(stage["attempted"], stage["broken"], stage["robust_correct"]) for stage in stages.values()]
        handed_on = all(a - b == c for a, b, c in counts) and all(
            following[0] == before[2] for before, following in pairwise(counts)
        )
        whole = handed_on and counts[0][0] == attempted and sum(stage[1] for stage in counts) == broken
        costs = {
            key: sum(stage.get(key, 0) for stage in stages.values()) for key in ("forwards", "backwards", "seconds")
        }
    except (KeyError, TypeError, AttributeError) as problem:
        raise EntryError(f"{name}: a stage has no counts ({type(problem).__name__}: {problem}). {_AGAIN}") from problem
    if not whole:
        raise EntryError(
            f"{name} was given {attempted} points and broke {broken}, but its stages say "
            f"{[stage[:2] for stage in counts]}. {_AGAIN}"
        )
    _check_shares(name, stages, attempted)
    for key, total in costs.items():
        stated = attack.get(key, total)
        # Seconds between stages belong to the attack alone.
        if stated < total - 1e-6 if key == "seconds" else stated != total:
            raise EntryError(f"{name}: {key} is {stated}, but its stages add up to {total}. {_AGAIN}")


def _check_shares(name: str, stages: dict[str, Any], attempted: int) -> None:
    """What follows from a stage's own points."""
    for stage, counts in stages.items():
        tried = counts["attempted"]
        expected = {"skipped": attempted - tried, "success_rate": counts["broken"] / tried if tried else None}
        for key, value in expected.items():
            if counts.get(key, value) != value:
                raise EntryError(f"{name}: {key} of {stage} is {counts[key]}, the points give {value}. {_AGAIN}")


def _same(known: dict[Any, tuple[str, Any]], key: Any, name: str, value: Any, problem: str) -> None:
    first, found = known.setdefault(key, (name, value))
    if found != value:
        raise EntryError(
            f"{first} and {name} have {problem}, so they cannot be compared. "
            "Evaluate one of them again, or give its dataset another name."
        )


def _is(marks: str, mark: str) -> np.ndarray:
    return np.frombuffer(marks.encode("ascii"), dtype=np.uint8) == ord(mark)
