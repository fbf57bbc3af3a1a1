"""Imports go one way, and the report needs no torch: read from the syntax trees, and by importing it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import convex_head

ROOT = Path(convex_head.__file__).parent
# What the modules under a prefix may not import, however deep in a function the import stands.
FORBIDDEN = {
    "problems": ("solvers", "head", "splice", "attacks", "evaluate", "report"),
    "adversary": ("solvers", "head", "splice", "attacks", "evaluate", "report"),
    "kernels": ("problems", "adversary", "solvers", "head", "splice", "attacks", "evaluate", "report"),
    "solvers": ("head", "splice", "attacks", "evaluate", "report", "baselines"),
    "attacks": ("head", "splice", "problems", "solvers", "adversary", "baselines"),
    "evaluate": ("head", "splice", "problems", "solvers", "adversary", "baselines"),
    "eps_curve": ("head", "splice", "problems", "solvers", "adversary", "baselines"),
    "evaluation_run": ("head", "splice", "problems", "solvers", "adversary", "baselines"),
    "records": ("head", "splice", "problems", "solvers", "adversary", "attacks", "baselines"),
    "report": ("head", "splice", "problems", "solvers", "adversary", "attacks", "baselines", "evaluate", "data"),
    "errors": ("",),
}


def modules(prefix: str) -> list[Path]:
    """The module of that name, or all modules of that package."""
    file = ROOT / f"{prefix}.py"
    return [file] if file.exists() else sorted((ROOT / prefix).rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Absolute names of everything that a module imports: modules, and the names taken from them."""
    package = ["convex_head", *file.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def reaches(name: str, target: str) -> bool:
    return name == target or name.startswith(f"{target}.")


@pytest.mark.parametrize("prefix", FORBIDDEN)
def test_nothing_imports_against_the_direction(prefix: str) -> None:
    files = modules(prefix)
    assert files
    for file in files:
        for name in imports(file):
            for target in FORBIDDEN[prefix]:
                full = f"convex_head.{target}".rstrip(".")
                assert not reaches(name, full), f"{file.relative_to(ROOT)} imports {name}"


def test_the_parser_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "attacks").mkdir()
    file = tmp_path / "attacks" / "a.py"
    file.write_text(
        "import convex_head.head as h\ndef f():\n    from .. import solvers\n    from ..problems.base import Network\n"
        "    from convex_head import splice\n    from . import b\n"
    )
    assert imports(file) >= {
        "convex_head.head",
        "convex_head.solvers",
        "convex_head.problems.base",
        "convex_head.splice",
        "convex_head.attacks.b",
    }


def test_report_names_no_torch() -> None:
    for file in modules("report"):
        for name in imports(file):
            assert name.split(".")[0] not in ("torch", "torchvision", "timm", "cvxpy"), f"{file.name} imports {name}"


def test_report_imports_in_a_process_without_torch() -> None:
    """Every module of the report, where torch cannot be imported; the package root, which exports the head, aside."""
    names = [".".join(("convex_head", *f.relative_to(ROOT).with_suffix("").parts)) for f in modules("report")]
    code = (
        "import importlib, sys, types\n"
        "sys.modules['torch'] = None\n"
        "root = types.ModuleType('convex_head')\n"
        f"root.__path__, root.__version__ = [{str(ROOT)!r}], '0'\n"
        "sys.modules['convex_head'] = root\n"
        f"[importlib.import_module(name.removesuffix('.__init__')) for name in {names!r}]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_report_knows_only_records():
    """No module of the report imports torch, or anything of this package that does."""
    allowed = {"records", "report", "statistics", "errors", "json_files", "threat", "console"}
    for path in (ROOT / "report").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                root, _, rest = name.partition(".")
                assert root != "torch", path
                assert root != "convex_head" or rest.split(".")[0] in allowed, (path, name)
