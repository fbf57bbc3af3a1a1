"""A report of chosen records as a PDF: table, curves against eps, frontier, and a page a record with its pictures.

Drawn by matplotlib, which is in the extra ``bench`` and imported only here. The coordinates are those of the page's
plots; text is never read as mathematics, so that a name may hold any character.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convex_head.errors import InputError, MissingExtraError
from convex_head.records import EvalRecord
from convex_head.report.document import board_notes, by_board, numbered
from convex_head.report.entries import Entry
from convex_head.report.plots import curves, frontier
from convex_head.report.rows import row
from convex_head.report.terminal import gap_text
from convex_head.report.values import fact, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_A4 = (8.27, 11.69)
_LEFT, _RIGHT, _LINE = 0.08, 0.94, 0.0165
_ROWS, _WRAP = 34, 128
_COLOURS = ("#0b62c4", "#b45309", "#15803d", "#5a6475", "#b42318", "#7c3aed")
_DASHES = ("-", "--", ":")
_KINDS = {"convex": _COLOURS[0], "linear": _COLOURS[1], "mlp": _COLOURS[2], "own": _COLOURS[3]}
_COLUMNS = (("model", 0.0), ("clean %", 0.61), ("robust %", 0.71), ("95 %", 0.82), ("radius", 0.9), ("gap", 1.0))
_COSTS = ("tried", "broken", "left", "forwards", "backwards", "seconds")


def write_pdf(
    records: Sequence[EvalRecord],
    path: str | os.PathLike[str],
    *,
    title: str = "Robustness evaluation",
    pictures: bool = True,
) -> None:
    """Write the report; pages are A4.

    Args:
        records: at least one, in the order in which they are shown.
        path: the file; its folder is made.
        title: heading.
        pictures: show the adversarial examples that records carry in ``metadata["examples"]``.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: there is no record.
    """
    if not records:
        raise InputError("A report shows at least one record; found none. Name record files.")
    try:
        import matplotlib
        from matplotlib.backends.backend_pdf import PdfPages
    except ImportError as error:
        raise MissingExtraError(
            "A PDF needs matplotlib, which is not installed; pip install '.[bench]' in the checkout, or write .html."
        ) from error
    entries = numbered(records)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    style: Any = {
        "text.usetex": False,
        "text.parse_math": False,
        "pdf.fonttype": 42,
        "font.size": 8,
        "font.family": "sans-serif",
    }
    facts = {"Title": plain(title, 200), "Creator": "convex_head", "CreationDate": None}
    with matplotlib.rc_context(style), PdfPages(path, metadata=facts) as pdf:
        for figure in (*_table_pages(entries, title), *_plot_pages(entries), *_record_pages(entries, pictures)):
            pdf.savefig(figure)


def _sheet(heading: str) -> tuple[Figure, float]:
    """An empty page with a heading, and the height below it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_A4)
    figure.text(_LEFT, 0.955, plain(heading, 90), fontsize=13, fontweight="bold", va="top")
    return figure, 0.92


def _table_pages(entries: Sequence[Entry], title: str) -> Iterable[Figure]:
    """All records under headings of their boards, and below the last of them how to read the numbers."""
    lines: list[Entry | str] = []
    for (dataset, threat), group in by_board(entries, lambda entry: entry.record).items():
        lines += [f"{dataset}, {threat}", *group]
    for start in range(0, len(lines), _ROWS):
        figure, y = _sheet(title)
        y = _header(figure, y)
        for line in lines[start : start + _ROWS]:
            y = _table_row(figure, y, line) if isinstance(line, Entry) else _board_row(figure, y, line)
        if start + _ROWS >= len(lines):
            for note in board_notes([entry.record for entry in entries]):
                y = _paragraph(figure, y, note)
                if y < 0.05:
                    yield figure
                    figure, y = _sheet(title)
        yield figure


def _header(figure: Figure, y: float) -> float:
    for name, share in _COLUMNS:
        _cell(figure, share, y, name, first=name == "model", weight="bold")
    _rule(figure, y - 0.75 * _LINE)
    return y - 1.5 * _LINE


def _board_row(figure: Figure, y: float, text: str) -> float:
    _cell(figure, 0.0, y, plain(text, 100), first=True, weight="bold")
    return y - 1.25 * _LINE


