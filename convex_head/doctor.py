"""What is installed, whether it works, and what to do if not: the checks behind ``convex-head doctor``.

A check imports the package and, where an upstream fault is known, looks for exactly that fault.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

from rich.table import Table
from rich.text import Text

from convex_head.console import table

_CORE = ("torch", "numpy", "numba", "cvxpy", "safetensors", "rich", "typer", "jinja2")
_EXTRAS = {
    "pyautoattack": "bench",
    "torchattacks": "torchattacks",
    "robustbench": "robustbench",
    "pytorch_optimizer": "bench",
    "scikit-learn": "bench",
    "torchvision": "vision",
    "timm": "vision",
    "matplotlib": "bench",
}
_MODULES = {"scikit-learn": "sklearn"}
_STYLES = {"ok": "green", "missing": "yellow", "broken": "bold red", "note": "cyan"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: package or part.
        state: "ok", "missing" (an extra that is not installed), "broken", or "note".
        detail: version, or what was found.
        remedy: the next step; empty if there is none to take.
        needed: the core does not work without it.
    """

    subject: str
    state: str
    detail: str
    remedy: str = ""
    needed: bool = False

    def to_dict(self) -> dict[str, str | bool]:
        """For --json."""
        return asdict(self)


def examine() -> list[Finding]:
    """All findings: Python, core, extras, known upstream faults, devices, data."""
    findings = [Finding("python", "ok", platform.python_version())]
    findings += [_package(name, "") for name in _CORE]
    findings += [_package(name, extra) for name, extra in _EXTRAS.items()]
    return [*findings, *_upstream(), _device(), _solvers()]


def findings_table(findings: list[Finding]) -> Table:
    """The report as a table."""
    result = table("convex-head doctor", ["part", "state", "found", "what to do"])
    for finding in findings:
        state = Text(finding.state, style=_STYLES[finding.state])
        result.add_row(Text(finding.subject), state, Text(finding.detail), Text(finding.remedy))
    return result


def _package(name: str, extra: str) -> Finding:
    """Installed, and importable? RobustBench has a check of its own."""
    try:
        installed = version(name)
    except PackageNotFoundError:
        if not extra:
            return Finding(name, "broken", "not installed", f"pip install {name}", needed=True)
        return Finding(name, "missing", "not installed", f"pip install '.[{extra}]' in the checkout")
    if name == "robustbench":
        return Finding(name, "ok", installed)
    try:
        importlib.import_module(_MODULES.get(name, name))
    except Exception as error:
        detail = f"{installed}, import fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        remedy = f"pip install --force-reinstall {name}"
        if name == "torchvision":
            remedy = "reinstall torch and torchvision in one pip command: each torchvision is made for one torch"
        return Finding(name, "broken", detail, remedy, needed=not extra)
    return Finding(name, "ok", installed)


def _upstream() -> list[Finding]:
    """Faults of the harnesses that this package works around."""
    found = []
    if _installed("robustbench"):
        lacking = [name for name in ("autoattack", "pkg_resources") if importlib.util.find_spec(name) is None]
        if lacking:
            found.append(
                Finding(
                    "robustbench",
                    "note",
                    f"a plain 'import robustbench' fails: it imports {' and '.join(lacking)}, not installed",
                    "import it through convex_head.robust_bench, which supplies what is missing",
                )
            )
    if _installed("pyautoattack"):
        found.append(
            Finding(
                "pyautoattack",
                "note",
                "'standard' raises IndexError below 10 classes; its own resume is broken",
                "use convex_head.evaluate: it picks the usable attacks, and resumes",
            )
        )
    if _installed("torchattacks"):
        found.append(
            Finding(
                "torchattacks",
                "note",
                "its AutoAttack runs 10 steps instead of 100",
                "use the attack 'autoattack'; 'torchattacks:AutoAttack' is refused",
            )
        )
    return found


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _device() -> Finding:
    try:
        import torch
    except Exception:
        return Finding("device", "note", "unknown, torch does not import")
    if torch.cuda.is_available():
        return Finding("device", "ok", torch.cuda.get_device_name(0))
    return Finding("device", "ok", f"CPU, {torch.get_num_threads()} threads")


def _solvers() -> Finding:
    """Conic solvers for solver='sdp'; the default solver needs none."""
    try:
        import cvxpy
    except Exception:
        return Finding("conic solvers", "note", "unknown, cvxpy does not import")
    usable = [name for name in ("CLARABEL", "SCS", "MOSEK") if name in cvxpy.installed_solvers()]
    if usable:
        return Finding("conic solvers", "ok", ", ".join(usable))
    return Finding("conic solvers", "broken", "none for semidefinite programs", "pip install clarabel")
