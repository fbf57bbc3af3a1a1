"""ReLU, gated ReLU and polynomial heads: what do patterns, slack and more data buy?

    python -m benchmarks.relu_patterns            about 20 minutes on one core
    python -m benchmarks.relu_patterns --quick    less than a minute

patterns    sklearn's breast cancer data, 455 examples for training and 114 for testing: P = 10..1000 sampled patterns
slack       the same at P = 30: weight of violated cone constraints, up to hard ones
data        Fashion-MNIST, pixels pooled to 7 x 7 as features, n = 100..10,000 examples for training, 1,000 for testing

Everything on three splits, with three draws of the patterns: means and standard deviations. Every head is trained with
the same l2 radius and reg, to a gap of 5 % or for a limited time; the table has the gap that was reached. Accuracies
are on test examples, in the feature ball of the training radius:

    attacked    right at the worst point of the ball that is known: an upper bound (exact for the polynomial)
    certified   certified margin above 0: a lower bound (exact for the polynomial)

violation   relu: largest violation of a cone constraint on the training data, in units of the margin; gated_relu:
            largest excess of the margin that was trained on over the certified one
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

from benchmarks.common import COLOURS, Column, Record, arguments, load_average, publish
from convex_head import ConvexRobustHead, load_dataset
from convex_head.console import messages, progress_bars
from convex_head.errors import ConvergenceWarning, InfeasibleError, SolverError

NAME = "relu_patterns"
Data = tuple[Tensor, Tensor, Tensor, Tensor]
KINDS: dict[str, dict[str, Any]] = {
    "polynomial": {"activation": "polynomial"},
    "relu": {"activation": "relu"},
    "relu, slack 0.1": {"activation": "relu", "slack": 0.1},
    "gated, cover": {"activation": "gated_relu", "flips": "cover"},
    "gated, ignore": {"activation": "gated_relu", "flips": "ignore"},
}


@dataclass(frozen=True)
class Plan:
    """What is run: patterns, slacks, (examples, seconds allowed a head), splits of the small data."""

    patterns: tuple[int, ...] = (10, 30, 100, 300, 1000)
    slacks: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, math.inf)
    sizes: tuple[tuple[int, float], ...] = ((100, 8.0), (1000, 15.0), (10_000, 30.0))
    splits: int = 3
    seconds: float = 6.0
    radius: float = 0.5
    reg: float = 0.01
    data_patterns: int = 30


QUICK = Plan(patterns=(5, 10), slacks=(1.0, math.inf), sizes=((100, 1.0),), splits=1, seconds=1.0, data_patterns=5)


def breast_cancer(seed: int) -> Data:
    """A stratified split: 455 examples for training, 114 for testing."""
    x, y = load_breast_cancer(return_X_y=True)
    train, test, a, b = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    return torch.tensor(train), torch.tensor(a), torch.tensor(test), torch.tensor(b)


def fashion(n: int, seed: int) -> Data:
    """n random ones of 20,000 training images and 1,000 test images, pooled to 49 features."""
    train, test = (load_dataset("fashion_mnist", split=s, n=k) for s, k in (("train", 20_000), ("test", 1000)))
    x, t = (functional.avg_pool2d(part.images, 4).flatten(1).double() for part in (train, test))
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]
    return x[rows], train.labels[rows], t, test.labels


def measure(data: Data, kind: str, plan: Plan, seconds: float, seed: int, **settings: Any) -> Record:
    """Fit one head and measure it."""
    x, y, t, labels = data
    head = ConvexRobustHead(
        x.shape[1], int(y.max()) + 1, radius=plan.radius, reg=plan.reg, **(KINDS[kind] | settings)
    ).double()
    row: Record = {"kind": kind, "n": len(x), "seed": seed, "load": load_average()}
    row |= {"patterns": settings.get("patterns"), "slack": str(settings["slack"]) if "slack" in settings else None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the gap is in the record
            head.fit(x, y, tol=5e-2, max_seconds=seconds, seed=seed, progress=False)
    except InfeasibleError:
        return row | {"status": "only v = 0 is feasible"}
    except SolverError:
        return row | {"status": f"no point in {seconds:g} s"}
    result = head.result_
    assert result is not None
    worst = head.worst_case_features(t, labels)
    row |= {"status": result.status.value, "seconds": result.seconds, "gap": result.gap, "objective": result.primal}
    row |= {"clean": _share(head(t).argmax(1) == labels), "attacked": _share(head(worst).argmax(1) == labels)}
    row["certified"] = _share(head.worst_case_margin(t, labels) > 0)
    for name in ("violation_max", "violation_mean", "constraints_hold", "certified_share", "model_minus_network"):
        row[name] = result.extra.get(name)
    return row


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def runs(plan: Plan) -> Iterator[tuple[str, Data, str, float, int, dict[str, Any]]]:
    """(part, data, kind, seconds, seed, settings) of every head."""
    for seed in range(plan.splits):
        data = breast_cancer(seed)
        yield "patterns", data, "polynomial", plan.seconds, seed, {}
        for patterns in plan.patterns:
            for kind in ("relu", "gated, cover", "gated, ignore"):
                yield "patterns", data, kind, plan.seconds, seed, {"patterns": patterns}
        for slack in plan.slacks:
            yield "slack", data, "relu", plan.seconds, seed, {"patterns": 30, "slack": slack}
        for n, limit in plan.sizes:
            for kind in ("polynomial", "relu", "relu, slack 0.1", "gated, cover"):
                settings: dict[str, Any] = {} if kind == "polynomial" else {"patterns": plan.data_patterns}
                yield "data", fashion(n, seed), kind, limit, seed, settings


def summaries(records: list[Record]) -> list[Record]:
    """Means over splits; standard deviations under ``<key>_sd``."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for row in records:
        groups.setdefault(tuple(row[k] for k in ("part", "kind", "n", "patterns", "slack")), []).append(row)
    rows = []
    for members in groups.values():
        row = {key: value for key, value in members[0].items() if not isinstance(value, float)}
        row["status"] = ", ".join(dict.fromkeys(member["status"] for member in members))
        row["fits"] = len(members)
        for key in dict.fromkeys(
            key for member in members for key, value in member.items() if isinstance(value, float)
        ):
            values = [member[key] for member in members if member.get(key) is not None]
            row[key] = statistics.fmean(values)
            row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
    return rows


