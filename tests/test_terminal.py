"""What a terminal and a log see of a running command: bars that fit, the time left, no stray escape sequence."""

import io
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from report_cases import make_record
from rich.console import Console

from convex_head.console import error_line
from convex_head.fit_progress import FitProgress, fit_progress
from convex_head.report.terminal import results_table
from convex_head.solvers.result import Progress

EVALUATE = (
    "evaluate",
    "--model",
    "zoo:net",
    "--attack",
    "apgd-ce",
    "--eps",
    "0.05",
    "--dataset",
    "digits",
    "--n-ex",
    "12",
)


@pytest.fixture
def zoo(tmp_path):
    """A folder with an importable module ``zoo``."""
    (tmp_path / "zoo.py").write_text(
        "import torch\n"
        "from convex_head.baselines import preact_resnet_small\n"
        "def net(num_classes=10):\n"
        "    torch.manual_seed(0)\n"
        "    return preact_resnet_small(num_classes, 1, widths=(4, 8))\n"
    )
    return tmp_path


def surroundings(folder):
    """Environment variables with ``folder`` importable and nothing said about colours or width."""
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(folder), *(item for item in sys.path if item)])}


class Terminal:
    """A program on a terminal of its own; what it wrote, as a screen without escape sequences."""

    def __init__(self, arguments, cwd, columns, **environment):
        pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
        self.parent, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        environment = {**surroundings(cwd), "TERM": "xterm-256color", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "convex_head", *map(str, arguments)],
            cwd=cwd, env=environment, stdin=child, stdout=child, stderr=child, close_fds=True,
        )  # fmt: skip
        os.close(child)

    def finish(self) -> str:
        parts = []
        while True:
            try:
                part = os.read(self.parent, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            parts.append(part)
        os.close(self.parent)
        self.code = self.process.wait(timeout=120)
        return b"".join(parts).decode()


def plain_lines(raw: str) -> list[str]:
    """Every line that was ever drawn, without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw).replace("\r", "\n").split("\n")


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("columns", [40, 80, 120])
def test_evaluate_on_a_terminal_shows_bars_that_fit_and_leaves_lines(zoo, columns):
    terminal = Terminal((*EVALUATE, "--eps-curve", "0.02"), zoo, columns)
    raw = terminal.finish()
    assert terminal.code == 0, raw
    lines = plain_lines(raw)
    bars = [line for line in lines if line.startswith("all attacks")]
    assert bars and all("left" in line or " in " in line for line in bars)
    assert max(len(line.rstrip()) for line in lines) <= columns
    assert any(re.fullmatch(r"eps 0\.02 apgd-ce: robust \d+/12 in 0:\d\d", line) for line in lines)
    assert "\x1b[?25l" in raw and raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l")  # the cursor is back
    assert "━┓" in raw  # the table has its right edge


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_dumb_terminal_gets_plain_lines(zoo):
    terminal = Terminal(EVALUATE, zoo, 80, TERM="dumb")
    raw = terminal.finish()
    assert terminal.code == 0 and "\x1b" not in raw and "apgd-ce: robust" in raw


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("arguments", "code"), [(EVALUATE, 0), (("evaluate", "--model", "zoo:nothing"), 2)])
def test_no_color_keeps_bars_and_drops_colours(zoo, arguments, code):
    terminal = Terminal(arguments, zoo, 100, NO_COLOR="1")
    raw = terminal.finish()
    assert terminal.code == code, raw
    assert not re.search(r"\x1b\[[0-9;]*\b(3[0-79]|4[0-79]|9[0-7]|38|48)(;[0-9;]*)?m", raw)
    coloured = Terminal(arguments, zoo, 100).finish()
    assert re.search(r"\x1b\[[0-9;]*\b(3[0-7]|38)(;[0-9;]*)?m", coloured)


def test_a_log_of_evaluate_has_a_line_a_stage_and_no_escape(zoo):
    done = subprocess.run(
        [sys.executable, "-m", "convex_head", *EVALUATE],
        cwd=zoo, env=surroundings(zoo), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "\x1b" not in done.stderr + done.stdout
    assert re.match(r"apgd-ce: robust \d+/12 in \d:\d\d\n", done.stderr)


def test_fit_tells_gap_share_and_time_left():
    seen = []
    display = FitProgress(Console(quiet=True), 1e-3, 100.0, lambda: lambda share, text: seen.append((share, text)))
    for seconds, gap in ((1.0, 0.5), (2.0, 0.05), (3.0, 0.2), (90.0, 0.02), (99.0, 1e-4)):
        display(Progress(0, seconds, 1.0, 1.0 - gap, gap, 7))
    shares = [share for share, _ in seen]
    assert shares[0] == 0.01 and shares == sorted(shares) and shares[-1] == 1.0
    assert shares[1] == pytest.approx(np.log(0.5 / 0.05) / np.log(0.5 / 1e-3)) and shares[3] == pytest.approx(0.9)
    assert "gap 5.0e-02, aim 1e-03" in seen[1][1] and "7 neurons" in seen[1][1]


def test_a_short_fit_shows_nothing_unless_asked():
    seen = []
    display = FitProgress(Console(quiet=True), 1e-3, None, lambda: lambda share, text: seen.append(share), 2.0)
    for seconds in (0.5, 1.9, 2.0, 3.0):
        display(Progress(0, seconds, 1.0, 0.9, 0.1 / seconds, 7))
    assert len(seen) == 2
    log = Console(file=io.StringIO())
    for show in (False, None):
        with fit_progress(log, 1e-3, None, show=show) as callback:
            assert callback is None
    with fit_progress(log, 1e-3, None, show=True) as callback:
        assert callback is not None


def test_a_log_of_fit_has_a_line_each_half_minute():
    stream = io.StringIO()
    display = FitProgress(Console(file=stream, width=200), 1e-2, None)
    for seconds in (1.0, 20.0, 31.0, 45.0, 62.0):
        display(Progress(0, seconds, 1.0, 0.9, 1.0 / seconds, 7))
    display.close()
    first, second, last = stream.getvalue().splitlines()
    assert last.startswith("1:02 fit: gap 1.6e-02") and "left" not in last
    assert first.startswith("0:31 fit: gap 3.2e-02") and second.startswith("1:02 fit:") and "left" in second


def test_a_terminal_obeys_no_name():
    record = make_record("\x1b[2Jname\x07", flags=("loss",), flag_details={"loss": "\x1b]0;owned\x07"}, metadata={})
    stream = io.StringIO()
    console = Console(file=stream, width=120)
    console.print(results_table([record], "", {}))
    error_line(console, f"{record.name} {record.flag_details['loss']}")
    assert "\x1b" not in stream.getvalue() and "\x07" not in stream.getvalue() and "[2Jname" in stream.getvalue()
