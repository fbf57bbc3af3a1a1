"""The solver on a GPU: passes against the ceilings of the device, whole fits, and agreement with the processor.

    python -m benchmarks.gpu                          n = 50,000, d = 512, C = 10 on cuda, the processor beside it
    python -m benchmarks.gpu --quick --device cpu     a small run in seconds, with the processor as the device

Features: Fashion-MNIST, the backbones' 50,000 training images through the PreAct ResNet-18 that SAM trains in
benchmarks/fashion_mnist (rho 0.2, seed 0; trained first where ``--folder`` has it not, in minutes on a GPU).

    pass    one evaluation of objective and gradient (worst cases of all examples against all classes) in float32, at
            random networks: their margins are all at work. Floors, measured in the same run: the two products with the
            data that a pass cannot do without, and the time in which the device reads the data twice.
    fit     ConvexRobustHead.fit to a certified gap; the clock starts with features on the device, after a small fit;
            kernels of widths that it did not meet are compiled inside.
    agree   the same numbers from both devices: of one pass and of its lower bound, in float64 and float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Column, Record, arguments, load_average, publish, synthetic_features
from benchmarks.fashion_mnist_backbones import backbone, backbone_data
from convex_head import ConvexRobustHead
from convex_head.console import messages
from convex_head.errors import ConvergenceWarning, InputError
from convex_head.features import extract_features
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.splice import replace_head

NAME = "gpu"
RADIUS, REG, MU = 0.5, 0.03, 0.1
LOSSES = ("crammer_singer", "one_vs_rest")


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        neurons: of each function, in passes.
        fits: (loss, reg, gap, also on the processor).
        agree: rows of the comparison.
        repeats: of passes.
        max_seconds: of a fit.
    """

    neurons: tuple[int, ...]
    fits: tuple[tuple[str, float, float, bool], ...]
    agree: int
    repeats: int
    max_seconds: float


FULL = Size(
    neurons=(8, 16, 32),
    fits=(
        ("crammer_singer", 0.03, 1e-2, True),
        ("crammer_singer", 0.1, 1e-2, False),
        ("crammer_singer", 0.01, 1e-2, False),
        ("crammer_singer", 0.03, 1e-3, False),
        ("one_vs_rest", 0.03, 1e-2, False),
    ),
    agree=5000,
    repeats=20,
    max_seconds=60.0,
)
QUICK = Size(neurons=(4,), fits=(("crammer_singer", 0.1, 0.1, True),), agree=1200, repeats=2, max_seconds=20.0)


def features(folder: Path, device: str, quick: bool) -> tuple[Tensor, Tensor]:
    """Standardised (n, d) float32 features and labels, on the device."""
    if quick:
        x, y = synthetic_features(1500, 32, 10, seed=0)
    else:
        model, _ = backbone("sam", 0, folder / "backbones", arch="preact_resnet18", rhos=(0.2,), device=device)
        images, y = backbone_data()
        x = extract_features(replace_head(model, nn.Identity(), at="fc").backbone, images, batch_size=1000)
    x, y = x.to(device), y.to(device)
    std = x.std(0)
    return (x - x.mean(0)) / torch.where(std > 0, std, torch.ones_like(std)), y


