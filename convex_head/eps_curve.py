"""``evaluate_curve``: one record with the robust accuracy at several radii.

Every eps is a whole evaluation of its own, over all points. A perturbation of size eps is one of any larger size too,
so a point that is broken at an eps is broken at every larger one:

    robust(eps) = right without attack and under every attack at every evaluated eps' <= eps

which makes the curve fall, as the true one does. At the record's own eps the attacks keep the counts that they earn
there; points that only a smaller radius broke come as one more row of outcomes, ``smaller-eps``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from convex_head.attacks.registry import AttackLike, resolve_attacks
from convex_head.errors import ComparisonError, InputError
from convex_head.evaluate import evaluate
from convex_head.evaluation_progress import Listener, at_radius, listening
from convex_head.records import EvalRecord
from convex_head.threat import ThreatModel

SMALLER = "smaller-eps"


def evaluate_curve(
    model: nn.Module,
    data: Any,
    threat: ThreatModel,
    eps: Iterable[float | str],
    attacks: AttackLike | Iterable[AttackLike] = ("autoattack",),
    *,
    state: str | os.PathLike[str] | None = None,
    progress: Listener | bool | None = None,
    **settings: Any,
) -> EvalRecord:
    """The record of :func:`~convex_head.evaluate.evaluate` at ``threat``, with a curve over ``eps``.

    Args:
        model, data, attacks, settings: as for ``evaluate``; every eps gets the same.
        threat: norm and eps of the record.
        eps: further radii, each > 0, in any order; the record's own may be among them.
        state: file of progress at the record's eps; the other radii keep theirs beside it.
        progress: as for ``evaluate``; the events of all radii count as one run, and name their eps.

    Returns:
        the record, with ``curve`` in ascending order. Flags of any radius are flags of the record.

    Raises:
        ThreatModelError: an eps is not understood.
        InputError: there is no eps beside the record's own, or one is 0.
        ComparisonError: the data were other points at another radius.
        Others as ``evaluate``.
    """
    others = _radii(threat, eps)
    chosen = resolve_attacks(attacks)
    radii = sorted({*others, threat}, key=lambda radius: radius.eps)
    found = {}
    with listening(progress) as listener:
        for number, radius in enumerate(radii):
            file, tell = _state_file(state, radius, threat), at_radius(listener, radius.eps_text, number, len(radii))
            found[radius.eps] = evaluate(model, data, radius, chosen, state=file, progress=tell, **settings)
    return join(found[threat.eps], [found[radius.eps] for radius in others])


def join(record: EvalRecord, others: Sequence[EvalRecord]) -> EvalRecord:
    """``record`` with the curve of evaluations of the same model, points and attacks at other radii."""
    origin = (record.model["fingerprint"], record.dataset["fingerprint"], record.threat.norm)
    if any((one.model["fingerprint"], one.dataset["fingerprint"], one.threat.norm) != origin for one in others):
        raise ComparisonError(
            f"The radii of a curve share model, points and norm; those of {record.name} differ. Pass tensors, or a "
            "DataLoader that does not shuffle."
        )
    alive = np.frombuffer(record.clean.encode("ascii"), dtype=np.uint8) == ord("1")
    curve = []
    for other in sorted([*others, record], key=lambda one: one.threat.eps):
        if other is record:
            record = _with_smaller(record, alive)
        alive = alive & other.robust
        if other.threat.eps != record.threat.eps:
            marks = "".join("1" if right else "0" for right in alive)
            point = {"eps": other.threat.eps, "eps_text": other.threat.eps_text}
            curve.append({**point, "robust_correct": int(alive.sum()), "robust": marks})
    details = {
        flag: f"at eps {other.threat.eps_text}: {text}" for other in others for flag, text in other.flag_details.items()
    }
    details |= record.flag_details
    seconds = record.seconds + sum(other.seconds for other in others)
    return dataclasses.replace(
        record, curve=tuple(curve), flags=tuple(sorted(details)), flag_details=details, seconds=seconds
    )


def _radii(threat: ThreatModel, eps: Iterable[float | str]) -> list[ThreatModel]:
    """The radii beside the record's own, ascending."""
    given = {ThreatModel(threat.norm, value) for value in eps}
    others = sorted(given - {threat}, key=lambda radius: radius.eps)
    if not others or others[0].eps == 0:
        raise InputError(
            f"A curve needs an eps beside {threat.eps_text}, and each > 0; found {[one.eps_text for one in others]}. "
            "Name radii such as 2/255 and 4/255; the clean accuracy stands at 0 by itself."
        )
    return others


def _state_file(state: str | os.PathLike[str] | None, radius: ThreatModel, threat: ThreatModel) -> Path | None:
    if state is None or radius == threat:
        return None if state is None else Path(state)
    path = Path(state)
    return path.with_name(f"{path.name}.eps-{radius.eps_text.replace('/', '_')}")


def _with_smaller(record: EvalRecord, alive: np.ndarray) -> EvalRecord:
    """Add the outcomes of smaller radii, where they broke points that every attack at this eps had left."""
    left = record.robust
    broken = left & ~alive
    if not broken.any():
        return record
    row = "".join("-" if not given else ("0" if lost else "1") for given, lost in zip(left, broken, strict=True))
    attempted, lost = int(left.sum()), int(broken.sum())
    counts = {
        "attempted": attempted,
        "broken": lost,
        "skipped": record.clean_correct - attempted,
        "robust_correct": attempted - lost,
        "success_rate": lost / attempted,
        "outside": 0,
        "forwards": 0,
        "backwards": 0,
        "seconds": 0.0,
        "settings": {},
    }
    return dataclasses.replace(
        record,
        attacks={**record.attacks, SMALLER: counts},
        outcomes={**record.outcomes, SMALLER: row},
        robust_correct=attempted - lost,
    )