def _table_row(figure: Figure, y: float, entry: Entry) -> float:
    record = entry.record
    radius = fact(record, "radius", (int, float))
    low, high = record.interval
    flagged = " (flagged)" if record.flags else ""
    texts = [
        plain(record.name, 60) + flagged,
        f"{100 * record.clean_accuracy:.1f}",
        f"{100 * record.robust_accuracy:.1f}",
        f"{100 * low:.1f}-{100 * high:.1f}",
        "" if radius is None else f"{radius:g}",
        plain(gap_text(record), 20),
    ]
    for k, ((_, share), text) in enumerate(zip(_COLUMNS, texts, strict=True)):
        _cell(figure, share, y, text, first=k == 0)
    return y - 1.25 * _LINE


def _cell(figure: Figure, share: float, y: float, text: str, *, first: bool = False, weight: str = "normal") -> None:
    """Text at a share of the page's width; numbers end there, the first column begins there."""
    x = _LEFT + share * (_RIGHT - _LEFT)
    figure.text(x, y, text, ha="left" if first else "right", va="center", fontsize=7.5, fontweight=weight)


def _rule(figure: Figure, y: float) -> None:
    from matplotlib.lines import Line2D

    figure.add_artist(Line2D([_LEFT, _RIGHT], [y, y], linewidth=0.6, color="#5a6475"))


def _paragraph(figure: Figure, y: float, text: str, *, size: float = 7.5) -> float:
    """Wrapped text; returns the height below it."""
    from textwrap import wrap

    for line in wrap(plain(text, 1000), _WRAP):
        figure.text(_LEFT, y - 0.5 * _LINE, line, fontsize=size, color="#3b4454", va="top")
        y -= 0.8 * _LINE
    return y - 0.3 * _LINE


def _plot_pages(entries: Sequence[Entry]) -> Iterable[Figure]:
    """Curves against eps and clean-robust plots, three a page."""
    drawn: list[tuple[str, Any, Any]] = [
        (f"Accuracy against eps: {plot['dataset']}, {plot['norm']}", _draw_curves, plot) for plot in curves(entries)
    ]
    for (dataset, threat), group in by_board(entries, lambda entry: entry.record).items():
        if len(group) > 1:
            drawn.append((f"Clean against robust: {dataset}, {threat}", _draw_frontier, frontier(group)))
    for start in range(0, len(drawn), 3):
        figure, _ = _sheet("Plots")
        for place, (heading, draw, plot) in enumerate(drawn[start : start + 3]):
            axes = figure.add_axes((_LEFT + 0.04, 0.70 - 0.31 * place, 0.50, 0.20))
            axes.set_title(plain(heading, 90), loc="left", fontsize=9)
            draw(axes, plot)
        yield figure


def _draw_curves(axes: Axes, plot: dict[str, Any]) -> None:
    """Accuracy with its 95 % band against eps."""
    for line in plot["lines"]:
        eps, accuracy, low, high = (np.array(values) for values in zip(*line["numbers"], strict=True))
        colour = _COLOURS[line["series"]]
        style: dict[str, Any] = {"color": colour, "linestyle": _DASHES[line["dash"]], "label": plain(line["label"], 40)}
        axes.plot(eps, 100 * accuracy, marker="o", markersize=3, linewidth=1.2, **style)
        axes.fill_between(eps, 100 * low, 100 * high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="eps", ylabel="accuracy under attack, %", ylim=(0, 102))
    axes.set_xlim(left=0)
    _legend(axes)


def _draw_frontier(axes: Axes, plot: dict[str, Any]) -> None:
    """Clean against robust accuracy; filled where no other record is better in both."""
    seen = set()
    for point in plot["points"]:
        colour = _KINDS[point["kind"]]
        low, high = point["bounds"]
        label = f"{point['kind']} head" if point["kind"] not in seen else None
        seen.add(point["kind"])
        axes.plot([100 * point["clean"]] * 2, [100 * low, 100 * high], color=colour, linewidth=0.8)
        face = colour if point["front"] else "white"
        axes.plot(
            100 * point["clean"],
            100 * point["robust"],
            marker="o",
            linestyle="",
            color=colour,
            markerfacecolor=face,
            label=label,
        )
    axes.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %", ylim=(0, 102))
    _legend(axes)


def _legend(axes: Axes) -> None:
    axes.grid(color="#d7dce4", linewidth=0.5)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=7)


