"""Recompute a record's certificate from the head's weights and the features it was trained on.

    objective      exact robust objective of the weights in the file
    lower bound    of a fresh solve that starts from these weights and stops once the claimed gap is confirmed
    gap            (objective - lower bound) / max(1e-12, objective)

Nothing of what the head file or the record claims enters. That the evaluated network held this head is not checked:
a record has a fingerprint of the whole network only.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from convex_head.errors import ConvergenceWarning, EntryError
from convex_head.features import extract_features
from convex_head.head import ConvexRobustHead
from convex_head.records import EvalRecord
from convex_head.report.values import fact
from convex_head.solvers import get_solver
from convex_head.solvers.result import relative_gap
from convex_head.splice import SplicedModel

_RELATIVE = 1e-3


@dataclass(frozen=True)
class Certificate:
    """What was recomputed: objective of the weights, lower bound of the optimum, relative gap."""

    objective: float
    lower_bound: float
    gap: float


def certificate_facts(head: ConvexRobustHead) -> dict[str, Any]:
    """What a record's metadata hold of a fitted head, so that its gap can be recomputed: plain JSON."""
    facts: dict[str, Any] = {"radius": head.radius, "reg": head.reg}
    if head.result_ is not None:
        found = head.result_
        facts |= {"status": found.status.value, "objective": found.primal, "lower_bound": found.dual}
        facts |= {"gap": found.gap, "neurons": found.neurons}
    return facts


def save_for_check(stem: Path, model: SplicedModel, images: Tensor, labels: Tensor) -> None:
    """Write ``<stem>.safetensors`` and ``<stem>.npz``, which 'leaderboard check ENTRY' takes as --head and --features.

    Args:
        stem: path without suffix; its folder is made.
        model: with a fitted :class:`~convex_head.head.ConvexRobustHead`.
        images: (n, c, h, w) on whose features the head was fitted, and on no others.
        labels: (n,) their classes.
    """
    assert isinstance(model.head, ConvexRobustHead)
    stem.parent.mkdir(parents=True, exist_ok=True)
    model.head.save(stem.with_name(f"{stem.name}.safetensors"))
    features = extract_features(model.backbone, images).cpu().numpy()
    np.savez(stem.with_name(f"{stem.name}.npz"), features=features, labels=labels.cpu().numpy())


def check_certificate(
    record: EvalRecord, head: ConvexRobustHead, features: Any, labels: Any, *, max_seconds: float | None = None
) -> Certificate:
    """Compare a record's metadata with its head.

    Args:
        record: with "gap" in its metadata; "objective", "radius", "reg" and "neurons" are compared where they are.
        head: the fitted head.
        features: (n, d) training features, as given to ``fit``.
        labels: (n,) their classes.
        max_seconds: limit of the fresh solve.

    Raises:
        EntryError: the record has no gap, a number differs, or the claimed gap is not reached.
        InputError: features or labels do not fit the head.
    """
    gap = fact(record, "gap", (int, float))
    if gap is None or gap < 0:
        raise EntryError(f"{record.name} claims no gap; found {record.metadata.get('gap')!r}. Nothing can be checked.")
    problem = head.problem(features, labels)
    network = head.network()
    objective = problem.objective(network)
    found = {"objective": objective, "radius": head.radius, "reg": head.reg, "neurons": network.size}
    for name, value in found.items():
        stated = record.metadata.get(name, value)
        if not isinstance(stated, (int, float)) or not math.isclose(stated, value, rel_tol=_RELATIVE):
            raise EntryError(
                f"{record.name} says {name} = {stated}, but its head has {value:g} on these features. "
                "Give the head and the features of this record."
            )
    enough = gap * (1 + _RELATIVE) + 1e-9
    needed = objective - enough * max(1e-12, objective)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = get_solver("auto", head.solvers).solve(
            problem,
            tol=enough / 100,
            max_seconds=max_seconds,
            # Confirmed by a bound, or refuted by a better point.
            callbacks=(lambda progress: progress.dual >= needed or progress.primal < needed,),
            start=network,
        )
    recomputed = Certificate(objective, result.dual, relative_gap(objective, result.dual))
    if recomputed.gap > enough:
        raise EntryError(
            f"{record.name} claims a gap of {gap:.3g}, but its head has objective {objective:.6g} and the optimum lies "
            f"between {result.dual:.6g} and {result.primal:.6g} ({result.status}). Allow more time, or fit again."
        )
    return recomputed
