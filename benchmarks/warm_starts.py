"""What a path of ten heads over the radius or the regularisation costs, in units of one fit from scratch.

    python -m benchmarks.warm_starts            digits, and synthetic features of width 512; 40 minutes of one core
    python -m benchmarks.warm_starts --quick    seconds

Every head of a path starts from the network and the multipliers of the head before it, as robustify follows a path; the
first starts from scratch. A single fit is the mean of three fits from scratch, at the first, the middle and the last
setting of the same path, to the same certified gap. Work is counted in passes (evaluations of objective and gradient
with every worst case) and in CPU seconds, which have everything in them. crammer_singer, float64, one thread.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.common import Column, Record, arguments, load_average, publish, synthetic_features
from convex_head.errors import ConvergenceWarning
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers import SolveResult, get_solver

NAME = "warm_starts"
_RADIUS, _REG = 0.5, 0.01
_MAX_SECONDS = 600.0
_TOLS = {"digits": (1e-2, 3e-2), "features": (3e-2,)}


def dataset(name: str, quick: bool) -> tuple[Tensor, Tensor]:
    """Standardised features (n, d), float64, and labels."""
    if name == "digits":
        pixels, targets = load_digits(return_X_y=True)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[: 100 if quick else 800]
        x, y = torch.from_numpy(pixels)[order].double(), torch.from_numpy(targets)[order]
    else:
        x, y = synthetic_features(200 if quick else 4000, 16 if quick else 512, 10, seed=0)
        x = x.double()
    scale = x.std(0, unbiased=False)
    return (x - x.mean(0)) / torch.where(scale > 1e-12, scale, 1.0), y


def paths(quick: bool) -> dict[str, list[tuple[float, float]]]:
    """The (radius, reg) of every path."""
    steps = 2 if quick else 10
    share = [k / (steps - 1) for k in range(steps)]
    return {
        "radius 0.1 to 1": [(0.1 + 0.9 * t, _REG) for t in share],
        "radius 0.25 to 2": [(0.25 * 8.0**t, _REG) for t in share],
        "reg 0.3 to 0.01": [(_RADIUS, 0.3 * 30.0**-t) for t in share],
    }


def fit(x: Tensor, y: Tensor, setting: tuple[float, float], tol: float, start: Any) -> tuple[SolveResult, float]:
    """One certified solve and its CPU seconds."""
    problem = PolynomialProblem(x, y, num_classes=10, radius=setting[0], reg=setting[1])
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = get_solver("column_generation").solve(problem, tol=tol, start=start, max_seconds=_MAX_SECONDS)
    return result, time.process_time() - began


def measure(data: str, path: str, settings: list[tuple[float, float]], tol: float, quick: bool) -> list[Record]:
    """Three fits from scratch, then the path."""
    x, y = dataset(data, quick)
    base = {"data": data, "n": len(x), "d": x.shape[1], "path": path, "tol": tol}
    found: list[Record] = []

    def record(kind: str, setting: tuple[float, float], result: SolveResult, seconds: float) -> None:
        found.append(
            base
            | {
                "kind": kind,
                "radius": setting[0],
                "reg": setting[1],
                "passes": result.extra["evaluations"],
                "outer": result.iterations,
                "cpu_seconds": seconds,
                "gap": result.gap,
                "primal": result.primal,
                "neurons": result.neurons,
                "load_average": load_average(),
            }
        )

    for setting in (settings[0], settings[len(settings) // 2], settings[-1]):
        record("single", setting, *fit(x, y, setting, tol, None))
    start = None
    for setting in settings:
        result, seconds = fit(x, y, setting, tol, start)
        record("path", setting, result, seconds)
        start = result
    return found


def summary(records: list[Record]) -> list[Record]:
    """One row a path: its cost in single fits."""
    rows = []
    names = ("data", "path", "tol")
    for key in dict.fromkeys(tuple(r[name] for name in names) for r in records):
        mine = [r for r in records if tuple(r[name] for name in names) == key]
        single, path = ([r for r in mine if r["kind"] == kind] for kind in ("single", "path"))
        row: Record = dict(zip(names, key, strict=True)) | {"heads": len(path), "gap": max(r["gap"] for r in path)}
        for unit in ("passes", "cpu_seconds"):
            row[f"single_{unit}"] = sum(r[unit] for r in single) / len(single)
            row[f"path_{unit}"] = sum(r[unit] for r in path)
            row[f"ratio_{unit}"] = row[f"path_{unit}"] / row[f"single_{unit}"]
        rows.append(row)
    return rows


def draw(pyplot: Any, rows: list[Record]) -> None:
    """Cost of every path in single fits; the aim is dotted."""
    place = range(len(rows))
    for shift, unit, label in ((-0.2, "passes", "passes"), (0.2, "cpu_seconds", "CPU seconds")):
        pyplot.barh([p + shift for p in place], [r[f"ratio_{unit}"] for r in rows], height=0.38, label=label)
    pyplot.axvline(3, color="black", linestyle=":", label="aim")
    pyplot.yticks(list(place), [f"{r['data']}, {r['path']}, tol {r['tol']:g}" for r in rows], fontsize=8)
    pyplot.xlabel("cost of the path, in single fits")
    pyplot.legend()


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument("--data", nargs="+", choices=("digits", "features"), default=["digits", "features"])
    options = arguments(NAME, __doc__, argv, extra=extra)
    plan = {"features": (0.2,)} if options.quick else {data: _TOLS[data] for data in options.data}
    records: list[Record] = []
    for data, tols in plan.items():
        for tol in tols:
            for path, settings in paths(options.quick).items():
                records += measure(data, path, settings, tol, options.quick)
    rows = summary(records)
    columns = [
        Column("data", "data"),
        Column("path", "path"),
        Column("tol", "gap asked", "{:g}".format),
        Column("gap", "largest gap", "{:.2g}".format),
        Column("single_passes", "passes, single", "{:.0f}".format),
        Column("path_passes", "passes, path", "{:.0f}".format),
        Column("ratio_passes", "path / single", "{:.1f}".format),
        Column("single_cpu_seconds", "CPU s, single", "{:.1f}".format),
        Column("path_cpu_seconds", "CPU s, path", "{:.1f}".format),
        Column("ratio_cpu_seconds", "path / single, CPU", "{:.1f}".format),
    ]
    notes = ("A single fit is the mean of three from scratch: first, middle and last setting of the path.",)
    publish(options, "Warm-started paths", records, rows, columns, lambda pyplot: draw(pyplot, rows), notes)


if __name__ == "__main__":
    main()
