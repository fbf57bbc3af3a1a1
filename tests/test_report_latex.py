"""The LaTeX table: numbers, escaping that leaves LaTeX nothing to obey, and a compiled page where there is LaTeX."""

# ruff: noqa: RUF001

import re
import shutil
import subprocess

import pytest
from report_cases import HOSTILE, make_record

from convex_head.report import render_latex

PDFLATEX = shutil.which("pdflatex")
DOCUMENT = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\\input{table.tex}\\end{document}\n"
NAMES = {
    "a_b & 100% #1": "a\\_b \\& 100\\% \\#1",
    "$x$ ^^41 {\\bf}": "\\$x\\$ \\textasciicircum{}\\textasciicircum{}41 \\{\\textbackslash{}bf\\}",
    "\\input{/etc/passwd}\\end{table}": "\\textbackslash{}input\\{/etc/passwd\\}\\textbackslash{}end\\{table\\}",
    "[3cm]* <|>": "{[}3cm{]}{*} \\textless{}\\textbar{}\\textgreater{}",
    "--- ``x'' ?`": "-{}-{}- `{}`x'{}' ?{}`",
    "Grün Ångström Łódź façade ẞ": "Gr\\\"{u}n \\r{A}ngstr\\\"{o}m \\L{}\\'{o}d\\'{z} fa\\c{c}ade SS",
    "α→β Λ Α ς ο ≤ ½ × µ −1": "$\\alpha$$\\to$$\\beta$ $\\Lambda$ A $\\varsigma$ o $\\leq$ 1/2 $\\times$ $\\mu$ $-$1",
    "模型 😀 한 Кир": "{[}U+6A21{]}{[}U+578B{]} {[}U+1F600{]} {[}U+D55C{]} {[}U+041A{]}{[}U+0438{]}{[}U+0440{]}",
    "q\u0301 \u1ebf \u0301 \ufb01 \uff3cx \ufe68": "q \\^{e}  fi \\textbackslash{}x \\textbackslash{}",
    "\x00\x1b[31m\u202e": "{[}31m",
    HOSTILE: None,
    "y" * 10**4: "y" * 99 + "...",
    "": "",
}  # fmt: skip


def test_every_name_is_ascii_without_a_command_of_its_own():
    text = render_latex([make_record(name) for name in NAMES])
    assert text.isascii() and len(text) < 10_000
    rows = [line for line in text.splitlines() if line.endswith(" 1.0e-03 \\\\")]
    assert len(rows) == len(NAMES)
    for row, expected in zip(rows, NAMES.values(), strict=True):
        if expected is not None:
            assert row.startswith(f"    {expected} & 90.0 & ")
        # Six separators, no comment, no parameter, no open group: whatever the name was.
        bare = re.sub(r"\\[&%#_${}]", "", row)
        assert bare.count("&") == 6 and not set(bare) & set("%#") and bare.count("{") == bare.count("}")
        commands = set(re.findall(r"\\([a-zA-Z]+)", bare))
        assert commands <= {
            "textbackslash", "textasciicircum", "textasciitilde", "textless", "textgreater", "textbar",
            "alpha", "beta", "Lambda", "varsigma", "mu", "to", "leq", "times", "ss", "L", "c", "r",
        }  # fmt: skip


def test_hostile_datasets_attacks_and_statuses_are_escaped():
    record = make_record("m")
    odd = make_record(
        "m",
        dataset={"name": "my_data & ß", "fingerprint": "f"},
        attacks={"foolbox:A_b%": record.attacks["autoattack"]},
        outcomes={"foolbox:A_b%": record.outcomes["autoattack"]},
        metadata={"gap": 0.5, "status": "max_time%"},
    )
    text = render_latex([odd])
    assert "{my\\_data \\& \\ss{}, l-infinity, eps = 0.1, n = 10} \\\\" in text
    assert "& \\rotatebox{90}{A\\_b\\%} &" in text and "5.0e-01 max\\_time\\% \\\\" in text


def test_numbers_boards_and_flags():
    flagged = make_record("f", flags=("x",), flag_details={"x": "y"})
    lines = render_latex([make_record("m", eps="8/255"), flagged, make_record("n", eps="8/255")]).splitlines()
    rows = [line.strip() for line in lines if line.endswith("\\\\")]
    assert rows[0] == "model & clean & robust & 95\\,\\% & \\rotatebox{90}{autoattack} & radius & gap \\\\"
    assert rows[1] == "\\multicolumn{7}{l}{digits, l-infinity, eps = 8/255, n = 10} \\\\"
    assert rows[2] == "m & 90.0 & 50.0 & 23.7--76.3 & 50.0 & 0.5 & 1.0e-03 \\\\"
    # Records of one board stand together, in whatever order they came.
    assert rows[3].startswith("n & 90.0") and rows[5].startswith("f$^{\\dagger}$ & 90.0")
    assert "flagged" in lines[-2] and sum("rule" in line for line in lines) == 4


@pytest.mark.skipif(PDFLATEX is None, reason="needs pdflatex with booktabs; the tests above check what it would read")
def test_the_table_compiles_and_fits_the_page(tmp_path):
    records = [make_record(name) for name in NAMES]
    names = [f"torchattacks:Attack{k}" for k in range(12)]
    wide = make_record(
        "x" * 90,
        attacks=dict.fromkeys(names, records[0].attacks["autoattack"]),
        outcomes=dict.fromkeys(names, records[0].outcomes["autoattack"]),
    )
    (tmp_path / "table.tex").write_text(render_latex([*records, wide]))
    (tmp_path / "document.tex").write_text(DOCUMENT)
    done = subprocess.run(
        [PDFLATEX, "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "document.tex"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, errors="replace",
    )  # fmt: skip
    log = (tmp_path / "document.log").read_text(errors="replace")
    if "booktabs.sty' not found" in log:
        pytest.skip("needs the LaTeX package booktabs")
    assert done.returncode == 0, log[-2000:]
    assert "Overfull" not in log and "Missing character" not in log
    assert (tmp_path / "document.pdf").read_bytes().startswith(b"%PDF")
