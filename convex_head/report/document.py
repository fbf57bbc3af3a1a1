"""A report of chosen records for a paper's appendix: one HTML file without script, or a LaTeX table.

The HTML file needs no network and prints well; :mod:`convex_head.report.pdf` writes a PDF.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from markupsafe import Markup

from convex_head.records import EvalRecord
from convex_head.report.entries import Entry, fact, plain
from convex_head.report.plots import curves
from convex_head.report.rows import environment, read_template, row
from convex_head.report.terminal import attack_names, footnotes, gap_text, short_attack

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # After a row's \\ an asterisk or a bracket would be its argument.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
}


def render_report(records: Sequence[EvalRecord], *, title: str = "Robustness evaluation", pictures: bool = True) -> str:
    """HTML with a table of all records, curves against eps, and a section a record.

    Args:
        records: in the order in which they are shown.
        title: heading.
        pictures: show the adversarial examples that records carry in ``metadata["examples"]``.
    """
    entries = numbered(records)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            # Each without siblings: the curves stand once, above the sections.
            rows=[row(entry, [], with_pictures=pictures) for entry in entries],
            curves=curves(entries),
            notes=board_notes(records),
            style=Markup(read_template("page.css")),
        )
    )


def numbered(records: Sequence[EvalRecord]) -> list[Entry]:
    """Entries with ids of their own: a report may show two evaluations of one model under one threat."""
    made = [Entry.from_record(record) for record in records]
    return [Entry(f"{k}-{entry.id}", entry.robustbench, entry.record) for k, entry in enumerate(made, start=1)]


def render_latex(records: Sequence[EvalRecord]) -> str:
    """A table with booktabs rules, ready for ``\\input``; a rule where dataset or threat change.

    Accuracies in percent; the interval is the 95 % Wilson interval of the robust accuracy, and the columns of attacks
    count what is left after each.
    """
    attacks = attack_names(records)
    heads = ["model", "clean", "robust", "95\\,\\%", *(_tex(short_attack(name)) for name in attacks), "radius", "gap"]
    lines = [
        "% Needs \\usepackage{booktabs}.",
        "\\begin{table}",
        "  \\centering",
        f"  \\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        "    \\toprule",
        f"    {' & '.join(heads)} \\\\",
    ]
    for (dataset, threat), group in groupby(records, key=board):
        lines += ["    \\midrule", f"    \\multicolumn{{{len(heads)}}}{{l}}{{{_tex(dataset)}, {_tex(threat)}}} \\\\"]
        lines += [f"    {' & '.join(_cells(record, attacks))} \\\\" for record in group]
    lines += ["    \\bottomrule", "  \\end{tabular}", "  \\caption{" + _caption(records) + "}", "\\end{table}"]
    return "\n".join(lines) + "\n"


def board(record: EvalRecord) -> tuple[str, str]:
    """Dataset and threat, which two records of one table share."""
    threat = record.threat
    norm = {"Linf": "l-infinity", "L2": "l2", "L1": "l1"}[threat.norm]
    return str(record.dataset.get("name", "")), f"{norm}, eps = {threat.eps_text}, n = {record.n}"


def _cells(record: EvalRecord, attacks: Sequence[str]) -> list[str]:
    low, high = record.interval
    radius = fact(record, "radius", (int, float))
    left = [record.attacks.get(name, {}).get("robust_correct") for name in attacks]
    return [
        _tex(record.name) + ("$^{\\dagger}$" if record.flags else ""),
        f"{100 * record.clean_accuracy:.1f}",
        f"{100 * record.robust_accuracy:.1f}",
        f"{100 * low:.1f}--{100 * high:.1f}",
        *("" if count is None else f"{100 * count / record.n:.1f}" for count in left),
        "" if radius is None else f"{radius:g}",
        _tex(gap_text(record)),
    ]


def _caption(records: Sequence[EvalRecord]) -> str:
    text = (
        "Accuracy in percent. Robust: right without attack and under every attack, with the 95\\,\\% Wilson interval; "
        "columns of attacks: what is left after each, in this order. Gap: relative duality gap of the head's training "
        "problem."
    )
    return text + (" $\\dagger$: flagged, not to be trusted." if any(record.flags for record in records) else "")


def board_notes(records: Sequence[EvalRecord]) -> list[str]:
    """The footnotes of each board, once each."""
    groups = [list(group) for _, group in groupby(records, key=board)]
    return list(dict.fromkeys(line for group in groups for line in footnotes(group)))


def _tex(text: str) -> str:
    return "".join(_SPECIAL.get(letter, letter) for letter in plain(text, 100))
