"""Certified fits at 100 and 1000 classes, from memory and from disk.

    python -m benchmarks.many_classes            20 minutes of one core, 20 MB in a temporary folder
    python -m benchmarks.many_classes --quick    seconds

Synthetic features (clusters, a spectrum that falls like 1/k, cut off at zero). Every fit has three minutes, ten at 1000
classes, and ends with the objective and the bound that it has reached; both are of the exact worst cases of all
margins. "disk" reads a memory-mapped file in every pass: the ImageNet design with fewer and narrower rows. Accuracies
are on 2,000 held-out rows, beside the nearest class mean and the linear discriminant (the direction that fits at many
classes start from, with its offset) on the same rows; certified: the exact worst-case margin in the feature ball is
above 0.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from benchmarks.common import Column, Record, arguments, load_average, publish, synthetic_features
from convex_head import ConvexRobustHead
from convex_head.errors import ConvergenceWarning

NAME = "many_classes"
_HELD_OUT = 2000
_RADIUS, _TOL = 0.25, 0.05
# Of the covariance of a class towards a multiple of the identity; about the ridge of the head's own start.
_SHRINKAGE = 0.2


def settings(quick: bool) -> list[Record]:
    """What is fitted."""
    seconds = 2.0 if quick else 180.0
    small = {"rows": 500, "features": 16, "classes": 20, "seconds_allowed": seconds}
    hundred = {"rows": 10_000, "features": 512, "classes": 100, "seconds_allowed": seconds}
    thousand = {"rows": 20_000, "features": 256, "classes": 1000, "seconds_allowed": 600.0}
    one, pairs = {"loss": "one_vs_rest"}, {"loss": "crammer_singer", "reg": 0.01}
    if quick:
        return [
            small | how | {"source": source} for source in ("memory", "disk") for how in (one | {"reg": 0.005}, pairs)
        ]
    return [
        hundred | one | {"reg": 1e-3, "source": "memory"},
        hundred | pairs | {"source": "memory"},
        thousand | pairs | {"reg": 1e-3, "source": "disk"},
    ]


def measure(setting: Record, threads: int) -> Record:
    """One fit."""
    torch.set_num_threads(threads)
    rows, width, classes = setting["rows"], setting["features"], setting["classes"]
    x, y = synthetic_features(rows + _HELD_OUT, width, classes, seed=0)
    train, labels, test, truth = x[:rows], y[:rows], x[rows:], y[rows:]
    head = ConvexRobustHead(width, classes, radius=_RADIUS, reg=setting["reg"], loss=setting["loss"])
    load, began = load_average(), time.process_time()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        features: Any = train
        if setting["source"] == "disk":
            path = Path(folder) / "features.npy"
            np.save(path, train.numpy())
            features = np.load(path, mmap_mode="r")
        head.fit(features, labels, tol=_TOL, max_seconds=setting["seconds_allowed"])
    result = head.result_
    assert result is not None
    return setting | {
        "status": result.status.value,
        "gap": result.gap,
        "objective": result.primal,
        "lower_bound": result.dual,
        "passes": result.extra["evaluations"],
        "neurons": result.neurons,
        "cpu_seconds": time.process_time() - began,
        "clean": share(head(test).argmax(1) == truth),
        "certified": share(head.worst_case_margin(test, truth) > 0),
        "nearest_mean": share(nearest_mean(train, labels, test, classes) == truth),
        **discriminant(train, labels, test, truth),
        "threads": threads,
        "load_average": load,
    }


def nearest_mean(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Class whose mean is nearest, features standardised as the head does."""
    mean, scale = train.mean(0), train.std(0, unbiased=False).clamp_min(1e-12)
    sums = torch.zeros(classes, train.shape[1]).index_add_(0, labels, (train - mean) / scale)
    means = sums / torch.bincount(labels, minlength=classes).clamp_min(1).unsqueeze(1)
    return torch.cdist((test - mean) / scale, means).argmin(1)


def discriminant(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> Record:
    """Accuracy of scikit-learn's shrunken linear discriminants, clean and exact in the ball; features as the head's."""
    mean, scale = train.mean(0), train.std(0, unbiased=False).clamp_min(1e-12)
    train, test = ((x - mean) / scale for x in (train, test))
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=_SHRINKAGE).fit(train.numpy(), labels.numpy())
    weight, offset = (torch.from_numpy(part).double() for part in (model.coef_, model.intercept_))
    logits, column = test.double() @ weight.T + offset, torch.searchsorted(torch.from_numpy(model.classes_), truth)
    margins = logits.gather(1, column[:, None]) - logits
    distance = torch.cdist(weight, weight)[column]
    others = torch.ones_like(margins, dtype=torch.bool).scatter_(1, column[:, None], False)
    known = torch.from_numpy(np.isin(truth.numpy(), model.classes_))
    return {
        name: share(((margins - radius * distance > 0) | ~others).all(1) & known)
        for name, radius in (("discriminant", 0.0), ("discriminant_certified", _RADIUS))
    }


def share(right: Tensor) -> float:
    """Mean of booleans."""
    return float(right.double().mean())


def draw(pyplot: Any, records: list[Record]) -> None:
    """Objective and bound of every fit, as bars."""
    place = range(len(records))
    pyplot.barh([p + 0.2 for p in place], [r["objective"] for r in records], height=0.38, label="objective")
    pyplot.barh([p - 0.2 for p in place], [r["lower_bound"] for r in records], height=0.38, label="lower bound")
    names = [f"C = {r['classes']}, {r['loss']}, {r['rows']:,} x {r['features']} ({r['source']})" for r in records]
    pyplot.yticks(list(place), names, fontsize=8)
    pyplot.xlabel("value; the optimum lies between the two")
    pyplot.legend()


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    options = arguments(NAME, __doc__, argv)
    records = [measure(setting, options.threads) for setting in settings(options.quick)]
    percent = "{:.1%}".format
    columns = [
        Column("classes", "classes"),
        Column("loss", "loss"),
        Column("rows", "rows", "{:,}".format),
        Column("features", "features"),
        Column("source", "from"),
        Column("objective", "objective", "{:.4f}".format),
        Column("lower_bound", "bound", "{:.4f}".format),
        Column("gap", "gap", percent),
        Column("passes", "passes"),
        Column("neurons", "neurons"),
        Column("seconds_allowed", "limit, s", "{:.0f}".format),
        Column("cpu_seconds", "CPU s", "{:.0f}".format),
        Column("clean", "clean", percent),
        Column("certified", "certified", percent),
        Column("discriminant", "LDA", percent),
        Column("discriminant_certified", "LDA certified", percent),
    ]
    notes = (
        f"Radius {_RADIUS}, asked for a gap of {_TOL:.0%}; worst cases and bounds are exact in every row.",
        f"LDA: linear discriminants, shrinkage {_SHRINKAGE}.",
    )
    publish(options, "Many classes", records, records, columns, lambda pyplot: draw(pyplot, records), notes)


if __name__ == "__main__":
    main()
