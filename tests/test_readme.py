"""The README's snippets run as printed, and its commands are the ones that exist."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from json_schema import faults

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
LINES = {
    name: [
        line
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
        if not language
        for line in block.replace("\\\n", " ").splitlines()
    ]
    for name, text in TEXTS.items()
}
COMMANDS = [line for lines in LINES.values() for line in lines if line.startswith("convex-head ")]


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
            assert anchor in {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert links or name != "README.md"


def surroundings(folder):
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *(item for item in sys.path if item)])}


def words_of(line, folder):
    """What a shell makes of a line: its words, patterns replaced by the files that match; this Python's commands."""
    program, *rest = shlex.split(line)
    start = {
        "convex-head": [sys.executable, "-m", "convex_head"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }[program]
    files = [sorted(str(path.relative_to(folder)) for path in folder.glob(w)) if "*" in w else [w] for w in rest]
    return [*start, *(word for found in files for word in found)]


def shell(line, folder):
    done = subprocess.run(
        words_of(line, folder), cwd=folder, env=surroundings(folder), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (line, done.stderr)
    return done


def write_factory(folder):
    (folder / "module.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def factory(num_classes):\n"
        "    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )


def test_the_way_to_an_entry_works_as_printed(tmp_path):
    """Every command of leaderboard/README.md in its order, the bench in its quick form."""
    pytest.importorskip("pyautoattack")
    pytest.importorskip("sklearn")
    write_factory(tmp_path)
    board = tmp_path / "leaderboard"
    *lines, serve = LINES["leaderboard/README.md"]
    assert len(lines) >= 8 and serve == "convex-head leaderboard serve"
    for line in lines:
        done = shell(line.replace("convex-head bench", "convex-head bench --quick"), tmp_path)
        if "--head" in line:
            assert "the certificate holds" in done.stderr
    names = {path.name for path in (board / "entries").iterdir()}
    assert names >= {"digits-module-factory-linf-0-1.json", "digits-standard-convex-linf-0-1.json"}
    schema = json.loads((ROOT / "leaderboard" / "schema.json").read_text(encoding="utf-8"))
    for path in (board / "entries").iterdir():
        assert faults(json.loads(path.read_text(encoding="utf-8")), schema) == []
    page = (board / "index.html").read_bytes()
    process = subprocess.Popen(
        [*words_of(serve, tmp_path), "--port", "0"],
        cwd=tmp_path, env=surroundings(tmp_path), stderr=subprocess.PIPE, text=True,
        # A shell's background jobs ignore SIGINT, and what they start does too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process:
        try:
            url = process.stderr.readline().split()[0]
            with urllib.request.urlopen(url, timeout=30) as answer:
                assert answer.read() == page
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


def test_evaluate_and_report_of_the_readme_work_as_printed(tmp_path):
    """On digits and two points, where the README has CIFAR-10 and a thousand."""
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("pyautoattack")
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), tmp_path / "weights.pt")
    lines = [
        line for line in LINES["README.md"] if line.startswith(("convex-head evaluate", "convex-head leaderboard"))
    ]
    lines += [line for line in LINES["README.md"] if line.startswith("convex-head report")]
    assert len(lines) == 4
    for line in lines:
        shell(line.replace("cifar10", "digits").replace("--n-ex 1000", "--n-ex 2"), tmp_path)
    assert "<h2" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(list((tmp_path / "leaderboard" / "entries").iterdir())) == 1


def test_the_fits_of_the_readme_work_as_printed(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 4)).astype("float32")
    lines = [line for line in LINES["README.md"] if " fit " in line]
    assert [line.split()[0] for line in lines] == ["convex-head", "torchrun"]
    for line in lines:
        folder = tmp_path / line.split()[0]
        folder.mkdir()
        np.save(folder / "features.npy", x)
        np.save(folder / "labels.npy", (x[:, 0] > 0).astype("int64"))
        assert "converged" in shell(line, folder).stdout
        assert (folder / "head.safetensors").exists() and (folder / "fit.ckpt").exists()


def test_every_command_of_the_readmes_is_one_of_those_that_run():
    known = ("convex-head", "torchrun", "pip install")
    assert all(line.startswith(known) for lines in LINES.values() for line in lines if line.strip())


def test_the_benchmarks_commands_exist_with_their_options():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    lines = [line.split("#")[0] for line in re.findall(r"^    (.*python -m benchmarks\..*)$", text, flags=re.M)]
    common = (ROOT / "benchmarks" / "common.py").read_text(encoding="utf-8")
    assert len(lines) >= 14
    for line in lines:
        module, *words = shlex.split(line[line.index("-m ") + 3 :])
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in source + common, (line, option)


TOPICS = (
    *("Two commands", "What is exact, what is a bound", "Swap a head in your pipeline", "Evaluate any model"),
    *("Add an attack", "Add an entry, write a report", "How it compares", "Troubleshooting", "Citation"),
)


def test_the_readme_answers_what_a_newcomer_asks():
    headings = re.findall(r"^## (.+)$", README, flags=re.M)
    for heading in TOPICS:
        assert heading in headings
    compared = README[README.index("## How it compares") : README.index("## Troubleshooting")]
    for other in ("AutoAttack", "torchattacks", "RobustBench", "Foolbox", "ART"):
        assert f"| [{other}](" in compared