def milliseconds(device: str, run: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, by the host's clock between points where the device is idle; one call first."""
    found = []
    for _ in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        found.append(1e3 * (time.perf_counter() - started))
    return statistics.median(found[1:])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _bandwidth(device: str) -> float:
    """Bytes a millisecond, read and written, of a large copy."""
    large = torch.empty(1 << (28 if device.startswith("cuda") else 24), device=device)
    other = torch.empty_like(large)
    return 2 * large.numel() * large.element_size() / milliseconds(device, lambda: other.copy_(large), 5)


def problem(x: Tensor, y: Tensor, loss: str, dtype: torch.dtype) -> PolynomialProblem:
    """The training problem on these rows."""
    return PolynomialProblem(x, y, num_classes=10, radius=RADIUS, reg=REG, loss=loss, dtype=dtype)


def passes(x: Tensor, y: Tensor, size: Size, device: str, say: Callable[[str], None]) -> list[Record]:
    """Passes of both devices, and the floors of the first."""
    found = []
    bandwidth = _bandwidth(device)
    for loss in LOSSES:
        for neurons in size.neurons:
            there, here = problem(x, y, loss, torch.float32), problem(x.cpu(), y.cpu(), loss, torch.float32)
            network = here.random_network(neurons // 2, 0)
            flat = here.pack(network).vectors.flatten(0, 1).float().to(device)

            def both(flat: Tensor = flat) -> Tensor:
                return (x @ flat.mT).mT @ x

            def one(p: PolynomialProblem, network: Any = network) -> Callable[[], Any]:
                packed = p.pack(p.check_start(network))
                return lambda: p.evaluate(packed, MU, p.blur(MU))

            here.prepare()
            record = {
                "part": "pass",
                "task": f"{loss}, {neurons} neurons a class: pass, ms",
                "loss": loss,
                "neurons": neurons,
                "device": milliseconds(device, one(there), size.repeats),
                "cpu": milliseconds("cpu", one(here), max(2, size.repeats // 5)),
                "products": milliseconds(device, both, size.repeats),
                "reading": 2 * x.numel() * x.element_size() / bandwidth,
                "gigabytes_a_second": bandwidth / 1e6,
                "load_average": load_average(),
            }
            found.append(record)
            say(f"{record['task']}: {record['device']:.2f} against {record['cpu']:.0f} on the processor")
    return found


def fits(x: Tensor, y: Tensor, size: Size, device: str, say: Callable[[str], None]) -> list[Record]:
    """Whole fits: all on the device, then those of the processor."""

    def fit(loss: str, reg: float, tol: float, place: str, rows: int = len(x)) -> tuple[float, Any]:
        head = ConvexRobustHead(x.shape[1], 10, radius=RADIUS, reg=reg, loss=loss).to(place)
        given, labels = x[:rows].to(place), y[:rows].to(place)
        _wait(device)
        started = time.perf_counter()
        head.fit(given, labels, tol=tol, max_seconds=size.max_seconds, progress=False)
        _wait(device)
        return time.perf_counter() - started, head.result_

    found = []
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        fit("crammer_singer", 0.1, 0.2, device, 1200)  # compiles
        for loss, reg, tol, _ in size.fits:
            seconds, result = fit(loss, reg, tol, device)
            record: Record = {
                "part": "fit",
                "task": f"{loss}, reg {reg:g}, gap {tol:g}: fit, s",
                "loss": loss,
                "reg": reg,
                "tol": tol,
                "device": seconds,
                "gap": result.gap,
                "objective": result.primal,
                "lower_bound": result.dual,
                "neurons": result.neurons,
                "evaluations": result.extra["evaluations"],
                "load_average": load_average(),
            }
            found.append(record)
            say(f"{record['task']}: {seconds:.1f} (gap {result.gap:.2g}, {record['evaluations']} evaluations)")
        for record, (loss, reg, tol, twice) in zip(found, size.fits, strict=True):
            if twice:
                fit(loss, 0.1, 0.2, "cpu", 1200)
                record["cpu"], other = fit(loss, reg, tol, "cpu")
                record |= {"cpu_gap": other.gap, "cpu_objective": other.primal, "cpu_lower_bound": other.dual}
                say(f"{record['task']}: {record['cpu']:.1f} on the processor (gap {other.gap:.2g})")
    return found


def numbers_of(p: PolynomialProblem, network: Any) -> list[Tensor]:
    """Smoothed objective, gradient, objective and lower bound at a network; float64, on the processor."""
    packed = p.pack(p.check_start(network))
    at, report = p.evaluate(packed, MU, p.blur(MU)), p.dual_point(packed, MU, p.blur(MU))
    values = (at.smoothed, at.gradient, report.primal, p.oracle(report.point).dual)
    return [torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in values]


def agreement(x: Tensor, y: Tensor, size: Size, device: str, say: Callable[[str], None]) -> list[Record]:
    """Relative differences of what both devices compute."""
    found = []
    for loss in LOSSES:
        for dtype in (torch.float64, torch.float32):
            numbers, rows = [], size.agree
            network = problem(x[:rows].cpu(), y[:rows].cpu(), loss, dtype).random_network(8, 0)
            for place in (device, "cpu"):
                p = problem(x[:rows].to(place), y[:rows].to(place), loss, dtype)
                numbers.append(numbers_of(p, network))
            for name, one, other in zip(("smoothed", "gradient", "objective", "bound"), *numbers, strict=True):
                record = {"part": "agree", "task": f"{loss}, {name}, {dtype}".replace("torch.", ""), "loss": loss}
                difference = float((one - other).norm() / other.norm().clamp_min(1e-300))
                found.append({**record, "rows": rows, "difference": difference})
                say(f"{record['task']}: {difference:.1e}")
    return found


def draw(pyplot: Any, records: list[Record]) -> None:
    """Passes against their floors."""
    shown = [record for record in records if record["part"] == "pass"]
    labels = [f"{record['loss']}, {record['neurons']}" for record in shown]
    place = range(len(shown))
    for shift, (key, label) in enumerate({"cpu": "processor", "device": "device", "products": "products"}.items()):
        values = [record[key] for record in shown]
        pyplot.barh([p + 0.27 * (1 - shift) for p in place], values, height=0.25, label=label)
    pyplot.yticks(list(place), labels)
    pyplot.xscale("log")
    pyplot.xlabel("milliseconds a pass")
    pyplot.title("A pass: loss, neurons a class")
    pyplot.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)


COLUMNS = [
    Column("task", "task"),
    Column("device", "device", "{:.3g}".format),
    Column("products", "products", "{:.3g}".format),
    Column("reading", "reading", "{:.2g}".format),
    Column("ratio", "device / products", "{:.1f}".format),
    Column("cpu", "processor", "{:.3g}".format),
    Column("faster", "processor / device", "{:.0f}".format),
    Column("gap", "gap", "{:.2g}".format),
    Column("evaluations", "passes", str),
    Column("difference", "difference", "{:.1e}".format),
]


def rows_of(records: list[Record]) -> list[Record]:
    """Records with the ratios of the table."""
    found = []
    for record in records:
        row = dict(record)
        if "products" in row:
            row["ratio"] = row["device"] / row["products"]
        if "cpu" in row:
            row["faster"] = row["cpu"] / row["device"]
        found.append(row)
    return found


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the benchmark out (default: cuda)")
    extra.add_argument("--folder", type=Path, default=Path("runs") / "fashion_mnist", help="where the backbone is kept")
    options = arguments(NAME, __doc__, argv, threads=torch.get_num_threads(), extra=extra)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"--device {options.device} needs a GPU that torch sees; found none. Try --quick --device cpu."
        )
    size = QUICK if options.quick else FULL

    def say(line: str) -> None:
        messages().print(line, markup=False, highlight=False)

    x, y = features(options.folder, options.device, options.quick)
    say(f"{len(x)} x {x.shape[1]} features on {options.device}")
    shape = {"n": len(x), "d": x.shape[1], "classes": 10, "radius": RADIUS, "threads": torch.get_num_threads()}
    title = f"The solver on {options.device}, n = {len(x)}, d = {x.shape[1]}, C = 10"
    records: list[Record] = []
    given = (x, y, size, options.device, say)
    # Written part by part: what is measured is kept when the run is stopped.
    for part in (passes, agreement, fits):
        records += [{**record, **shape} for record in part(*given)]
        publish(options, title, records, rows_of(records), COLUMNS, partial(draw, records=list(records)))


if __name__ == "__main__":
    main()
