"""ReLU, gated ReLU and polynomial heads: what do patterns, slack and more data buy?

    python -m benchmarks.relu_patterns                    about 35 CPU minutes
    python -m benchmarks.relu_patterns --only patterns    a part: patterns, slack, or a number of examples
    python -m benchmarks.relu_patterns --report           table and figure of what is finished
    python -m benchmarks.relu_patterns --quick            less than a minute

patterns    sklearn's breast cancer data, 455 examples for training and 114 for testing: P = 10..1000 sampled patterns
slack       the same at P = 30: weight of violated cone constraints, up to hard ones
data        Fashion-MNIST, pixels pooled to 7 x 7 as features, n = 100..50,000 examples for training, 2,000 for testing

On three splits with three draws of the patterns (10,000 and 50,000: one): means and standard deviations. All heads
have the same l2 radius and are trained to a gap of 5 % or for a limited CPU time, looked at between stages; the table
has the gap that was reached. In the first two parts reg is the same for all. In the third every kind has, at every n
and on every split, the reg of three whose certified accuracy is best on a part of the *training* examples, fitted on
the rest: a fifth, but 8,000 of 10,000, and 50,000 takes the reg of 10,000. Accuracies are on test examples, in the
feature ball of the training radius:

    attacked    right at the worst point of the ball that is known: an upper bound (exact for the polynomial)
    certified   certified margin above 0: a lower bound (exact for the polynomial)

violation   relu: largest violation of a cone constraint on the training data, in units of the margin; gated_relu:
            largest excess of the margin that was trained on over the certified one

Finished fits are kept in ``runs/relu_patterns`` and never computed twice, so that parts can run side by side.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

from benchmarks.common import Record, arguments, load_average
from benchmarks.relu_patterns_report import report
from convex_head import ConvexRobustHead, load_dataset
from convex_head.console import messages, progress_bars
from convex_head.errors import ConvergenceWarning, InfeasibleError, SolverError
from convex_head.solvers import Status

NAME = "relu_patterns"
TOL = 5e-2
Data = tuple[Tensor, Tensor, Tensor, Tensor]
KINDS: dict[str, dict[str, Any]] = {
    "polynomial": {"activation": "polynomial"},
    "relu": {"activation": "relu"},
    "relu, slack 0.1": {"activation": "relu", "slack": 0.1},
    "gated, cover": {"activation": "gated_relu", "flips": "cover"},
    "gated, ignore": {"activation": "gated_relu", "flips": "ignore"},
}
# One split chooses reg for all of these sizes, and it is the split of the first of them.
_CHOSEN_ONCE, _MOST_TO_CHOOSE = 10_000, 2_000


@dataclass(frozen=True)
class Plan:
    """What is run: patterns, slacks, (examples, CPU seconds allowed a head, splits) and the regs to choose from."""

    patterns: tuple[int, ...] = (10, 30, 100, 300, 1000)
    slacks: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, math.inf)
    sizes: tuple[tuple[int, float, int], ...] = (
        (100, 20.0, 3),
        (1000, 60.0, 3),
        (10_000, 120.0, 1),
        (50_000, 300.0, 1),
    )
    splits: int = 3
    seconds: float = 30.0
    radius: float = 0.5
    reg: float = 0.01
    regs: tuple[float, ...] = (0.003, 0.01, 0.03)
    data_patterns: int = 30


QUICK = Plan((5, 10), (1.0, math.inf), ((100, 1.0, 1),), splits=1, seconds=1.0, regs=(0.01, 0.03), data_patterns=5)


@dataclass(frozen=True)
class Fit:
    """One head: its data, settings and seed; ``validates``: on part of the training examples, for the rest."""

    part: str
    kind: str
    n: int
    seed: int
    reg: float
    radius: float
    seconds: float
    patterns: int | None = None
    slack: float | None = None
    validates: bool = False

    @property
    def name(self) -> str:
        """Of the file that keeps it."""
        settings = f"P{self.patterns}-slack{self.slack}-reg{self.reg:g}{'-validation' if self.validates else ''}"
        return f"{self.part}-{self.kind.replace(', ', '_').replace(' ', '')}-n{self.n}-{settings}-seed{self.seed}"

    def data(self) -> Data:
        """Features and labels to train on, features and labels to measure on."""
        if self.part != "data":
            return breast_cancer(self.seed)
        x, y, t, labels = fashion(self.n, self.seed)
        count = min(self.n - self.n // 5, _MOST_TO_CHOOSE)
        return (x[:count], y[:count], x[count:], y[count:]) if self.validates else (x, y, t, labels)


def breast_cancer(seed: int) -> Data:
    """A stratified split: 455 examples for training, 114 for testing."""
    x, y = load_breast_cancer(return_X_y=True)
    train, test, a, b = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    return torch.tensor(train), torch.tensor(a), torch.tensor(test), torch.tensor(b)


@functools.cache
def pooled(split: str, n: int) -> tuple[Tensor, Tensor]:
    """The first n images of a split, pooled to 49 features, and their labels."""
    found = load_dataset("fashion_mnist", split=split, n=n)
    return functional.avg_pool2d(found.images, 4).flatten(1).double(), found.labels


def fashion(n: int, seed: int) -> Data:
    """n random ones of the 60,000 training images and 2,000 test images."""
    x, y = pooled("train", 60_000)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]
    return x[rows], y[rows], *pooled("test", 2000)


def measure(fit: Fit) -> Record:
    """Fit one head and measure it."""
    x, y, t, labels = fit.data()
    given = {name: value for name in ("patterns", "slack") if (value := getattr(fit, name)) is not None}
    settings = KINDS[fit.kind] | given | {"radius": fit.radius, "reg": fit.reg}
    head = ConvexRobustHead(x.shape[1], int(y.max()) + 1, **settings).double()
    row: Record = {"part": "choice" if fit.validates else fit.part, "kind": fit.kind, "n": fit.n, "seed": fit.seed}
    row |= {"reg": fit.reg, "patterns": fit.patterns, "slack": None if fit.slack is None else str(fit.slack)}
    row["load"] = load_average()
    began = time.process_time()

    def spent() -> float:
        return time.process_time() - began

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the gap is in the record
            head.fit(x, y, tol=TOL, seed=fit.seed, progress=False, callback=lambda _: spent() > fit.seconds)
    except InfeasibleError:
        return row | {"status": "only v = 0 is feasible"}
    except SolverError:
        return row | {"status": "no point"}
    result = head.result_
    assert result is not None
    limited = result.status is Status.INTERRUPTED
    row |= {
        "status": "time limit" if limited else result.status.value,
        "cpu_seconds": spent(),
        "seconds": result.seconds,
    }
    worst = head.worst_case_features(t, labels)
    row |= {"gap": result.gap, "objective": result.primal}
    row |= {"clean": _share(head(t).argmax(1) == labels), "attacked": _share(head(worst).argmax(1) == labels)}
    row["certified"] = _share(head.worst_case_margin(t, labels) > 0)
    for name in ("violation_max", "violation_mean", "constraints_hold", "certified_share", "model_minus_network"):
        row[name] = result.extra.get(name)
    return row


def _share(right: Tensor) -> float:
    return float(right.double().mean())


class Keeper:
    """Finished fits, one file each; ``fits`` False: what is not finished stays so."""

    def __init__(self, folder: Path, fits: bool):
        self.folder, self.fits = folder, fits

    def __call__(self, fit: Fit) -> Record | None:
        """The record of a fit, from its file or by fitting."""
        path, key = self.folder / f"{fit.name}.json", {k: str(v) for k, v in asdict(fit).items()}
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] == key:
                record: Record = found["record"]
                return record
        if not self.fits:
            return None
        record = measure(fit)
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"settings": key, "record": record}), encoding="utf-8")
        part.replace(path)
        return record


def breast_cancer_records(plan: Plan, keeper: Keeper, only: str) -> Iterator[Record | None]:
    """Of the parts patterns and slack."""
    shared: dict[str, Any] = {"n": 455, "reg": plan.reg, "radius": plan.radius, "seconds": plan.seconds}
    for seed in range(plan.splits):
        if only == "slack":
            for slack in plan.slacks:
                yield keeper(Fit("slack", "relu", seed=seed, patterns=30, slack=slack, **shared))
            continue
        yield keeper(Fit("patterns", "polynomial", seed=seed, **shared))
        for patterns in plan.patterns:
            for kind in ("relu", "gated, cover", "gated, ignore"):
                yield keeper(Fit("patterns", kind, seed=seed, patterns=patterns, **shared))


def data_records(plan: Plan, keeper: Keeper, n: int, limit: float, splits: int) -> Iterator[Record | None]:
    """Of one size in the part data: the fits that choose reg, then the head."""
    limits = {size: seconds for size, seconds, _ in plan.sizes}
    for seed in range(splits):
        for kind in ("polynomial", "relu", "relu, slack 0.1", "gated, cover"):
            patterns = None if kind == "polynomial" else plan.data_patterns
            shared: dict[str, Any] = {"radius": plan.radius, "patterns": patterns}
            at, by = (n, seed) if n < _CHOSEN_ONCE else (_CHOSEN_ONCE, 0)
            choice = dict(shared, seconds=limits[at] / 4, validates=True)
            tried = [keeper(Fit("data", kind, at, by, reg, **choice)) for reg in plan.regs]
            if at == n and by == seed:
                yield from tried
            scored = [(row["certified"], row["reg"]) for row in tried if row is not None and "certified" in row]
            if len(scored) < len(plan.regs):
                yield None
                continue
            yield keeper(Fit("data", kind, n, seed, max(scored)[1], seconds=limit, **shared))


def main(argv: list[str] | None = None) -> None:
    """Run what is not finished, then publish all that is."""
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument("--only", nargs="+", help="parts to run: patterns, slack, or numbers of examples")
    extra.add_argument("--folder", type=Path, help="where finished fits are kept")
    extra.add_argument("--report", action="store_true", help="run nothing")
    options = arguments(NAME, __doc__, argv, extra=extra)
    plan = QUICK if options.quick else Plan()
    folder = options.folder or Path("runs") / (f"{NAME}-quick" if options.quick else NAME)
    records: list[Record] = []
    missing = 0
    parts = ["patterns", "slack", *(str(n) for n, _, _ in plan.sizes)]
    sizes = {str(size[0]): size for size in plan.sizes}
    with progress_bars(messages()) as bars:
        task = bars.add_task("fits", total=None, note="")
        for part in parts:
            keeper = Keeper(folder, not options.report and part in (options.only or parts))
            found = (
                data_records(plan, keeper, *sizes[part]) if part in sizes else breast_cancer_records(plan, keeper, part)
            )
            for record in found:
                missing += record is None
                records += [] if record is None else [record]
                bars.update(task, advance=1, note=part)
    if not records:
        messages().print(f"nothing is finished in {folder}; run a part first")
        return
    report(options, list(KINDS), records, missing, plan.radius, plan.reg)


if __name__ == "__main__":
    main()
