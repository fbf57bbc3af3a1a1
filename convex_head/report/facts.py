"""What a record says beside its counts must be possible, and follow from the rest where it does.

    ranges      points, classes, costs and settings are numbers of their kind; hashes, dates and commits look like ones
    command     names the eps, seed and number of points that the record has
    certificate gap = (objective - lower bound) / objective, a status that solvers end with, positive radius and reg
    choice      radius and reg are those that did best on the path that the record carries
    pictures    are PNG files of points that are right without attack

Metadata are the caller's: what is missing is not asked for, but what is there under these names is read.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from convex_head.errors import EntryError
from convex_head.records import EvalRecord
from convex_head.report.pictures import MOST, is_png
from convex_head.report.values import fact, is_finite, plain

STATUSES = ("converged", "max_time", "max_iter", "interrupted", "stalled")
_AGAIN = "Evaluate the model again."
# Options that commands share with the record: option -> the record's value as text.
_OPTIONS: dict[str, Callable[[EvalRecord], str]] = {
    "--eps": lambda record: record.threat.eps_text,
    "--seed": lambda record: str(record.seed),
    "--n-ex": lambda record: str(record.n),
    "--n": lambda record: str(record.n),
}
_LEAST = {"num_classes": 2, "image_shape": 1, "parameters": 0, "cpus": 1, "torch_threads": 1}
_COUNT, _AMOUNT = "a whole number from 0", "a number from 0"
_Rule = tuple[str, Any, Callable[[Any], bool], str]


def check_facts(name: str, record: EvalRecord) -> None:
    """Refuse a record that says what cannot be.

    Raises:
        EntryError: naming the field, its value and the rule.
    """
    for field, value, holds, rule in _rules(record):
        if not holds(value):
            raise EntryError(f"{name}: {field} is {plain(repr(value), 60)}, but is {rule}. {_AGAIN}")
    _check_command(name, record)
    _check_certificate(name, record)
    _check_choice(name, record)
    _check_pictures(name, record)


def _rules(record: EvalRecord) -> Iterator[_Rule]:
    """(field, value, test, rule in words) of everything with a range of its own."""
    yield "seed", record.seed, lambda v: v is None or type(v) is int, "a whole number or null"
    yield "batch_size", record.batch_size, lambda v: v is None or _is_count(v, 1), "a whole number from 1, or null"
    yield "seconds", record.seconds, _is_amount, _AMOUNT
    yield "created", record.created, _is_date, "empty or an ISO 8601 time"
    yield "commit", record.commit, _is_commit, "null or 40 hexadecimal digits, with + if the checkout was modified"
    yield "command", record.command, lambda v: v is None or isinstance(v, str), "text or null"
    texts = {"training": record.metadata, "head": record.metadata, "backbone": record.metadata, "class": record.model}
    for key, holder in texts.items():
        yield key, holder.get(key, ""), lambda v: isinstance(v, str), "text"
    for key, value in record.versions.items():
        yield f"the version of {plain(key, 40)}", value, lambda v: isinstance(v, str), "text"
    for kind, holder in {"dataset": record.dataset, "model": record.model}.items():
        yield f"the {kind}'s fingerprint", holder.get("fingerprint"), lambda v: isinstance(v, str) and v != "", "a hash"
    sizes = {"num_classes": record.dataset, "image_shape": record.dataset, "parameters": record.model}
    for key, holder in (sizes | dict.fromkeys(("cpus", "torch_threads"), record.hardware)).items():
        listed = holder.get(key, 2)
        for size in listed if isinstance(listed, list) else [2 if listed is None else listed]:
            yield key, size, partial(_is_count, least=_LEAST[key]), f"a whole number from {_LEAST[key]}"
    for attack, counts in record.attacks.items():
        for part, listed in ((attack, counts), *_stages(counts)):
            for key in {"outside", "forwards", "backwards", "seconds"} & set(listed):
                whole = key != "seconds"
                yield (
                    f"{key} of {plain(part, 60)}",
                    listed[key],
                    *((_is_count, _COUNT) if whole else (_is_amount, _AMOUNT)),
                )
        yield (
            f"settings of {plain(attack, 60)}",
            counts.get("settings", {}),
            partial(_is_named, attack),
            "those of its name",
        )


def _stages(counts: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    stages = counts.get("stages")
    return (
        [(key, stage) for key, stage in stages.items() if isinstance(stage, dict)] if isinstance(stages, dict) else []
    )


def _is_named(attack: str, settings: Any) -> bool:
    """Every setting in the brackets of an attack's name stands among its settings."""
    named = re.findall(r"(\w+)=([^,()]+)", attack.partition("(")[2])
    return isinstance(settings, dict) and all(str(settings.get(key, value)) == value.strip() for key, value in named)


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least and is_finite(value)


def _is_amount(value: Any) -> bool:
    return is_finite(value) and value >= 0


def _is_date(value: str) -> bool:
    try:
        return value == "" or datetime.fromisoformat(value) is not None
    except ValueError:
        return False


def _is_commit(value: Any) -> bool:
    return value is None or (isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40}\+?", value) is not None)


def _check_command(name: str, record: EvalRecord) -> None:
    """An option of the command that the record knows too has the record's value."""
    try:
        words = shlex.split(record.command or "")
    except ValueError:
        return
    for option, value in _OPTIONS.items():
        for place, word in enumerate(words[:-1]):
            if word == option and words[place + 1] != value(record):
                found = plain(words[place + 1], 30)
                raise EntryError(f"{name}: its command has {option} {found}, the record {value(record)}. {_AGAIN}")


