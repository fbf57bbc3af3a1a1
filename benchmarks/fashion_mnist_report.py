"""Table, figure and verdict of the Fashion-MNIST suite, from its evaluation records alone.

Differences are paired, on the same test points: exact McNemar test and Agresti-Min interval a seed. With several seeds
the table has the mean difference, the widest reach of the intervals and the largest p.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import fmean
from textwrap import wrap
from typing import Any

from benchmarks.common import COLOURS, Column, Record, publish
from benchmarks.fashion_mnist_backbones import ARCHITECTURES
from convex_head.errors import InputError
from convex_head.records import EvalRecord
from convex_head.statistics import Comparison, compare

HEAD_ONLY = (
    *("linear", "linear_deep_whitened", "linear_deep_shaped"),
    *("mlp", "mlp_at", "mlp_trades", "mlp_at_deep", "mlp_trades_deep"),
)
_MARKERS = {
    "own": "s",
    "linear": "v",
    "linear_deep_whitened": ">",
    "linear_deep_shaped": "4",
    "mlp": "^",
    "mlp_at": "D",
    "mlp_trades": "P",
    "mlp_at_deep": "d",
    "mlp_trades_deep": (6, 1),
    "convex": "o",
    "convex_deep": "p",
    "convex_deep_wide": "X",
    "convex_deep_whitened": "H",
    "convex_deep_whitened_clean": "h",
    "convex_deep_shaped": (5, 1),
    "convex_deep_shaped_clean": (5, 0),
    "relu": "<",
    "gated_relu": "8",
}
_OTHER = "*"
_LEFT = 0.1
_ARCHITECTURES = tuple(ARCHITECTURES)
_BACKBONES = ("sam", "standard", "pgd_at", "trades")
_COSTS = ("seconds", "forwards", "backwards")
_PARTS = ("with_choice", "fit")
Key = tuple[str, str, str, str, str, str]


def cell_of(record: EvalRecord) -> Record:
    """arch, backbone, seed, head, norm, eps, attacks."""
    return dict(record.metadata["cell"])


def flat(record: EvalRecord) -> Record:
    """One measurement."""
    card = record.metadata
    low, high = record.interval
    total, last = card.get("total") or {}, card.get("last") or card.get("total") or {}
    trained = card["backbone_card"]
    return {
        **cell_of(record),
        "train_eps": card["train_eps"],
        "n": record.n,
        "clean": record.clean_accuracy,
        "robust": record.robust_accuracy,
        "low": low,
        "high": high,
        "flags": list(record.flags),
        **{f"{name}_broke": counts["broken"] for name, counts in record.attacks.items()},
        **{name: card.get(name) for name in ("radius", "reg", "rounds", "lr", "gap", "neurons")},
        **{name: card.get(name) for name in ("validation_clean", "validation_robust")},
        **{f"{name}_with_choice": total.get(name) for name in ("seconds", "forwards", "backwards")},
        **{f"{name}_fit": last.get(name) for name in ("seconds", "forwards", "backwards")},
        **{f"backbone_{name}": trained[name] for name in ("seconds", "forwards", "backwards")},
        "backbone_recipe": str(trained["recipe"]),
        "evaluation_seconds": record.seconds,
        "load_average": card["load_average"],
        "commit": record.commit,
        # Of the evaluation; a report may be made on another machine.
        "batch_size": record.batch_size,
        **{name: record.hardware.get(name) for name in ("device", "device_name", "processor", "cpus")},
        "torch": record.versions.get("torch"),
    }


def _key(record: EvalRecord) -> Key:
    cell = cell_of(record)
    return tuple(cell[name] for name in ("arch", "backbone", "head", "norm", "eps", "attacks"))  # type: ignore[return-value]


def rows_of(records: Sequence[EvalRecord]) -> list[Record]:
    """One row for every backbone, head, threat and column of attacks; means over seeds."""
    groups: dict[Key, dict[int, EvalRecord]] = {}
    for record in records:
        groups.setdefault(_key(record), {})[cell_of(record)["seed"]] = record
    rows = []
    for key, group in groups.items():
        arch, name, head, norm, eps, attacks = key
        flats = [flat(record) for record in group.values()]
        seconds = [one["seconds_with_choice"] for one in flats if one["seconds_with_choice"] is not None]
        own = _paired(group, groups.get((arch, name, "own", norm, eps, attacks), {})) if head != "own" else None
        sam_key = (arch, "sam", "own", norm, eps, attacks)
        sam = _paired(group, groups.get(sam_key, {})) if key != sam_key else None
        rows.append(
            {
                **dict(zip(("arch", "backbone", "head", "norm", "eps", "attacks"), key, strict=True)),
                "seeds": len(group),
                "n": flats[0]["n"],
                "clean": fmean(one["clean"] for one in flats),
                "robust": fmean(one["robust"] for one in flats),
                "low": min(one["low"] for one in flats),
                "high": max(one["high"] for one in flats),
                "seconds": fmean(seconds) if seconds else None,
                **{f"{kind}_{part}": _mean(flats, f"{kind}_{part}") for kind in _COSTS for part in _PARTS},
                "backbone_seconds": fmean(one["backbone_seconds"] for one in flats),
                "own": own,
                "sam": sam,
            }
        )
    return sorted(
        rows,
        key=lambda row: (
            _ARCHITECTURES.index(row["arch"]),
            row["attacks"],
            _BACKBONES.index(row["backbone"]),
            row["norm"],
            _number(row["eps"]),
            row["head"],
        ),
    )


def _mean(flats: Sequence[Record], name: str) -> float | None:
    values = [one[name] for one in flats if one[name] is not None]
    return fmean(values) if values else None


def _number(eps: str) -> float:
    top, _, bottom = eps.partition("/")
    return float(top) / float(bottom or 1)


def _paired(group: dict[int, EvalRecord], other: dict[int, EvalRecord]) -> Record | None:
    """Mean difference, interval and p over the seeds that both have."""
    found: list[Comparison] = [compare(group[seed], other[seed]) for seed in group if seed in other]
    if not found:
        return None
    return {
        "difference": fmean(one.difference for one in found),
        "low": min(one.interval[0] for one in found),
        "high": max(one.interval[1] for one in found),
        "p": max(one.p_value for one in found),
    }


def verdict(rows: Sequence[Record]) -> list[str]:
    """Where the aim holds, in numbers."""
    lines = []
    by = {tuple(row[k] for k in ("arch", "attacks", "backbone", "norm", "eps", "head")): row for row in rows}
    for (arch, attacks, name, norm, eps, head), row in by.items():
        if not head.startswith(("convex", "relu", "gated")):
            continue
        sam_row = by.get((arch, attacks, "sam", norm, eps, "own"))
        rivals = [by[k] for h in HEAD_ONLY if (k := (arch, attacks, name, norm, eps, h)) in by]
        text = f"{_named(arch, name)} + {head}, {norm} {eps} ({attacks}): {100 * row['robust']:.1f} %"
        if row["sam"] and sam_row:
            text += (
                f"; against the SAM network {_shown(row['sam'])} robust, "
                f"{100 * (row['clean'] - sam_row['clean']):+.1f} clean"
            )
        if rivals:
            best = max(rivals, key=lambda one: one["robust"])
            text += f"; best head-only baseline {best['head']} {100 * best['robust']:.1f} %"
            trained = by.get((arch, attacks, name, norm, eps, "mlp_at"))
            if trained and row["seconds"] and trained["seconds"]:
                text += f"; head-AT costs {_ratios(trained, row, 'fit')} for one fit, "
                text += f"{_ratios(trained, row, 'with_choice')} with the choice of settings"
        lines.append(text + ".")
    return lines


def _named(arch: str, name: str) -> str:
    return name if arch == "tiny" else f"{name} ({arch})"


def _ratios(trained: Record, row: Record, part: str) -> str:
    """What adversarial head training costs over this head, in CPU seconds and in passes through the backbone."""
    seconds = trained[f"seconds_{part}"] / row[f"seconds_{part}"]
    one, other = (entry[f"forwards_{part}"] + entry[f"backwards_{part}"] for entry in (trained, row))
    return f"{seconds:.1f} times its CPU seconds and {one / other:.0f} times its passes"


def _shown(pair: Record | None) -> str:
    if pair is None:
        return "-"
    low, high = 100 * pair["low"], 100 * pair["high"]
    return f"{100 * pair['difference']:+.1f} ({low:+.1f} to {high:+.1f}), p = {pair['p']:.2g}"


def _panels(rows: Sequence[Record]) -> dict[tuple[str, str, str, str], list[Record]]:
    """Rows by architecture, backbone, norm and eps, largest eps first: a head's of most seeds, AutoAttack first.

    A threat that one head alone has met makes no panel, where others have met several.
    """
    panels: dict[tuple[str, str, str, str], dict[str, Record]] = {}
    for row in sorted(rows, key=lambda row: (row["seeds"], row["attacks"] == "autoattack")):
        panels.setdefault((row["arch"], row["backbone"], row["norm"], row["eps"]), {})[row["head"]] = row

    def place(key: tuple[str, str, str, str]) -> tuple[int, bool, float, int]:
        arch, name, norm, eps = key
        return _ARCHITECTURES.index(arch), norm == "L2", -_number(eps), _BACKBONES.index(name)

    order = sorted(panels, key=place)
    compared = [key for key in order if len(panels[key]) > 1]
    return {key: list(panels[key].values()) for key in compared or order}


def _grid(keys: Sequence[tuple[str, str, str, str]]) -> list[list[tuple[str, str, str, str] | None]]:
    """Where panels stand: a column a backbone, a row a threat, as ``keys`` come; of one backbone three a row."""
    names = [name for name in _BACKBONES if name in {name for _, name, _, _ in keys}]
    if len(names) == 1:
        lines = [list(keys[start : start + 3]) for start in range(0, len(keys), 3)]
        return [line + [None] * (min(3, len(keys)) - len(line)) for line in lines]
    threats = dict.fromkeys((arch, norm, eps) for arch, _, norm, eps in keys)
    return [
        [key if (key := (arch, name, norm, eps)) in keys else None for name in names] for arch, norm, eps in threats
    ]


def draw(pyplot: Any, rows: Sequence[Record]) -> None:
    """Robust accuracy against the CPU seconds of the head, its choices included; a panel a backbone and threat."""
    panels = _panels(rows)
    grid = _grid(list(panels))
    tall, wide = len(grid), len(grid[0])
    figure = pyplot.gcf()
    figure.set_size_inches(4.2 * wide, 2.9 * tall + 0.9)
    axes = figure.subplots(tall, wide, squeeze=False)
    heads = [head for head in _MARKERS if head in {row["head"] for row in rows}]
    heads += sorted({row["head"] for row in rows} - set(heads))
    for axis, key in zip(axes.flat, (key for line in grid for key in line), strict=True):
        if key is None:
            axis.set_visible(False)
            continue
        for row in panels[key]:
            # The network's own head costs nothing beyond the backbone; it is drawn at the left edge.
            seconds, number = max(row["seconds"] or _LEFT, _LEFT), heads.index(row["head"])
            bars = [[100 * (row["robust"] - row["low"])], [100 * (row["high"] - row["robust"])]]
            style = {"marker": _MARKERS.get(row["head"], _OTHER), "ls": "none", "color": COLOURS[number % len(COLOURS)]}
            style["mfc"] = style["color"] if row["attacks"] == "autoattack" else "white"
            axis.errorbar(seconds, 100 * row["robust"], bars, markersize=7, capsize=2, lw=1, **style)
        axis.set_xscale("log")
        axis.set_xlim(_LEFT / 2, 1500)
        arch, name, norm, eps = key
        axis.set_title(f"{_named(arch, name)}, {norm} {eps}", fontsize=9)
    for number, head in enumerate(heads):
        style = {"marker": _MARKERS.get(head, _OTHER), "color": COLOURS[number % len(COLOURS)]}
        axes[0, 0].plot([], [], linestyle="", label=head, **style)
    figure.supylabel("robust test accuracy, %", fontsize=10)
    label = "CPU seconds of the head, choice of its settings included (own: 0, at the left edge). Hollow: column apgd"
    figure.supxlabel("\n".join(wrap(label, 55 * wide)), fontsize=10)
    columns = max(1, 48 * wide // (6 + max(map(len, heads), default=0)))
    figure.legend(loc="outside upper center", ncols=min(6, columns), fontsize=8)


def report(options: argparse.Namespace, records: Sequence[EvalRecord]) -> None:
    """Print and write what is finished.

    Raises:
        InputError: nothing is.
    """
    if not records:
        raise InputError("A report needs finished cells; found none. Run python -m benchmarks.fashion_mnist first.")
    rows = rows_of(records)
    percent = "{:.1f}".format
    for row in rows:
        row["own_shown"], row["sam_shown"] = _shown(row["own"]), _shown(row["sam"])
        row["backbone_shown"] = _named(row["arch"], row["backbone"])
        row["robust_shown"] = (
            f"{percent(100 * row['robust'])} ({percent(100 * row['low'])}-{percent(100 * row['high'])})"
        )
    columns = [
        Column("backbone_shown", "backbone"),
        Column("head", "head"),
        Column("norm", "norm"),
        Column("eps", "eps"),
        Column("attacks", "attacks"),
        Column("seeds", "seeds"),
        Column("n", "n"),
        Column("clean", "clean, %", lambda value: percent(100 * value)),
        Column("robust_shown", "robust, % (95 %)"),
        Column("own_shown", "over own head, points"),
        Column("sam_shown", "over SAM network, points"),
        Column("seconds_fit", "one fit, CPU s", percent),
        Column("seconds", "with choice, CPU s", percent),
        Column("forwards_with_choice", "forwards", "{:.0f}".format),
        Column("backwards_with_choice", "backwards", "{:.0f}".format),
    ]
    publish(
        options,
        "Fashion-MNIST: robust accuracy by backbone and head",
        [flat(record) for record in records],
        rows,
        columns,
        lambda pyplot: draw(pyplot, rows),
        verdict(rows),
    )
