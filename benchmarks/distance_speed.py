"""Exact distances to the decision boundary a second, and a proof that they are exact.

    python -m benchmarks.distance_speed            20,000 points, 512 features, 10 classes
    python -m benchmarks.distance_speed --quick    500 points, 32 features, 4 classes

Features look like those of a pooled convolutional network: ten clusters in a covariance whose spectrum falls like
1/k, cut off at zero. One distance is the smallest over the other classes. Each of a few points is checked by code that
shares nothing with the package: the dual function of  min |e|^2  s.t.  h(e) <= 0, maximised by scipy on the dense
d x d Hessians, bounds every distance from below, and the step of the nearest class is put into the logits; "error"
is the largest relative disagreement. Rates per CPU second are there for a busy machine, on which those per second say
little; with --threads 1 the two agree on an idle one.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from benchmarks.common import Column, Record, arguments, load_average, publish, synthetic_features
from convex_head import ConvexRobustHead
from convex_head.errors import ConvergenceWarning

NAME = "distance_speed"
_CHECKED = 5


def quadratics(head: ConvexRobustHead) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hessians (C, d, d), slopes (C, d) and constants (C,) of the logits in standardised features."""
    a, b, c = head.coefficients
    u, weights = head.directions.double().numpy(), head.readout.double().numpy()
    hessians = 2 * a * np.einsum("cm,mi,mj->cij", weights, u, u, optimize=True)
    return hessians, b * weights @ u, c * weights.sum(axis=1)


def dual_distance(hessian: np.ndarray, gradient: np.ndarray, value: float) -> tuple[float, np.ndarray]:
    """Lower bound of min |e| subject to value + g'e + e'He/2 <= 0, tight by the S-lemma, and the step e behind it."""
    eigenvalues, vectors = np.linalg.eigh(hessian)
    g = vectors.T @ gradient
    largest = 1e6 if eigenvalues[0] >= 0 else -2 / eigenvalues[0]

    def negative_dual(log_multiplier: float) -> float:
        t = np.exp(log_multiplier)
        return -(t * value - np.sum((t * g) ** 2 / (4 + 2 * t * eigenvalues)))

    best = minimize_scalar(
        negative_dual,
        bounds=(np.log(largest) - 25, np.log(largest) - 1e-9),
        method="bounded",
        options={"xatol": 1e-12, "maxiter": 2000},
    )
    t = float(np.exp(best.x))
    return float(np.sqrt(max(0.0, -best.fun))), vectors @ (-t * g / (2 + t * eigenvalues))


def check(head: ConvexRobustHead, features: Tensor, distances: Tensor) -> float:
    """Largest relative disagreement with scipy over some points, in distance and in the margin at the step."""
    hessians, slopes, constants = quadratics(head)
    z = ((features.double() - head.mean.double()) / head.scale.double()).numpy()
    worst = 0.0
    for point, distance in zip(z[:_CHECKED], distances[:_CHECKED].tolist(), strict=True):
        values = 0.5 * np.einsum("i,cij,j->c", point, hessians, point) + slopes @ point + constants
        label = int(values.argmax())
        found = []
        for rival in range(len(values)):
            if rival == label:
                continue
            hessian = hessians[label] - hessians[rival]
            gradient = hessian @ point + slopes[label] - slopes[rival]
            margin = float(values[label] - values[rival])
            bound, step = dual_distance(hessian, gradient, margin)
            left = margin + gradient @ step + 0.5 * step @ hessian @ step
            found.append((bound, abs(left) / margin))
        bound, left = min(found)
        worst = max(worst, abs(bound / distance - 1), left)
    return worst


def rates(work: Callable[[], Any], points: int, repeats: int) -> tuple[float, float]:
    """Points a second and a CPU second, medians of ``repeats`` runs after one that warms up."""
    work()
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        started, began = time.perf_counter(), time.process_time()
        work()
        cpu_seconds.append(time.process_time() - began)
        seconds.append(time.perf_counter() - started)
    return points / statistics.median(seconds), points / statistics.median(cpu_seconds)


