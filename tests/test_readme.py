"""The README's snippets run as printed, and its commands are the ones that exist."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def command(mark: str) -> str:
    return re.search(rf"<!-- {mark} -->\n```\n(.*?)\n```", README, flags=re.S).group(1)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippet_runs(index, tmp_path):
    for package in ("pyautoattack", "timm", "torchvision", "robustbench"):
        needed = package == "pyautoattack" or re.search(rf"^(import|from) .*\b{package}\b", SNIPPETS[index], flags=re.M)
        if needed and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS[index]], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mark", ["bench-command", "test-command"])
def test_install_commands_name_extras_that_exist(mark):
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    install, run = command(mark).split(" && ")
    named = re.search(r"\[(.*?)\]", install).group(1).split(",")
    assert shlex.split(install)[:2] == ["pip", "install"]
    assert set(named) <= set(extras)
    assert shlex.split(run)[0] in ("convex-head", "pytest")


def test_options_in_the_readme_exist():
    done = subprocess.run(
        [sys.executable, "-m", "convex_head", "evaluate", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        env={"COLUMNS": "200", "PATH": "", "TERM": "dumb", "PYTHONPATH": ":".join(sys.path)},
    )
    options = set(re.findall(r"convex-head evaluate (.*?)```", README, flags=re.S)[0].split())
    missing = [o for o in options if o.startswith("--") and o not in done.stdout]
    assert not missing, done.stdout
