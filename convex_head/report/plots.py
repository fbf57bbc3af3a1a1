"""Coordinates of the page's plots, as plain numbers for the template; the template draws the SVG.

frontier   clean against robust accuracy of the entries under one threat, with 95 % intervals
curves     robust accuracy against eps of entries that share dataset, points, norm and model
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from convex_head.report.entries import Entry, fact

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 52, 44, 12, 12


def frontier(entries: Sequence[Entry]) -> dict[str, Any]:
    """Scatter plot of clean (x) and robust (y) accuracy; entries on the Pareto front are marked."""
    accuracies = [(entry.record.clean_accuracy, entry.record.robust_accuracy) for entry in entries]
    lowest = min(clean for clean, _ in accuracies)
    axis_x = _axis(max(0.0, lowest - 0.02), 1.0)
    axis_y = _axis(0.0, 1.0)
    points = []
    for entry, (clean, robust) in zip(entries, accuracies, strict=True):
        low, high = entry.record.interval
        dominated = any(c >= clean and r >= robust and (c, r) != (clean, robust) for c, r in accuracies)
        points.append(
            {
                "id": entry.id,
                "label": entry.robustbench["name"],
                "kind": _kind(entry),
                "x": _x(clean, axis_x),
                "y": _y(robust, axis_y),
                "low": _y(low, axis_y),
                "high": _y(high, axis_y),
                "clean": clean,
                "robust": robust,
                "front": not dominated,
            }
        )
    return {"points": points, **_frame(axis_x, axis_y), "kinds": sorted({point["kind"] for point in points})}


def curves(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """One plot for each dataset, subset and norm on which a model was evaluated at two radii or more.

    Entries are of one curve if their weights have the same fingerprint.
    """
    boards: dict[tuple[str, str, str], dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        record = entry.record
        board = (str(record.dataset.get("name", "")), str(record.dataset.get("fingerprint")), record.threat.norm)
        boards[board][str(record.model.get("fingerprint"))].append(entry)
    plots = []
    for (dataset, _, norm), models in boards.items():
        lines = [sorted(line, key=lambda entry: entry.record.threat.eps) for line in models.values()]
        lines = [line for line in lines if len({entry.record.threat.eps for entry in line}) > 1]
        if lines:
            plots.append({"dataset": dataset, "norm": norm, **_curve_plot(lines)})
    return plots


def _curve_plot(lines: Sequence[Sequence[Entry]]) -> dict[str, Any]:
    axis_x = (0.0, max(line[-1].record.threat.eps for line in lines))
    axis_y = (0.0, 1.0)
    drawn = []
    for index, line in enumerate(lines):
        records = [entry.record for entry in line]
        xs = [_x(record.threat.eps, axis_x) for record in records]
        lows = [_y(record.interval[0], axis_y) for record in records]
        highs = [_y(record.interval[1], axis_y) for record in records]
        drawn.append(
            {
                "label": line[0].robustbench["name"],
                "series": index % 6,
                "path": _points(zip(xs, (_y(r.robust_accuracy, axis_y) for r in records), strict=True)),
                "band": _points([*zip(xs, highs, strict=True), *reversed(list(zip(xs, lows, strict=True)))]),
                "values": [(record.threat.eps_text, record.robust_accuracy) for record in records],
            }
        )
    return {"lines": drawn, **_frame(axis_x, axis_y, eps=True)}


def _points(pairs: Any) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def _kind(entry: Entry) -> str:
    """Colour class of an entry: what is special about its head."""
    head = (fact(entry.record, "head", str) or "").lower()
    return next((kind for kind in ("convex", "linear", "mlp") if kind in head), "own")


def _axis(low: float, high: float) -> tuple[float, float]:
    """Widened to multiples of 5 %."""
    return (int(low * 20) / 20, high)


def _x(value: float, axis: tuple[float, float]) -> float:
    span = (axis[1] - axis[0]) or 1.0
    return round(LEFT + (value - axis[0]) / span * (WIDTH - LEFT - RIGHT), 1)


def _y(value: float, axis: tuple[float, float]) -> float:
    span = (axis[1] - axis[0]) or 1.0
    return round(HEIGHT - BOTTOM - (value - axis[0]) / span * (HEIGHT - BOTTOM - TOP), 1)


def _frame(axis_x: tuple[float, float], axis_y: tuple[float, float], *, eps: bool = False) -> dict[str, Any]:
    """Size and ticks of a plot; accuracies as percent, eps as a number."""

    def ticks(axis: tuple[float, float], place: Any, style: str, scale: float) -> list[tuple[float, str]]:
        steps = [axis[0] + (axis[1] - axis[0]) * k / 4 for k in range(5)]
        return [(place(step, axis), format(scale * step, style)) for step in steps]

    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "ticks_x": ticks(axis_x, _x, ".3g", 1.0 if eps else 100.0),
        "ticks_y": ticks(axis_y, _y, ".3g", 100.0),
    }
