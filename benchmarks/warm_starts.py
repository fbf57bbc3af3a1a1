"""What a path of ten heads over the radius or the regularisation costs, in units of one fit from scratch.

    python -m benchmarks.warm_starts            digits, and synthetic features of width 512; half an hour of one core
    python -m benchmarks.warm_starts --quick    seconds

Every head of a path starts from the network and the multipliers of the head before it, as robustify follows a path; the
first starts from scratch. A single fit is the mean of three fits from scratch, at the first, the middle and the last
setting of the same path, to the same certified gap. A second path is followed as robustify does to choose among its
heads: they stop at five times that gap, and one of them is then fitted to it (again the mean of three), from
its network alone. Work is counted in passes (evaluations of objective and gradient with every worst case) and in CPU
seconds, which have everything in them. crammer_singer, float64, one thread.
"""

from __future__ import annotations

import argparse
import time
import warnings
from statistics import fmean
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.common import Column, Record, arguments, load_average, publish, synthetic_features
from convex_head.errors import ConvergenceWarning
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.robustify import LOOSE
from convex_head.solvers import SolveResult, get_solver

NAME = "warm_starts"
_RADIUS, _REG = 0.5, 0.01
_MAX_SECONDS = 600.0
_TOLS = {"digits": (1e-2, 3e-2), "features": (3e-2,)}
_EVERY, _CHOICE = "all to the gap", "to choose one"


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

    ends = (0, len(settings) // 2, len(settings) - 1)
    for place in ends:
        record("single", settings[place], *fit(x, y, settings[place], tol, None))
    for kind, aim in (("path", tol), ("candidate", LOOSE * tol)):
        heads: list[SolveResult] = []
        for setting in settings:
            result, seconds = fit(x, y, setting, aim, heads[-1] if heads else None)
            record(kind, setting, result, seconds)
            heads.append(result)
    for place in ends:
        record("chosen", settings[place], *fit(x, y, settings[place], tol, heads[place].network))
    return found


def summary(records: list[Record]) -> list[Record]:
    """Two rows a path: its cost in single fits, all heads to the gap, and as candidates of which one is."""
    rows = []
    names = ("data", "path", "tol")
    for key in dict.fromkeys(tuple(r[name] for name in names) for r in records):
        mine = [r for r in records if tuple(r[name] for name in names) == key]
        single, path, candidates, chosen = (
            [r for r in mine if r["kind"] == kind] for kind in ("single", "path", "candidate", "chosen")
        )
        for heads, summed, last in ((_EVERY, path, []), (_CHOICE, candidates, chosen)):
            row: Record = dict(zip(names, key, strict=True)) | {"heads": heads, "gap": max(r["gap"] for r in summed)}
            for unit in ("passes", "cpu_seconds"):
                row[f"single_{unit}"] = fmean(r[unit] for r in single)
                row[f"path_{unit}"] = sum(r[unit] for r in summed) + (fmean(r[unit] for r in last) if last else 0.0)
                row[f"ratio_{unit}"] = row[f"path_{unit}"] / row[f"single_{unit}"]
            rows.append(row)
    return rows


def draw(pyplot: Any, rows: list[Record]) -> None:
    """Cost of every path in single fits; the aim is dotted."""
    place = range(len(rows))
    for shift, unit, label in ((-0.2, "passes", "passes"), (0.2, "cpu_seconds", "CPU seconds")):
        pyplot.barh([p + shift for p in place], [r[f"ratio_{unit}"] for r in rows], height=0.38, label=label)
    pyplot.axvline(3, color="black", linestyle=":", label="aim")
    names = [f"{r['data']}, {r['path']}, tol {r['tol']:g}, {r['heads']}" for r in rows]
    pyplot.yticks(list(place), names, fontsize=7)
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
        Column("heads", "heads"),
        Column("gap", "largest gap", "{:.2g}".format),
        Column("single_passes", "passes, single", "{:.0f}".format),
        Column("path_passes", "passes, path", "{:.0f}".format),
        Column("ratio_passes", "path / single", "{:.1f}".format),
        Column("single_cpu_seconds", "CPU s, single", "{:.1f}".format),
        Column("path_cpu_seconds", "CPU s, path", "{:.1f}".format),
        Column("ratio_cpu_seconds", "path / single, CPU", "{:.1f}".format),
    ]
    notes = (
        "A single fit is the mean of three from scratch: first, middle and last setting of the path.",
        f"{_CHOICE}: all heads to {LOOSE:g} times the gap asked, as robustify's candidates, and one of them to it, "
        "from its network (mean of first, middle and last setting); the largest gap is that of the candidates.",
    )
    publish(options, "Warm-started paths", records, rows, columns, lambda pyplot: draw(pyplot, rows), notes)


if __name__ == "__main__":
    main()
