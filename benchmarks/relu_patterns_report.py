"""Table and figure of the benchmark relu_patterns, from its records."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from benchmarks.common import COLOURS, Column, Record, publish

_KEYS = ("part", "kind", "n", "patterns", "slack")
_DRAWN_AS_IS = ("seconds", "cpu_seconds")


def summaries(records: list[Record]) -> list[Record]:
    """Means over splits; standard deviations under ``<key>_sd``."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for row in records:
        groups.setdefault(tuple(row[k] for k in _KEYS), []).append(row)
    rows = []
    for members in groups.values():
        row = {key: value for key, value in members[0].items() if not isinstance(value, float)}
        row["status"] = ", ".join(dict.fromkeys(member["status"] for member in members))
        row["fits"] = len(members)
        row["regs"] = ", ".join(f"{reg:g}" for reg in dict.fromkeys(member["reg"] for member in members))
        for key in dict.fromkeys(
            key for member in members for key, value in member.items() if isinstance(value, float)
        ):
            values = [member[key] for member in members if member.get(key) is not None]
            row[key] = statistics.fmean(values)
            row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
    return rows


def draw(plt: Any, rows: list[Record], kinds: list[str]) -> None:
    """Accuracy, time and gap against P; accuracy and violation against slack; accuracy and gap against n."""
    plt.gcf().set_size_inches(13.5, 7.6)
    axes = plt.gcf().subplots(2, 3)
    colours = dict(zip(kinds, COLOURS, strict=False))
    for kind, colour in colours.items():
        part = [r for r in rows if r["part"] == "patterns" and r["kind"] == kind]
        if kind == "polynomial":
            for axis, key in zip(axes[0], ("certified", "cpu_seconds", "gap"), strict=True):
                axis.axhline(_scaled(part[0], key), color=colour, label=f"{kind} (no patterns)")
                spread = _scaled(part[0], f"{key}_sd")
                axis.axhspan(_scaled(part[0], key) - spread, _scaled(part[0], key) + spread, color=colour, alpha=0.12)
        elif part:
            _curve(axes[0, 0], part, "patterns", "attacked", "-o", colour, kind)
            _curve(axes[0, 0], part, "patterns", "certified", ":", colour)
            _curve(axes[0, 1], part, "patterns", "cpu_seconds", "-o", colour, kind)
            _curve(axes[0, 2], part, "patterns", "gap", "-o", colour, kind)
        part = [r for r in rows if r["part"] == "data" and r["kind"] == kind and "clean" in r]
        if part:
            _curve(axes[1, 1], part, "n", "attacked", "-o", colour, kind)
            _curve(axes[1, 1], part, "n", "certified", ":", colour)
            _curve(axes[1, 1], part, "n", "clean", "--", colour)
            _curve(axes[1, 2], part, "n", "gap", "-o", colour, kind)
    for axis, title in zip(axes[0], ("robust test accuracy, %", "CPU seconds a fit", "gap reached, %"), strict=True):
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
    return value if key.removesuffix("_sd") in _DRAWN_AS_IS else 100 * value


def written(rows: list[Record]) -> list[Record]:
    """The table's rows: "mean ± standard deviation" as text, the mean alone of one fit."""
    out = []
    for row in rows:
        texts: Record = {key: row.get(key) for key in (*_KEYS, "regs", "fits", "status")}
        for key in ("clean", "attacked", "certified", "gap", "cpu_seconds"):
            if key in row:
                spread = f" ± {_scaled(row, f'{key}_sd'):.1f}" if row["fits"] > 1 else ""
                texts[key] = f"{_scaled(row, key):.1f}{spread}"
        for key in ("violation_max", "model_minus_network"):
            if row.get(key) is not None:
                texts[key] = f"{row[key]:.2g}"
        out.append(texts)
    return out


def report(
    options: argparse.Namespace, kinds: list[str], records: list[Record], missing: int, radius: float, reg: float
) -> None:
    """Write records.json, table.md and figure.png.

    Args:
        options: of the command.
        kinds: of heads, in the order of their colours.
        records: one a fit.
        missing: number of fits that are not finished.
        radius, reg: of the heads; reg of the parts patterns and slack.
    """
    rows = summaries([row for row in records if row["part"] != "choice"])
    columns = [
        Column("part", "part"),
        Column("kind", "head"),
        Column("n", "n"),
        Column("patterns", "P"),
        Column("slack", "slack"),
        Column("regs", "reg"),
        Column("clean", "clean %"),
        Column("attacked", "attacked %"),
        Column("certified", "certified %"),
        Column("cpu_seconds", "CPU s"),
        Column("gap", "gap %"),
        Column("violation_max", "violation"),
        Column("model_minus_network", "model - network"),
        Column("fits", "fits"),
        Column("status", "ended"),
    ]
    notes = [
        "Means ± standard deviations over splits (fits), each with its own patterns.",
        "attacked and certified: upper and lower bound of the accuracy in the ball; exact for the polynomial.",
        f"Radius {radius:g} throughout; reg {reg:g} in patterns and slack, chosen by validation in data (regs of the "
        "splits); relu has slack 1 where none is given.",
    ]
    if missing:
        notes.append(f"{missing} fits of the plan were not run.")

    def picture(plt: Any) -> None:
        draw(plt, rows, kinds)

    publish(options, "Patterns, slack and data", records, written(rows), columns, picture, notes)
