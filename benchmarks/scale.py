"""What an exact pass over the data costs: against two matrix products, against n from disk, against the classes.

    python -m benchmarks.scale            up to a million rows of 512 features; minutes, 2 GB in a temporary folder
    python -m benchmarks.scale --quick    seconds

A pass is one exact evaluation of the robust objective and its gradient (worst cases of every margin that matters). The
floor is what no exact method can avoid: the projections of all rows on all neurons and the product back, measured in
the same process. Every line is a process of its own, so that its peak memory is its own: "disk" reads a memory-mapped
file in every pass, "memory" holds the features. Memory is what is allocated (RssAnon of Linux, every 10 ms): pages of
the mapped file come on top, but the system takes them back when others need them. Times are CPU seconds, because the
machine may be busy. Features are synthetic (clusters, a spectrum that falls like 1/k, cut off at zero); the network is
column generation's, fitted to 2,000 of the rows to a gap of 5 % or for a minute; where that needs fewer neurons than
wanted, neurons are split into several of directions a fifth of a radian away. Passes are measured with the smoothing
of a solve's beginning and of its end, when fewer margins have a slope.
"""

from __future__ import annotations

import math
import multiprocessing
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Column, Record, arguments, load_average, publish, synthetic_features
from convex_head.problems.base import Network
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.solvers.column_generation import ColumnGeneration

NAME = "scale"
_BLOCK = 20_000
_SAMPLE, _TOL = 2000, 0.05
_SAMPLING_SECONDS = 0.01
_EARLY, _LATE = 0.1, 0.01
_APART = 0.2


def write_features(path: Path, rows: int, width: int, classes: int) -> np.ndarray:
    """Write synthetic features block by block; returns the labels."""
    labels = np.empty(rows, dtype=np.int64)
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(file, header)
        for i, start in enumerate(range(0, rows, _BLOCK)):
            x, y = synthetic_features(min(_BLOCK, rows - start), width, classes, seed=i)
            x.numpy().tofile(file)
            labels[start : start + len(x)] = y.numpy()
    return labels


