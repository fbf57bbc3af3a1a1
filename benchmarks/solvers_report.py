"""Tables and figure of :mod:`benchmarks.solvers`, from its flat records alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.common import COLOURS, Column, Record, publish
from benchmarks.solvers_data import PARTS
from convex_head.console import results, table

_TITLES = {
    "breast_cancer": "Breast cancer, radius 0.5",
    "digits": "Digits, 10 classes, radius 0.5",
    "features": "Fashion-MNIST, features of a CIFAR-10 ResNet-18, radius 0.5",
}
_SOLVES = (
    Column("problem", "problem"),
    Column("what", "solver"),
    Column("status", "ended"),
    Column("primal", "objective", "{:.6f}".format),
    Column("dual", "bound", "{:.6f}".format),
    Column("gap", "gap", "{:.1e}".format),
    Column("above_reference", "over optimum", "{:+.1e}".format),
    Column("neurons", "neurons"),
    Column("seconds", "seconds", "{:.3g}".format),
    Column("cpu_seconds", "CPU s", "{:.3g}".format),
    Column("seconds_ratio", "ratio"),
    Column("cpu_seconds_ratio", "CPU ratio"),
    Column("load_average", "load"),
)
_CONTROLS = (
    Column("what", "head"),
    Column("problem", "problem"),
    Column("clean_shown", "clean, %"),
    Column("robust_shown", "robust in the ball, %"),
    Column("seconds", "seconds", "{:.3g}".format),
    Column("cpu_seconds", "CPU s", "{:.3g}".format),
    Column("load_average", "load"),
)
_PASSES = (
    Column("solver", "what"),
    Column("n", "n", "{:,}".format),
    Column("d", "d"),
    Column("neurons", "neurons"),
    Column("seconds", "seconds", "{:.3g}".format),
    Column("cpu_seconds", "CPU s", "{:.3g}".format),
    Column("to_products", "CPU, times the products", "{:.3g}".format),
    Column("to_exact", "CPU, times the exact pass", "{:.3g}".format),
    Column("threads", "threads"),
    Column("load_average", "load"),
)


@dataclass(frozen=True)
class Table:
    """Title, columns, rows and the sentences below."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Record]
    notes: Sequence[str] = ()


def tables(records: Sequence[Record]) -> list[Table]:
    """A table a data set, one of controls a data set, one of passes; what was not measured has none."""
    found = []
    for part in PARTS:
        rows = [_shown(row) for row in records if row["kind"] == "solve" and row["data"] == part]
        found.append(Table(_TITLES[part], _SOLVES, rows, _solve_notes(part, rows)))
    for part in PARTS:
        rows = [_shown(row) for row in controls(records, part)]
        title = f"{_TITLES[part]}: held-out accuracy beside controls without certificate"
        found.append(Table(title, _CONTROLS, rows, _control_notes(rows)))
    passes = [row for row in records if row["kind"] == "pass"]
    found.append(Table("One pass over all rows", _PASSES, passes, _extrapolated(passes)))
    return [replace(one, columns=_used(one)) for one in found if one.rows]


def _used(one: Table) -> list[Column]:
    """The columns in which a row has a value."""
    return [column for column in one.columns if any(row.get(column.key) is not None for row in one.rows)]


def controls(records: Sequence[Record], part: str) -> list[Record]:
    """The controls of a data set, and column generation's heads on the same rows and features."""
    own = [row for row in records if row["kind"] == "control" and row["data"] == part]
    sizes = {(row["n"], row["d"]) for row in own}
    return own + [
        row
        for row in records
        if row["kind"] == "solve" and row["solver"] == "column_generation" and row["data"] == part
        if (row["n"], row["d"]) in sizes
    ]


def _shown(row: Record) -> Record:
    several = row["kind"] == "solve" and row["classes"] > 2
    found = row | {"what": f"{row['solver']}, {row['loss']}" if several else row["solver"]}
    found["problem"] = f"n={row['n']}, d={row['d']}" + (f", reg {row['reg']:g}" if "reg" in row else "")
    for name in ("clean", "robust"):
        if row.get(name) is not None:
            share, low, high = (100 * row[key] for key in (name, f"{name}_low", f"{name}_high"))
            found[f"{name}_shown"] = f"{share:.1f} ({low:.1f} to {high:.1f})"
    for key in ("seconds_ratio", "cpu_seconds_ratio"):
        found[key] = ratio_shown(row.get("status"), row.get(key))
    return found


def ratio_shown(status: str | None, ratio: float | None) -> str | None:
    """A ratio of times to the gap: a lower bound at a time limit, nothing where the solver gave up before."""
    if ratio is None or status not in ("converged", "max_time"):
        return None
    return f"{'> ' if status == 'max_time' else ''}{ratio:.3g}"


def _solve_notes(part: str, rows: Sequence[Record]) -> tuple[str, ...]:
    """Threads and ratios; what the penalty method claims; what was not run."""
    if not rows:
        return ()
    claims = tuple(
        f"penalty on {row['problem']}: its own variables claim {row['claimed_objective']:.6f}; the network they "
        f"describe has {row['primal']:.6f}. Largest margin above the exact worst case: "
        f"{row['margin_overstatement']:.3g}; least eigenvalue of its matrix inequalities: "
        f"{row['lmi_min_eigenvalue']:.2g}."
        for row in rows
        if row.get("claimed_objective") is not None
    )
    ratios = (
        f"{_threads(rows)} Ratios are to the first solver of the same problem, in one process; > where a time limit "
        "ended the solver, none where it gave up before the gap. load: processes that wanted to run at the start."
    )
    return (ratios, *claims, *_limits(part, rows))


