"""A table of records for a paper, in LaTeX that needs the packages booktabs and graphicx and no other.

What is written is ASCII, so that no name needs an input or font encoding: accented letters become accents, Greek
letters and common signs their commands, and anything else its code point in brackets.
"""

# Letters that look like others are what this file is about.
# ruff: noqa: RUF001

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from convex_head.records import EvalRecord
from convex_head.report.document import by_board
from convex_head.report.terminal import attack_names, gap_text, short_attack
from convex_head.report.values import fact, plain

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
    "–": "--",
    "—": "---",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "−": "$-$",
    "ο": "o",
    "⁄": "/",
    "ß": r"\ss{}",
    "ẞ": "SS",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "œ": r"\oe{}",
    "Œ": r"\OE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "ı": r"\i{}",
}
_MATHS = {"≤": "leq", "≥": "geq", "≈": "approx", "±": "pm", "×": "times", "·": "cdot", "→": "to", "∞": "infty"}
# From U+03B1 on; capitals without a command of their own look like Latin ones.
_GREEK = [
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu"),
    *("xi", "omicron", "pi", "rho", "varsigma", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"),
]
_CAPITALS = dict(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΧ", "ABEZHIKMNOPTX", strict=True))
# Marks of decomposed letters.
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0323": "d",
    "\u0327": "c",
}
# Two of these side by side would become one sign: a dash, a quotation mark, a question mark upside down.
_LIGATURES = re.compile(r"(?<=[-`',?!])(?=[-`',])")


def render_latex(records: Sequence[EvalRecord]) -> str:
    """A table with booktabs rules, ready for ``\\input``; each dataset and threat between rules.

    Accuracies in percent; the interval is the 95 % Wilson interval of the robust accuracy, and the columns of attacks
    count what is left after each.
    """
    attacks = attack_names(records)
    # Upright names of attacks would make the table wider than a page.
    turned = [f"\\rotatebox{{90}}{{{_tex(short_attack(name))}}}" for name in attacks]
    heads = ["model", "clean", "robust", "95\\,\\%", *turned, "radius", "gap"]
    lines = [
        "% Needs \\usepackage{booktabs,graphicx}.",
        "\\begin{table}",
        "  \\centering\\footnotesize\\setlength{\\tabcolsep}{3pt}",
        "  \\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
        f"  \\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        "    \\toprule",
        f"    {' & '.join(heads)} \\\\",
    ]
    for (dataset, threat), group in by_board(records, lambda record: record).items():
        lines += ["    \\midrule", f"    \\multicolumn{{{len(heads)}}}{{l}}{{{_tex(dataset)}, {_tex(threat)}}} \\\\"]
        lines += [f"    {' & '.join(_cells(record, attacks))} \\\\" for record in group]
    lines += ["    \\bottomrule", "  \\end{tabular}}", "  \\caption{" + _caption(records) + "}", "\\end{table}"]
    return "\n".join(lines) + "\n"


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


def _tex(text: str) -> str:
    """ASCII that LaTeX prints as it is; at most 100 letters."""
    parts = _LIGATURES.split(unicodedata.normalize("NFKC", plain(text, 100)))
    return "{}".join("".join(map(_letter, part)) for part in parts)


def _letter(letter: str) -> str:
    """One letter; of its accents the first, a mark without a letter is left out."""
    if unicodedata.combining(letter):
        return ""
    parts = unicodedata.normalize("NFD", letter)
    if len(parts) > 1 and parts[0].isascii() and parts[0].isalpha() and parts[1] in _ACCENTS:
        return f"\\{_ACCENTS[parts[1]]}{{{parts[0]}}}"
    known = {**_SPECIAL, **_CAPITALS}.get(letter)
    if known is not None or letter.isascii():
        return known or letter
    if letter in _MATHS:
        return f"$\\{_MATHS[letter]}$"
    place = ord(letter.lower()[0]) - ord("α")
    if 0 <= place < len(_GREEK):
        name = _GREEK[place]
        return f"$\\{name.capitalize() if letter.isupper() else name}$"
    return f"{{[}}U+{ord(letter):04X}{{]}}"