def _check_certificate(name: str, record: EvalRecord) -> None:
    """The gap is that of objective and lower bound, and a bound is below its objective."""
    primal, dual, gap = (fact(record, key, (int, float)) for key in ("objective", "lower_bound", "gap"))
    if primal is not None and dual is not None:
        expected = (primal - dual) / max(1e-12, primal)
        if gap is None or expected < -1e-6 or abs(gap - expected) > 1e-6 + 1e-3 * abs(expected):
            raise EntryError(
                f"{name}: an objective of {primal:g} above a lower bound of {dual:g} has the relative gap "
                f"{expected:.3g}; the record says {gap}. Evaluate the head again."
            )
    if gap is None:
        return
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "gap": (lambda v: v >= -1e-6, _AMOUNT),
        "status": (lambda v: v in STATUSES, f"one of {', '.join(STATUSES)}"),
        "radius": (_is_amount, _AMOUNT),
        "reg": (lambda v: _is_amount(v) and v > 0, "a number above 0"),
        "neurons": (_is_count, _COUNT),
    }
    for key, (holds, rule) in rules.items():
        value = record.metadata.get(key)
        if key in record.metadata and not holds(value):
            raise EntryError(f"{name}: {key} of the head is {plain(repr(value), 40)}, but is {rule}. Fit it again.")


def _check_choice(name: str, record: EvalRecord) -> None:
    """``path`` as :func:`convex_head.robustify` makes it: the chosen candidate is the best that was allowed."""
    path = record.metadata.get("path")
    keys = ("radius", "reg", "clean", "robust")
    if not isinstance(path, list) or not path or not all(isinstance(c, dict) and set(keys) <= set(c) for c in path):
        return
    if not all(is_finite(c[key]) for c in path for key in keys) or any(
        not 0 <= c[key] <= 1 for c in path for key in keys[2:]
    ):
        raise EntryError(f"{name}: a candidate on its path has no number, or an accuracy outside [0, 1]. Fit it again.")
    if not all(isinstance(c.get(flag, True), bool) for c in path for flag in ("allowed", "chosen")):
        raise EntryError(f"{name}: allowed and chosen of a candidate are true or false. Fit it again.")
    allowed = [c for c in path if c.get("allowed", True)]
    least = min((c["clean"] for c in allowed), default=math.inf)
    for place, c in enumerate(path):
        if c not in allowed and c["clean"] >= least and not _is_too_wide(c, path[:place]):
            raise EntryError(f"{name}: a candidate on its path was passed over that is as right when clean as others.")
    best = max((c["robust"], c["clean"]) for c in allowed or [max(path, key=lambda c: (c["clean"], c["robust"]))])
    chosen = [record.metadata.get(key) for key in ("radius", "reg")]
    if not any((c["robust"], c["clean"]) == best and [c["radius"], c["reg"]] == chosen for c in path):
        raise EntryError(
            f"{name}: radius and reg are {plain(chosen, 60)}, but others did better on its path. Fit it again."
        )
    marked = [[c["radius"], c["reg"]] for c in path if c.get("chosen")]
    if any("chosen" in c for c in path) and marked != [chosen]:
        raise EntryError(f"{name}: its path has {len(marked)} chosen candidates, of {plain(marked, 60)}. Fit it again.")
    rounds = [c["round"] for c in path if (c["robust"], c["clean"]) == best and "round" in c]
    if rounds and record.metadata.get("rounds", rounds[0]) not in rounds:
        raise EntryError(
            f"{name}: rounds is {plain(record.metadata['rounds'], 30)}, its path says {rounds}. Fit it again."
        )
    for key, value in zip(("validation_robust", "validation_clean"), best, strict=True):
        if record.metadata.get(key, value) != value:
            raise EntryError(f"{name}: {key} is {plain(record.metadata[key], 30)}, its path has {value}. Fit it again.")


def _is_too_wide(candidate: dict[str, Any], before: Sequence[dict[str, Any]]) -> bool:
    """Of the largest radius so far, and wins no more under attack than it loses when clean, against the best so far."""
    allowed = [c for c in before if c.get("allowed", True)]
    if not allowed or candidate["radius"] <= max(c["radius"] for c in before):
        return False
    robust, clean = max((c["robust"], c["clean"]) for c in allowed)
    return bool(candidate["robust"] - robust <= clean - candidate["clean"])


def _check_pictures(name: str, record: EvalRecord) -> None:
    examples = record.metadata.get("examples")
    if examples is None:
        return
    images = examples.get("images") if isinstance(examples, dict) else None
    listed = images if isinstance(images, list) else [None]
    whole = len(listed) <= MOST and all(
        isinstance(item, dict)
        and is_png(item.get("clean"))
        and is_png(item.get("adversarial"))
        and _is_count(item.get("adversarial_prediction"))
        and _is_count(item.get("label"))
        and item.get("clean_prediction") == item["label"]
        and (not record.labels or item["label"] in record.labels)
        for item in listed
    )
    if not whole:
        raise EntryError(
            f"{name}: its examples are not at most {MOST} pairs of PNG pictures of points that are right without "
            "attack. Evaluate the model again with --examples."
        )
