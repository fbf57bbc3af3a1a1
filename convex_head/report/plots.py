"""Coordinates of the page's plots, as plain numbers for the template; the template draws the SVG.

frontier   clean against robust accuracy of the entries under one threat, with 95 % intervals
curves     accuracy against eps of entries that share dataset, points, norm and model; at eps = 0 it is the clean one
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from convex_head.report.entries import Entry
from convex_head.report.values import fact
from convex_head.statistics import wilson_interval

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 52, 44, 12, 24
_COLOURS, _DASHES, _POINT, _BESIDE, _TICK = 6, 3, 19, 3, 44


def frontier(entries: Sequence[Entry]) -> dict[str, Any]:
    """Scatter plot of clean (x) and robust (y) accuracy; entries on the Pareto front are marked.

    Args:
        entries: under one threat, in the order of their places in the table, from 1.
    """
    accuracies = [(entry.record.clean_accuracy, entry.record.robust_accuracy) for entry in entries]
    lowest = min(clean for clean, _ in accuracies)
    axis_x, axis_y = _axis(max(0.0, lowest - 0.02)), (0.0, 1.0)
    points: list[dict[str, Any]] = []
    for place, (entry, (clean, robust)) in enumerate(zip(entries, accuracies, strict=True), start=1):
        low, high = entry.record.interval
        dominated = any(c >= clean and r >= robust and (c, r) != (clean, robust) for c, r in accuracies)
        equal = sum((point["clean"], point["robust"]) == (clean, robust) for point in points)
        points.append(
            {
                "id": entry.id,
                "place": place,
                "label": entry.robustbench["name"],
                "kind": _kind(entry),
                "x": _x(clean, axis_x) - _POINT * min(equal, _BESIDE),
                "y": _y(robust, axis_y),
                "low": _y(low, axis_y),
                "high": _y(high, axis_y),
                "clean": clean,
                "robust": robust,
                "bounds": (low, high),
                "front": not dominated,
            }
        )
    return {"points": points, **_frame(axis_x, axis_y), "kinds": sorted({point["kind"] for point in points})}


def curves(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """One plot for each dataset, subset and norm on which a model was evaluated at two radii or more.

    Entries are of one curve if their weights have the same fingerprint; a record's own curve adds its radii.
    """
    boards: dict[tuple[str, str, str], dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        record = entry.record
        board = (str(record.dataset.get("name", "")), str(record.dataset.get("fingerprint")), record.threat.norm)
        boards[board][str(record.model.get("fingerprint"))].append(entry)
    plots = []
    for (dataset, _, norm), models in boards.items():
        lines = [sorted(line, key=lambda entry: entry.record.threat.eps) for line in models.values()]
        lines = [line for line in lines if len(_measured(line)) > 1]
        if lines:
            plots.append({"dataset": dataset, "norm": norm, **_curve_plot(lines)})
    return plots


def _curve_plot(lines: Sequence[Sequence[Entry]]) -> dict[str, Any]:
    axis_x = (0.0, max(eps for line in lines for eps in _measured(line)))
    axis_y = (0.0, 1.0)
    drawn = []
    for index, line in enumerate(lines):
        values = _values(line)
        middle = [(_x(eps, axis_x), _y(accuracy, axis_y)) for _, eps, accuracy, _, _ in values]
        low = [(_x(eps, axis_x), _y(bound, axis_y)) for _, eps, _, bound, _ in values]
        high = [(_x(eps, axis_x), _y(bound, axis_y)) for _, eps, _, _, bound in values]
        drawn.append(
            {
                "label": line[0].robustbench["name"],
                "ids": [entry.id for entry in line],
                "series": index % _COLOURS,
                "dash": index // _COLOURS % _DASHES,
                "dots": middle,
                "path": _points(middle),
                "band": _points([*high, *reversed(low)]),
                "values": [(text, accuracy, *bounds) for text, _, accuracy, *bounds in values],
                "numbers": [tuple(numbers) for _, *numbers in values],
            }
        )
    measured = {
        eps: text for line in drawn for (text, *_), (eps, *_) in zip(line["values"], line["numbers"], strict=True)
    }
    return {"lines": drawn, **_frame(axis_x, axis_y), "ticks_x": _eps_ticks(measured, axis_x)}


def _eps_ticks(measured: dict[float, str], axis: tuple[float, float]) -> list[tuple[float, str]]:
    """(x, text) at the radii that were measured, from the largest down, where there is room."""
    ticks: list[tuple[float, str]] = []
    for eps in sorted(measured, reverse=True):
        x = _x(eps, axis)
        if not ticks or ticks[-1][0] - x >= _TICK:
            ticks.append((x, measured[eps]))
    return ticks[::-1]


def _values(line: Sequence[Entry]) -> list[tuple[str, float, float, float, float]]:
    """(text of eps, eps, accuracy, bounds of its 95 % interval), the clean accuracy first."""
    first = line[0].record
    counts = {0.0: ("0", first.clean_correct), **{eps: found for eps, found in _measured(line).items() if eps > 0}}
    return [
        (text, eps, correct / first.n, *wilson_interval(correct, first.n))
        for eps, (text, correct) in sorted(counts.items())
    ]


def _measured(line: Sequence[Entry]) -> dict[float, tuple[str, int]]:
    """eps -> its text and how many points are right; an entry's own radius goes before the curve of another."""
    found = {item["eps"]: (item["eps_text"], item["robust_correct"]) for entry in line for item in entry.record.curve}
    own = {entry.record.threat.eps: entry.record for entry in line}
    return found | {eps: (record.threat.eps_text, record.robust_correct) for eps, record in own.items()}


def _points(pairs: Any) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def _kind(entry: Entry) -> str:
    """Colour class of an entry: what is special about its head."""
    head = (fact(entry.record, "head", str) or "").lower()
    return next((kind for kind in ("convex", "linear", "mlp") if kind in head), "own")


def _axis(low: float) -> tuple[float, float]:
    """From a round accuracy at or below ``low`` to 1."""
    percent = _step(1.0 - low)
    return (max(0.0, (100 - percent * math.ceil(100 * (1.0 - low) / percent - 1e-9)) / 100), 1.0)


def _step(width: float) -> int:
    """Percent between ticks: at most five steps over ``width``."""
    return next((step for step in (5, 10) if 100 * width <= 5 * step + 1e-9), 20)


def _x(value: float, axis: tuple[float, float]) -> float:
    span = (axis[1] - axis[0]) or 1.0
    return round(LEFT + (value - axis[0]) / span * (WIDTH - LEFT - RIGHT), 1)


def _y(value: float, axis: tuple[float, float]) -> float:
    span = (axis[1] - axis[0]) or 1.0
    return round(HEIGHT - BOTTOM - (value - axis[0]) / span * (HEIGHT - BOTTOM - TOP), 1)


def _frame(axis_x: tuple[float, float], axis_y: tuple[float, float]) -> dict[str, Any]:
    """Size and ticks of a plot; accuracies as percent."""

    def ticks(axis: tuple[float, float], place: Any) -> list[tuple[float, str]]:
        width = axis[1] - axis[0]
        count = max(1, round(100 * width / _step(width)))
        steps = [axis[0] + width * k / count for k in range(count + 1)]
        return [(place(step, axis), format(100.0 * step, ".3g")) for step in steps]

    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "ticks_x": ticks(axis_x, _x),
        "ticks_y": ticks(axis_y, _y),
    }