def measure(reg: float, points: int, width: int, classes: int, repeats: int, fit_seconds: float) -> Record:
    """One head: how it was fitted, its speed and its check."""
    train, labels = synthetic_features(min(2000, points), width, classes, seed=0)
    queries, query_labels = synthetic_features(points, width, classes, seed=1)
    head = ConvexRobustHead(width, classes, radius=0.5, reg=reg)
    # The speed depends on the neurons, which are there long before the gap is closed.
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        head.fit(train, labels, tol=0.1, max_seconds=fit_seconds, progress=False)
    load = load_average()
    distances = head.distance_to_boundary(queries)
    found = rates(lambda: head.distance_to_boundary(queries), points, repeats)
    margins = rates(lambda: head.worst_case_margin(queries, query_labels), points, repeats)
    return {
        "points": points,
        "features": width,
        "classes": classes,
        "reg": reg,
        "neurons": head.directions.shape[0],
        "gap": head.result_.gap if head.result_ else None,
        "accuracy": float((head(queries).argmax(dim=1) == query_labels).double().mean()),
        "median_distance": float(distances.median()),
        "distances_per_second": found[0],
        "distances_per_cpu_second": found[1],
        "margins_per_second": margins[0],
        "margins_per_cpu_second": margins[1],
        "disagreement": check(head, queries, distances),
        "checked": _CHECKED,
        "threads": torch.get_num_threads(),
        "load_average": load,
    }


def draw(pyplot: Any, records: list[Record]) -> None:
    """Rates of every head as bars."""
    names = [f"reg {record['reg']:g}, {record['neurons']} neurons" for record in records]
    places = np.arange(len(records))
    for shift, key in ((-0.2, "distances"), (0.2, "margins")):
        values = [record[f"{key}_per_second"] for record in records]
        bars = pyplot.barh(places + shift, values, height=0.36, label=f"{key} a second")
        pyplot.bar_label(bars, fmt="{:,.0f}", padding=3)
    for wanted, name in ((1e5, "aim"), (2e4, "at least")):
        pyplot.axvline(wanted, color="0.4", linestyle="--", linewidth=1)
        pyplot.annotate(name, (wanted, 0.97), (3, 0), ("data", "axes fraction"), "offset points")
    pyplot.yticks(places, names)
    pyplot.xlim(0, 1.3e5)
    first = records[0]
    pyplot.title(f"Exact certificates, d = {first['features']}, C = {first['classes']}, {first['threads']} thread(s)")
    pyplot.legend(loc="upper left", bbox_to_anchor=(0.0, -0.06), ncols=2)


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    options = arguments(NAME, __doc__, argv, threads=2)
    points, width, classes, repeats = (500, 32, 4, 1) if options.quick else (20_000, 512, 10, 5)
    regs, fit_seconds = ((1e-2,), 3.0) if options.quick else ((3e-2, 3e-3), 60.0)
    records = [measure(reg, points, width, classes, repeats, fit_seconds) for reg in regs]
    columns = [
        Column("reg", "reg", "{:g}".format),
        Column("neurons", "neurons"),
        Column("threads", "threads"),
        Column("accuracy", "accuracy", "{:.3f}".format),
        Column("median_distance", "median", "{:.3f}".format),
        Column("distances_per_second", "distances/s", "{:,.0f}".format),
        Column("distances_per_cpu_second", "distances/CPU s", "{:,.0f}".format),
        Column("margins_per_second", "margins/s", "{:,.0f}".format),
        Column("margins_per_cpu_second", "margins/CPU s", "{:,.0f}".format),
        Column("disagreement", "error", "{:.1e}".format),
    ]
    title = f"Exact distances to the boundary: {points:,} points, d = {width}, C = {classes}"
    publish(options, title, records, records, columns, lambda pyplot: draw(pyplot, records))


if __name__ == "__main__":
    main()