def draw(plt: Any, rows: list[Record]) -> None:
    """Accuracy, time and gap against P; accuracy and violation against slack; accuracy and gap against n."""
    plt.gcf().set_size_inches(13.5, 7.6)
    axes = plt.gcf().subplots(2, 3)
    colours = dict(zip(KINDS, COLOURS, strict=False))
    for kind, colour in colours.items():
        part = [r for r in rows if r["part"] == "patterns" and r["kind"] == kind]
        if kind == "polynomial":
            for axis, key in zip(axes[0], ("certified", "seconds", "gap"), strict=True):
                axis.axhline(_scaled(part[0], key), color=colour, label=f"{kind} (no patterns)")
                spread = _scaled(part[0], f"{key}_sd")
                axis.axhspan(_scaled(part[0], key) - spread, _scaled(part[0], key) + spread, color=colour, alpha=0.12)
        elif part:
            _curve(axes[0, 0], part, "patterns", "attacked", "-o", colour, kind)
            _curve(axes[0, 0], part, "patterns", "certified", ":", colour)
            _curve(axes[0, 1], part, "patterns", "seconds", "-o", colour, kind)
            _curve(axes[0, 2], part, "patterns", "gap", "-o", colour, kind)
        part = [r for r in rows if r["part"] == "data" and r["kind"] == kind and "clean" in r]
        if part:
            _curve(axes[1, 1], part, "n", "attacked", "-o", colour, kind)
            _curve(axes[1, 1], part, "n", "certified", ":", colour)
            _curve(axes[1, 1], part, "n", "clean", "--", colour)
            _curve(axes[1, 2], part, "n", "gap", "-o", colour, kind)
    for axis, title in zip(axes[0], ("robust test accuracy, %", "seconds a fit", "gap reached, %"), strict=True):
        axis.set(xscale="log", xlabel="patterns P (breast cancer)", ylabel=title)
        axis.legend(fontsize=8)
    axes[0, 1].set_yscale("log")
    part = [r for r in rows if r["part"] == "slack" and "clean" in r]
    for row in part:
        row["weight"] = float(row["slack"])
    for key, style in (("clean", "-o"), ("attacked", "-s"), ("certified", ":")):
        _curve(axes[1, 0], part, "weight", key, style, COLOURS[1], key)
    axes[1, 0].set(xscale="log", xlabel="slack (breast cancer, relu, P = 30)", ylabel="test accuracy, %")
    twin = axes[1, 0].twinx()
    twin.plot([r["weight"] for r in part], [r["violation_max"] for r in part], "--x", color=COLOURS[5])
    twin.set(ylabel="largest violation (dashed)", yscale="log")
    axes[1, 0].legend(fontsize=8)
    for axis, title in ((axes[1, 1], "test accuracy, %"), (axes[1, 2], "gap reached, %")):
        axis.set(xscale="log", xlabel="training examples (Fashion-MNIST, 7 x 7)", ylabel=title)
        axis.legend(fontsize=8)
    axes[1, 1].set_title("solid attacked, dotted certified, dashed clean", fontsize=9)


