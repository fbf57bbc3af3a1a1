"""The README's snippets run as printed, and its commands are the ones that exist."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
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


TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "leaderboard/README.md")}
COMMANDS = [
    line
    for text in TEXTS.values()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
    if not language
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("convex-head ")
]


def test_commands_in_the_documents_exist_with_their_options():
    import typer.main

    from convex_head.cli import app

    assert len(COMMANDS) >= 7
    for line in COMMANDS:
        names, command = shlex.split(line)[1:], typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[names.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        unknown = {name for name in names if name.startswith("--")} - known
        assert not unknown, (line, unknown)


@pytest.mark.parametrize("name", [*TEXTS, "benchmarks/README.md", "leaderboard/LEADERBOARD.md"])
def test_relative_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#([^)]+))?\)", text)
    for target, anchor in links:
        path = (ROOT / name).parent / target
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert links or name != "README.md"


def shell(line, folder):
    done = subprocess.run(
        [sys.executable, "-m", "convex_head", *shlex.split(line)[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *(item for item in sys.path if item)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (line, done.stderr)
    return done


def test_the_way_to_an_entry_works_as_printed(tmp_path):
    """The commands of leaderboard/README.md and of the README, from a model of one's own to pages and a report."""
    if importlib.util.find_spec("pyautoattack") is None:
        pytest.skip("needs pyautoattack")
    (tmp_path / "module.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def factory(num_classes):\n"
        "    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    (tmp_path / "leaderboard").mkdir()
    for start in ("evaluate --model module:factory", "leaderboard add record", "leaderboard check", "report record"):
        line = next(line for line in COMMANDS if line.startswith(f"convex-head {start}"))
        shell(line, tmp_path)
    assert "<h2" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "leaderboard" / "index.html").exists()


def test_the_fit_of_the_readme_works_as_printed(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 4)).astype("float32")
    np.save(tmp_path / "features.npy", x)
    np.save(tmp_path / "labels.npy", (x[:, 0] > 0).astype("int64"))
    (line,) = [line for line in COMMANDS if line.startswith("convex-head fit")]
    assert "converged" in shell(line, tmp_path).stdout
    assert (tmp_path / "head.safetensors").exists() and (tmp_path / "fit.ckpt").exists()


def test_the_readme_answers_what_a_newcomer_asks():
    headings = re.findall(r"^## (.+)$", README, flags=re.M)
    for heading in ("Two commands", "Evaluate any model", "How it compares", "Troubleshooting", "Citation"):
        assert heading in headings
    compared = README[README.index("## How it compares") : README.index("## Troubleshooting")]
    for other in ("AutoAttack", "torchattacks", "RobustBench", "Foolbox", "ART"):
        assert f"| [{other}](" in compared
