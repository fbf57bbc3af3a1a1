"""Solvers side by side: time to a certified gap, cost of a pass, held-out accuracy; three data sets, radius 0.5.

    python -m benchmarks.solvers --only breast_cancer     each solver has 10 minutes
    python -m benchmarks.solvers --only digits            each solver has 2 minutes
    python -m benchmarks.solvers --only features          5 minutes a solve, one 30; 12 of CPU for features
    python -m benchmarks.solvers --report                 tables and figure of what is finished
    python -m benchmarks.solvers --quick                  small problems, within a minute

Problem: convex_head/problems/polynomial.py; data: benchmarks/solvers_data.py. Solvers are measured in turns in one
process (benchmarks/solvers_cases.py), with controls beside them (benchmarks/solvers_controls.py). Small breast cancer
problems have reference optima, on which two conic solvers agree. The penalty method minimises another function; listed
is the true objective of the network that it leaves. Each task is kept in ``runs/solvers`` when it is finished and is
not run again with the same settings; delete its file to repeat it. ``--threads`` counts for the features only: the
tensors of the other two are small, and have one.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Record, arguments
from benchmarks.solvers_cases import Entry, SideBySide
from benchmarks.solvers_controls import Controls, PassCost, Pyscnn
from benchmarks.solvers_data import PARTS, TEST, TRAIN
from benchmarks.solvers_report import report
from convex_head.console import messages
from convex_head.errors import MissingExtraError

NAME = "solvers"
Task = SideBySide | Controls | Pyscnn | PassCost

_SDP = (Entry("sdp, SCS"), Entry("sdp, CLARABEL"))
_SLOW = (Entry("penalty"), Entry("cutting_set"), *_SDP)
_FIVE = (Entry("column_generation", repeats=5), *_SLOW)
_LOSSES = tuple(Entry("column_generation", loss) for loss in ("one_vs_rest", "crammer_singer", "multi_margin"))
_PENALTY = Entry("penalty", "one_vs_rest")
# The loss of one_vs_rest is a mean over ten classes: a tenth of the reg weighs as much as that of crammer_singer.
_WEIGHED = Entry("column_generation", "one_vs_rest", reg=0.01)
_LONGEST = 600.0
_CLOSE = 1800.0


def full() -> list[Task]:
    """The tasks of a whole run."""
    cancer, digits, features = (
        {"part": part, "n": TRAIN[part], "d": d, "tests": TEST[part]}
        for part, d in zip(PARTS, (30, 64, 512), strict=True)
    )
    small = {"part": "breast_cancer", "tests": TEST["breast_cancer"], "max_seconds": _LONGEST, "entries": _FIVE}
    large = features | {"tol": 1e-2, "max_seconds": 300.0}
    both = tuple(Entry("column_generation", loss) for loss in ("one_vs_rest", "crammer_singer"))
    return [
        SideBySide("breast_cancer-40", n=40, d=5, reg=0.02, tol=1e-4, reference=0.321142, **small),
        SideBySide("breast_cancer-100", n=100, d=9, reg=0.02, tol=1e-4, reference=0.354804, **small),
        SideBySide("breast_cancer-455", reg=0.01, tol=1e-3, max_seconds=_LONGEST, entries=_FIVE, **cancer),
        Controls("breast_cancer-linear", **cancer),
        Pyscnn("breast_cancer-pyscnn", **cancer),
        SideBySide("digits-1437", reg=0.03, tol=1e-2, max_seconds=120.0, entries=(*_LOSSES, _PENALTY), **digits),
        Controls("digits-linear", **digits),
        SideBySide("features-0.1", reg=0.1, entries=(*both, _WEIGHED), **large),
        *(SideBySide(f"features-{reg:g}", reg=reg, entries=both[1:], **large) for reg in (0.03, 0.01)),
        SideBySide("features-close", reg=0.1, entries=both[1:], **features, tol=1e-3, max_seconds=_CLOSE),
        PassCost("features-pass", part="features", n=TRAIN["features"], d=512),
        Controls("features-linear", **features),
    ]


def quick() -> list[Task]:
    """Small tasks of every kind."""
    cancer = {"part": "breast_cancer", "n": 100, "d": 9, "tests": TEST["breast_cancer"]}
    digits = {"part": "digits", "n": 100, "d": 64, "tests": 100}
    features = {"part": "features", "n": 200, "d": 32, "tests": 50}
    small = {"tol": 0.1, "max_seconds": 60.0}
    short = (Entry("column_generation"), *_SLOW)
    return [
        SideBySide(
            "breast_cancer-100", reg=0.02, tol=1e-3, max_seconds=60.0, reference=0.354804, entries=short, **cancer
        ),
        Controls("breast_cancer-linear", **cancer),
        Pyscnn("breast_cancer-pyscnn", gates=5, **cancer),
        SideBySide("digits-100", reg=0.03, entries=(*_LOSSES, _PENALTY), **digits, **small),
        Controls("digits-linear", **digits),
        SideBySide("features-0.1", reg=0.1, entries=_LOSSES[:2], **features, **small),
        PassCost("features-pass", part="features", n=200, d=32, neurons=2, fit_seconds=2.0),
        Controls("features-linear", **features),
    ]


def main(argv: list[str] | None = None) -> None:
    """Run what is not finished, then put everything together."""
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="data sets to run")
    extra.add_argument("--folder", type=Path, help="where features and finished tasks are kept")
    extra.add_argument("--report", action="store_true", help="run nothing")
    options = arguments(NAME, __doc__, argv, threads=2, extra=extra)
    folder = options.folder or Path("runs") / (f"{NAME}-quick" if options.quick else NAME)
    tasks = quick() if options.quick else full()
    for task in tasks:
        if task.part in options.only and not options.report:
            run(task, folder, threads_of(task, options))
    found = {task.name: kept(task, folder, threads_of(task, options)) for task in tasks}
    records = [record for records in found.values() for record in records or ()]
    if not records:
        messages().print(f"nothing is finished in {folder}; run a part first")
        return
    report(options, records, [name for name, records in found.items() if records is None])


def threads_of(task: Task, options: argparse.Namespace) -> int:
    """One, but for the features."""
    return options.threads if task.part == "features" else 1


def _key(task: Task, threads: int) -> str:
    return f"{task!r}, {threads} threads"


def _path(task: Task, folder: Path) -> Path:
    return folder / "tasks" / f"{task.name}.json"


def kept(task: Task, folder: Path, threads: int) -> list[Record] | None:
    """The records of a finished task; None if it is not finished, or was run with other settings."""
    path = _path(task, folder)
    if not path.exists():
        return None
    written = json.loads(path.read_text(encoding="utf-8"))
    return written["records"] if written["settings"] == _key(task, threads) else None


def run(task: Task, folder: Path, threads: int) -> None:
    """Measure a task that is not finished and keep its records; one whose package is missing is left out."""
    if kept(task, folder, threads) is not None:
        return
    try:
        records: Sequence[Record] = task.measure(folder, threads)
    except MissingExtraError as fault:
        messages().print(f"{task.name} is left out: {fault}")
        return
    path = _path(task, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"settings": _key(task, threads), "records": records}), encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    main()