def _curve(axis: Any, rows: list[Record], x: str, y: str, style: str, colour: str, label: str | None = None) -> None:
    """Means with standard deviations as bars."""
    values, bars = [_scaled(r, y) for r in rows], [_scaled(r, f"{y}_sd") for r in rows]
    axis.errorbar(
        [r[x] for r in rows], values, yerr=bars, fmt=style, ms=4, lw=1.3, capsize=2, color=colour, label=label
    )


def _scaled(row: Record, key: str) -> float:
    value: float = row[key]
    return value if key.startswith("seconds") else 100 * value


def written(rows: list[Record]) -> list[Record]:
    """The table's rows: "mean ± standard deviation" as text."""
    out = []
    for row in rows:
        texts: Record = {key: row.get(key) for key in ("part", "kind", "n", "patterns", "slack", "fits", "status")}
        for key in ("clean", "attacked", "certified", "gap", "seconds"):
            if key in row:
                texts[key] = f"{_scaled(row, key):.1f} ± {_scaled(row, f'{key}_sd'):.1f}"
        for key in ("violation_max", "model_minus_network"):
            if row.get(key) is not None:
                texts[key] = f"{row[key]:.2g}"
        out.append(texts)
    return out


def main(argv: list[str] | None = None) -> None:
    """Run the plan and publish."""
    options = arguments(NAME, __doc__, argv)
    plan = QUICK if options.quick else Plan()
    records: list[Record] = []
    everything = list(runs(plan))
    with progress_bars(messages()) as bars:
        task = bars.add_task("heads", total=len(everything), note="")
        for part, data, kind, seconds, seed, settings in everything:
            records.append({"part": part, **measure(data, kind, plan, seconds, seed, **settings)})
            bars.update(task, advance=1, note=f"{part}, {kind}, n = {len(data[0])}")
    rows = summaries(records)

    columns = [
        Column("part", "part"),
        Column("kind", "head"),
        Column("n", "n"),
        Column("patterns", "P"),
        Column("slack", "slack"),
        Column("clean", "clean %"),
        Column("attacked", "attacked %"),
        Column("certified", "certified %"),
        Column("seconds", "s"),
        Column("gap", "gap %"),
        Column("violation_max", "violation"),
        Column("model_minus_network", "model - network"),
        Column("fits", "fits"),
        Column("status", "ended"),
    ]
    notes = [
        "Means ± standard deviations over splits (fits), each with its own patterns.",
        "attacked and certified: upper and lower bound of the accuracy in the ball; exact for the polynomial.",
        f"radius {plan.radius:g}, reg {plan.reg:g} throughout; relu has slack 1 where none is given.",
    ]
    publish(options, "Patterns, slack and data", records, written(rows), columns, lambda plt: draw(plt, rows), notes)


if __name__ == "__main__":
    main()
