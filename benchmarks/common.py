"""What the benchmarks share: arguments, provenance, and the three outputs records.json, table.md and figure.png.

``records.json`` holds where the numbers come from (commit, versions, hardware, load) and a flat list of records, one
measurement each, on a line of its own. Tables and figures are made from the records alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convex_head import provenance
from convex_head.console import results, table
from convex_head.errors import MissingExtraError

Record = dict[str, Any]

COLOURS = ("#1f5fa8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#4a4a4a")

_RESULTS = Path(__file__).parent / "results"
_QUICK_RESULTS = Path("runs") / "benchmarks"
_PACKAGES = ("cvxpy", "scs", "clarabel", "scipy", "scikit-learn", "torchvision", "timm")
_STYLE = {
    "figure.figsize": (7.2, 4.2),
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 140,
}


@dataclass(frozen=True)
class Column:
    """One column of a table: the record's key, its title, and how a value is written."""

    key: str
    title: str
    write: Callable[[Any], str] = str

    def cell(self, row: Record) -> str:
        """The text of this column in ``row``; a dash where there is no value."""
        value = row.get(self.key)
        return "-" if value is None else self.write(value)


def arguments(
    name: str,
    doc: str | None,
    argv: Sequence[str] | None = None,
    *,
    threads: int = 1,
    extra: argparse.ArgumentParser | None = None,
) -> argparse.Namespace:
    """Parse --quick, --out and --threads, and set torch's threads.

    Args:
        name: name of the benchmark, which names its folder of results.
        doc: the module's docstring.
        argv: the arguments, sys.argv if None.
        threads: default of --threads. Two OpenMP threads on small tensors gain little on an idle machine, and on a
            busy one they wait for each other: 35 times slower was seen. So it is 1 where tensors are small.
        extra: parser (add_help=False) of the arguments that only this benchmark has.

    Returns:
        quick (bool), out (Path), threads (int), name (str), given (the arguments that change the numbers).
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(doc or "").split("\n")[0], parents=[extra] if extra else []
    )
    parser.add_argument("--quick", action="store_true", help="a small run in seconds, into runs/benchmarks/")
    parser.add_argument("--out", type=Path, help="folder for records.json, table.md and figure.png")
    parser.add_argument("--threads", type=int, default=threads, help="threads of torch (default: %(default)s)")
    options = parser.parse_args(argv)
    options.name = name
    options.given = ["--quick"] * options.quick + [f"--threads {options.threads}"] * (options.threads != threads)
    if extra:
        options.given += _given(extra, options)
    options.out = options.out or (_QUICK_RESULTS if options.quick else _RESULTS) / name
    torch.set_num_threads(options.threads)
    return options


def _given(extra: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """The extra arguments that were given, as typed, but for paths."""
    found = []
    for action in extra._actions:
        value = getattr(options, action.dest)
        # Where things are kept is the machine's own.
        if value == action.default or isinstance(value, Path):
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        found.append(" ".join([action.option_strings[0], *map(str, values)]))
    return found


def load_average() -> float:
    """Processes that wanted to run in the last minute: a timing with more than the machine's CPUs is noisy."""
    return round(os.getloadavg()[0], 2)


def origin(options: argparse.Namespace) -> Record:
    """Command, commit, versions, hardware and time."""
    found = provenance.versions()
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "benchmark": options.name,
        "command": " ".join([f"python -m benchmarks.{options.name}", *options.given]),
        "commit": provenance.commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": found,
        "hardware": provenance.hardware(torch.device(getattr(options, "device", None) or "cpu")),
        "load_average": load_average(),
    }


def publish(
    options: argparse.Namespace,
    title: str,
    records: Sequence[Record],
    rows: Sequence[Record],
    columns: Sequence[Column],
    draw: Callable[[Any], None],
    notes: Sequence[str] = (),
) -> None:
    """Print the table and write all three outputs.

    Args:
        options: what :func:`arguments` returned.
        title: of the table and the figure.
        records: flat measurements for records.json.
        rows: the table's rows; the records themselves or summaries of them.
        columns: the table's columns.
        draw: called with matplotlib's pyplot; draws on the current figure.
        notes: sentences below the table.
    """
    numbers = {column.title for column in columns[1:]}
    shown = table(title, [column.title for column in columns], right=frozenset(numbers))
    # A table that is too wide shortens every column alike, not the names of its rows first.
    shown.columns[0].no_wrap = True
    cells = [[column.cell(row) for column in columns] for row in rows]
    for line in cells:
        shown.add_row(*line)
    console = results()
    console.print(shown)
    for note in notes:
        console.print(note)
    options.out.mkdir(parents=True, exist_ok=True)
    _write_records(options.out / "records.json", origin(options), records)
    (options.out / "table.md").write_text(_markdown(title, columns, cells, notes), encoding="utf-8")
    with figure(options.out / "figure.png") as pyplot:
        draw(pyplot)
    console.print(f"records.json, table.md and figure.png are in {options.out}")


def _write_records(path: Path, source: Record, records: Sequence[Record]) -> None:
    """One record a line, so that versions of the file can be compared."""
    lines = ",\n".join(json.dumps(_plain(record), allow_nan=False) for record in records)
    path.write_text(f'{{"origin": {json.dumps(source)},\n"records": [\n{lines}\n]}}\n', encoding="utf-8")


def _plain(record: Record) -> Record:
    """Floats to 6 significant digits; infinity and NaN, which JSON lacks, to None."""
    return {
        key: (float(f"{value:.6g}") if math.isfinite(value) else None) if isinstance(value, float) else value
        for key, value in record.items()
    }


def _markdown(title: str, columns: Sequence[Column], cells: list[list[str]], notes: Sequence[str]) -> str:
    lines = [f"**{title}**", "", "| " + " | ".join(column.title for column in columns) + " |"]
    lines.append("|" + "|".join([" --- "] + [" ---: "] * (len(columns) - 1)) + "|")
    lines += ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes)])


@contextmanager
def figure(path: Path) -> Any:
    """A figure in the house's look, written to ``path``; yields pyplot.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        matplotlib = import_module("matplotlib")
    except ImportError as problem:
        raise MissingExtraError(
            "matplotlib is not installed; run: pip install '.[bench]' in the checkout."
        ) from problem
    matplotlib.use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    with pyplot.rc_context({**_STYLE, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)}):
        pyplot.figure()
        yield pyplot
        # No date and no version inside: the same numbers give the same file.
        pyplot.savefig(path, metadata={"Software": None})
        pyplot.close()


def synthetic_features(points: int, width: int, classes: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Features like those of a pooled ReLU network: (points, width) float32 >= 0, and labels (points,).

    Clusters, the same for every seed, in noise whose covariance has eigenvalues 1/k in a random basis; then a ReLU. The
    clusters differ mostly in the leading directions, so that about one point in ten lies nearer to another class.
    """
    fixed = torch.Generator().manual_seed(12345)
    basis = torch.linalg.qr(torch.randn(width, width, generator=fixed)).Q
    spectrum = torch.arange(1, width + 1).float().rsqrt()
    centres = 1.7 * (torch.randn(classes, width, generator=fixed) * spectrum.square()) @ basis
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (points,), generator=generator)
    noise = (torch.randn(points, width, generator=generator) * spectrum) @ basis
    return torch.relu(centres[labels] + noise), labels