def _record_pages(entries: Sequence[Entry], with_pictures: bool) -> Iterable[Figure]:
    """One page a record: attacks, certificate and facts, accuracies a class, pictures, command."""
    for entry in entries:
        shown = row(entry, [], with_pictures=with_pictures)
        record = entry.record
        figure, y = _sheet(record.name)
        y = _paragraph(
            figure,
            y,
            f"{shown['dataset']}, {record.threat}, n = {record.n}: clean {100 * record.clean_accuracy:.1f} %, "
            f"robust {100 * record.robust_accuracy:.1f} %.",
        )
        for flag, details in shown["flags"][:5]:
            y = _paragraph(figure, y, f"Flagged: {flag}: {plain(details, 200)}")
        y = _attacks(figure, y, shown["attack_rows"][:12])
        pairs = [f"{key}: {plain(value, 100)}" for key, value in (*shown["certificate"], *shown["facts"])]
        y = _paragraph(figure, y, "; ".join(pairs))
        if shown["command"]:
            y = _paragraph(figure, y, f"Reproduce: {plain(shown['command'], 500)}")
        y = _classes(figure, y, shown["classes"])
        _pictures(figure, y, shown["pictures"], shown["pictures_attack"])
        yield figure


def _attacks(figure: Figure, y: float, rows: Sequence[tuple[str, list[str]]]) -> float:
    """The attacks in the order in which they ran, with counts and costs."""
    y -= 0.5 * _LINE
    shares = np.linspace(0.45, 1.0, len(_COSTS))
    for name, counts, weight in [("attack", _COSTS, "bold"), *((name, counts, "normal") for name, counts in rows)]:
        _cell(figure, 0.0, y, plain(name, 44), first=True, weight=weight)
        for share, count in zip(shares, counts, strict=True):
            _cell(figure, float(share), y, plain(count, 12), weight=weight)
        y -= 1.1 * _LINE
    return y


def _classes(figure: Figure, y: float, classes: Sequence[tuple[int, int, int, int]]) -> float:
    """Bars: share of each class that is right without attack (pale) and under every attack (dark)."""
    if not classes or y < 0.2:
        return y
    height = 0.11
    axes = figure.add_axes((_LEFT + 0.04, y - 0.02 - height, _RIGHT - _LEFT - 0.04, height))
    places = np.arange(len(classes))
    points, clean, robust = (np.array([line[k] for line in classes], dtype=float) for k in (1, 2, 3))
    axes.bar(places, 100 * clean / points, color=_COLOURS[0], alpha=0.3)
    axes.bar(places, 100 * robust / points, color=_COLOURS[0])
    step = max(1, len(classes) // 25)
    axes.set_xticks(places[::step], [str(line[0]) for line in classes[::step]])
    axes.set(ylim=(0, 100), ylabel="%", xlabel="class; pale: right without attack, dark: under every attack")
    return y - 0.02 - height - 0.05


def _pictures(figure: Figure, y: float, shown: Sequence[dict[str, Any]], attack: str) -> None:
    """Clean pictures above, attacked ones below; at most a dozen pairs, and as many as fit."""
    if not shown or y < 0.22:
        return
    y = _paragraph(figure, y, f"{attack}. Above clean, below attacked; label and prediction under attack.")
    width = min(0.1, (_RIGHT - _LEFT) / len(shown))
    side = 0.9 * width * _A4[0] / _A4[1]
    for k, item in enumerate(shown):
        for line, key in enumerate(("clean", "adversarial")):
            pixels = _pixels(item[key])
            axes = figure.add_axes((_LEFT + k * width, y - (line + 1) * 1.05 * side, 0.9 * width, side))
            axes.set_axis_off()
            if pixels is not None:
                axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        text = f"{plain(item['label'], 8)} > {plain(item['adversarial_prediction'], 8)}"
        figure.text(_LEFT + (k + 0.45) * width, y - 2.3 * side, text, ha="center", va="top", fontsize=6.5)


def _pixels(uri: str) -> np.ndarray | None:
    """(h, w) or (h, w, channels) in [0, 1]; None where the file behind an intact header is damaged."""
    from matplotlib.image import imread

    try:
        return np.asarray(imread(io.BytesIO(base64.b64decode(uri.partition(",")[2])), format="png"))
    except (OSError, SyntaxError, ValueError):
        return None