def cpu_seconds(work: Any, repeats: int) -> float:
    """The least CPU time of ``repeats`` runs."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


class AllocatedMemory:
    """The most memory that this process had allocated while the block ran, sampled."""

    def __enter__(self) -> AllocatedMemory:
        self.mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            kib = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.mib = max(self.mib, kib / 1024)
            if self._stop.wait(_SAMPLING_SECONDS):
                return


def widened(network: Network, neurons: int) -> Network:
    """About the same functions by ``neurons`` distinct neurons each, if they have fewer: copies share the weight."""
    counts, rank = torch.bincount(network.function), torch.empty_like(network.function)
    for c, count in enumerate(counts.tolist()):
        rank[network.function == c] = torch.arange(count)
    counts = counts[network.function]
    copies = (neurons // counts + (rank < neurons % counts).long()).clamp_min(1)
    directions = network.directions.repeat_interleave(copies, 0)
    turn = torch.randn(directions.shape, generator=torch.Generator().manual_seed(0), dtype=directions.dtype)
    turn *= (copies > 1).repeat_interleave(copies).unsqueeze(1)
    directions = directions + _APART * turn / turn.norm(dim=1, keepdim=True).clamp_min(1e-12)
    directions = directions / directions.norm(dim=1, keepdim=True)
    return Network(
        directions, (network.weights / copies).repeat_interleave(copies), network.function.repeat_interleave(copies)
    )


def measure(setting: Record, threads: int) -> Record:
    """One pass in this process, and the floor next to it."""
    torch.set_num_threads(threads)
    rows, width, classes, neurons = (setting[name] for name in ("rows", "features", "classes", "neurons"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        labels = torch.from_numpy(write_features(path, rows, width, classes))
        mapped = np.load(path, mmap_mode="r")
        disk = setting["source"] == "disk"
        features = mapped if disk else torch.from_numpy(np.array(mapped))
        options = {"num_classes": classes, "radius": 0.5, "reg": 1e-2, "loss": setting["loss"], "dtype": torch.float32}
        problem = PolynomialProblem(features, labels, stream=disk, **options)
        small = problem.sample(_SAMPLE, 0)
        solver = ColumnGeneration(neurons=neurons // 2)
        solved = solver.solve(small, tol=_TOL, max_seconds=setting["fit_seconds"])
        packed = problem.pack(widened(solved.network, neurons))
        weights = packed.vectors[packed.signs != 0].float()
        block = torch.from_numpy(np.array(mapped[: min(rows, 10_000)]))
        load = load_average()
        repeats = 1 if rows > 200_000 else 2

        def floor() -> None:
            for part in block.split(4096):
                (part @ weights.mT).mT @ part

        def exact_pass(mu: float) -> None:
            problem.evaluate(packed, mu, problem.blur(mu))

        problem.evaluate(small.pack(small.random_network(1, 0)), _EARLY, small.blur(_EARLY))  # compiles
        with AllocatedMemory() as memory:
            early, late = (cpu_seconds(lambda mu=mu: exact_pass(mu), repeats) for mu in (_EARLY, _LATE))
        floor_seconds = cpu_seconds(floor, 3) * rows / len(block)
    return setting | {
        "neurons": len(weights) / classes,
        "sample_gap": solved.gap,
        "cpu_seconds": early,
        "late_cpu_seconds": late,
        "floor_cpu_seconds": floor_seconds,
        "ratio": early / floor_seconds,
        "late_ratio": late / floor_seconds,
        "peak_mib": memory.mib,
        "feature_mib": rows * width * 4 / 2**20,
        "threads": threads,
        "load_average": load,
    }


def settings(quick: bool) -> list[Record]:
    """What is measured."""
    width, neurons = (32, 8) if quick else (512, 32)
    base = {
        "fit_seconds": 1.0 if quick else 60.0,
        "features": width,
        "classes": 10,
        "neurons": neurons,
        "loss": "crammer_singer",
        "source": "disk",
    }
    sizes = (2_000, 8_000) if quick else (10_000, 100_000, 1_000_000)
    found = [base | {"rows": rows} for rows in sizes]
    held = base | {"rows": 4_000 if quick else 50_000, "source": "memory"}
    found += [held, held | {"loss": "one_vs_rest"}]
    many = ((50, 2, 2_000),) if quick else ((100, 4, 10_000),)
    for classes, each, rows in many:
        for loss in ("crammer_singer", "one_vs_rest"):
            wide = {"rows": rows, "classes": classes, "neurons": each, "loss": loss, "source": "memory"}
            found.append(base | wide)
    return found


def exponent(records: list[Record], key: str) -> float:
    """Slope of log(key) against log(rows) from the smallest to the largest of the rows from disk."""
    first, *_, last = sorted((r for r in records if r["source"] == "disk"), key=lambda r: r["rows"])
    return math.log(last[key] / first[key]) / math.log(last["rows"] / first["rows"])


def draw(pyplot: Any, records: list[Record]) -> None:
    """CPU seconds and peak memory against the rows from disk."""
    disk = [r for r in records if r["source"] == "disk"]
    rows = [r["rows"] for r in disk]
    pyplot.loglog(rows, [r["cpu_seconds"] for r in disk], marker="o", label="exact pass, CPU seconds")
    pyplot.loglog(rows, [r["floor_cpu_seconds"] for r in disk], marker="o", label="two matrix products, CPU seconds")
    pyplot.loglog(rows, [r["peak_mib"] for r in disk], marker="s", label="memory allocated, MiB")
    pyplot.loglog(rows, [r["feature_mib"] for r in disk], linestyle="--", label="features on disk, MiB")
    pyplot.xlabel("rows")
    pyplot.title(f"Passes over features on disk, d = {disk[0]['features']}, C = {disk[0]['classes']}")
    pyplot.legend()


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    options = arguments(NAME, __doc__, argv)
    records = []
    for setting in settings(options.quick):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            records.append(pool.submit(measure, setting, options.threads).result())
    columns = [
        Column("rows", "rows", "{:,}".format),
        Column("source", "from"),
        Column("classes", "classes"),
        Column("neurons", "neurons a class", "{:.0f}".format),
        Column("sample_gap", "gap on the sample", "{:.0%}".format),
        Column("loss", "loss"),
        Column("cpu_seconds", "pass, CPU s", "{:.2f}".format),
        Column("ratio", "times the floor", "{:.1f}".format),
        Column("late_ratio", "late in a solve", "{:.1f}".format),
        Column("peak_mib", "allocated MiB", "{:,.0f}".format),
        Column("feature_mib", "features MiB", "{:,.0f}".format),
    ]
    time_growth, memory_growth = exponent(records, "cpu_seconds"), exponent(records, "peak_mib")
    notes = (
        f"From disk, time grows like rows^{time_growth:.2f} and allocated memory like rows^{memory_growth:.2f}. "
        "It includes torch, the compiled code and the labels.",
    )
    publish(options, "Cost of an exact pass", records, records, columns, lambda pyplot: draw(pyplot, records), notes)


if __name__ == "__main__":
    main()