def _control_notes(rows: Sequence[Record]) -> tuple[str, ...]:
    """n and the intervals."""
    if not rows:
        return ()
    return (
        f"{rows[0]['test_n']:,} held-out points, 95 % Wilson intervals; robust: against every point of the l2 ball, "
        f"exact (linear heads in closed form; not computed for gated ReLU). {_threads(rows)}",
    )


def _threads(rows: Sequence[Record]) -> str:
    found = sorted({row["threads"] for row in rows})
    return f"Threads: {', '.join(map(str, found))}."


def _limits(part: str, rows: Sequence[Record]) -> tuple[str, ...]:
    """Why there is no SDP where there is none."""
    row = next((row for row in rows if row["loss"] == "crammer_singer"), None)
    if part == "breast_cancer" or row is None:
        return ()
    count, side = row["n"] * (row["classes"] - 1), row["d"] + 1
    dense = count * (side * (side + 1) // 2) ** 2 * 8 / 1e9
    sentence = (
        f"sdp was not run: it has {count:,} matrix inequalities of {side} x {side}, whose dense blocks in an "
        f"interior-point factorisation take {dense:,.0f} GB."
    )
    return (
        (sentence, "penalty was not run; what a pass of it costs is in the last table.")
        if part == "features"
        else (sentence,)
    )


def _extrapolated(rows: Sequence[Record]) -> tuple[str, ...]:
    return tuple(
        f"{row['solver']}, is extrapolated and was not run: steps of {row['extrapolated_from'][0]} and "
        f"{row['extrapolated_from'][1]} rows at d = {row['d']}, float32, were timed, and the rest "
        f"is linear in the rows (batches of 100). The exact passes and the products were run on all {row['n']:,} rows."
        for row in rows
        if row["extrapolated_from"]
    )


def draw(pyplot: Any, records: Sequence[Record]) -> None:
    """Certified relative gap against seconds, a panel a data set; of breast cancer its largest problem."""
    solves = [row for row in records if row["kind"] == "solve" and row.get("history_gap")]
    parts = [part for part in PARTS if any(row["data"] == part for row in solves)]
    figure = pyplot.gcf()
    figure.set_size_inches(max(7.2, 4.4 * len(parts)), 4.8)
    axes = figure.subplots(1, max(1, len(parts)), sharey=True, squeeze=False)[0]
    for axis, part in zip(axes, parts, strict=False):
        rows = [row for row in solves if row["data"] == part]
        largest = max(row["n"] for row in rows)
        rows = [row for row in rows if row["n"] == largest]
        for number, row in enumerate(rows):
            seconds = [max(value, 1e-3) for value in row["history_seconds"]]
            colour = COLOURS[number % len(COLOURS)]
            axis.plot(seconds, row["history_gap"], "o-", color=colour, markersize=3, label=label(row, rows))
        for tol in {row["tol"] for row in rows}:
            axis.axhline(tol, color="0.4", linestyle="--", linewidth=1)
            place = (0.01, tol), (1, -3), ("axes fraction", "data"), "offset points"
            axis.annotate(f"asked for: {tol:g}", *place, va="top", fontsize=8)
        axis.set(xscale="log", yscale="log", xlabel="seconds", title=f"{part}, n = {largest:,}, d = {rows[0]['d']}")
        axis.tick_params(axis="x", which="minor", labelbottom=False)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    axes[0].set_ylabel("certified relative gap")


def label(row: Record, rows: Sequence[Record]) -> str:
    """What tells a row from the others of its panel: solver, loss, reg."""
    differing = [key for key in ("solver", "loss", "reg") if len({other[key] for other in rows}) > 1]
    return ", ".join(f"reg {row[key]:g}" if key == "reg" else str(row[key]) for key in differing or ["solver"])


def report(options: argparse.Namespace, records: Sequence[Record], unfinished: Sequence[str]) -> None:
    """Write records.json, all tables into table.md, and the figure."""
    first, *rest = tables(records)
    notes = list(first.notes)
    publish(options, first.title, records, first.rows, first.columns, lambda pyplot: draw(pyplot, records), notes)
    missing = (f"Not measured: {', '.join(unfinished)}.",) if unfinished else ()
    with (options.out / "table.md").open("a", encoding="utf-8") as file:
        for one in rest:
            file.write("\n" + _written(one))
        file.writelines(f"\n{sentence}\n" for sentence in missing)
    for sentence in missing:
        results().print(sentence)


def _written(one: Table) -> str:
    """Print a table; returns it in Markdown."""
    cells = [[column.cell(row) for column in one.columns] for row in one.rows]
    titles = [column.title for column in one.columns]
    shown = table(one.title, titles, right=frozenset(titles[1:]))
    for line in cells:
        shown.add_row(*line)
    console = results()
    console.print(shown)
    for note in one.notes:
        console.print(note)
    lines = [f"**{one.title}**", "", f"| {' | '.join(titles)} |"]
    lines.append("|" + "|".join([" --- "] + [" ---: "] * (len(titles) - 1)) + "|")
    lines += [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([*lines, "", *(f"{note}\n" for note in one.notes)])
