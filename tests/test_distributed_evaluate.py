"""torchrun evaluate: processes share the batches of a stage, and the record is that of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from convex_head.data import load_dataset
from convex_head.errors import ShardError
from convex_head.evaluate import evaluate
from convex_head.records import EvalRecord
from convex_head.threat import ThreatModel

ZOO = """
import os, signal
import torch
from convex_head.attacks.base import Attack
from convex_head.data import load_dataset

def net():
    data = load_dataset("digits", split="train")
    means = torch.stack([data.images[data.labels == c].mean(0).flatten() for c in range(10)])
    linear = torch.nn.Linear(64, 10)
    linear.weight.data, linear.bias.data = means, -0.5 * means.square().sum(1)
    return torch.nn.Sequential(torch.nn.Flatten(), linear)

def fragile():
    if os.environ["RANK"] == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, before this one has said what it has met
    whole, seen = Attack.run, []
    def run(self, *args, **kwargs):
        seen.append(1)
        if os.environ["RANK"] == "1" and len(seen) == 3:
            os._exit(3)
        return whole(self, *args, **kwargs)
    Attack.run = run
    return net()
"""
COMMON = ["--dataset", "digits", "--eps", "0.1", "--n-ex", "30", "--batch-size", "4", "--json", "--quiet"]
ATTACKS = ["--attack", "apgd-ce", "--attack", "square"]


def together(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*launcher, "-m", "convex_head", "evaluate", *arguments, *COMMON, *ATTACKS]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=settings, cwd=folder)


def outcomes(record: EvalRecord) -> tuple:
    counts = {
        name: {key: value for key, value in found.items() if key not in ("seconds", "stages")}
        for name, found in record.attacks.items()
    }
    return record.clean, record.outcomes, record.flags, counts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "zoo.py").write_text(ZOO)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("zoo", None)


def alone() -> EvalRecord:
    from zoo import net

    data = load_dataset("digits", split="test", n=30)
    return evaluate(net(), data, ThreatModel("Linf", "0.1"), ("apgd-ce", "square"), batch_size=4)


def test_two_processes_write_the_record_of_one(folder: Path) -> None:
    done = together(folder, "--model", "zoo:net", "--out", str(folder / "record.json"))
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("{")]) == 1
    record, expected = EvalRecord.load(folder / "record.json"), alone()
    assert outcomes(record) == outcomes(expected)
    assert 0 < record.robust_correct < record.clean_correct


def test_a_lost_process_ends_the_evaluation_and_the_state_goes_on(folder: Path) -> None:
    state = ["--state", str(folder / "state.json")]
    lost = together(folder, "--model", "zoo:fragile", *state)
    assert lost.returncode != 0
    assert "every process must stay until the work ends; rank 0 of 2 lost another one" in lost.stderr
    batches = [stage["batches"] for stage in json.loads((folder / "state.json").read_text())["stages"].values()]
    assert sum(batches) == 4
    done = together(folder, "--model", "zoo:net", *state, "--out", str(folder / "record.json"))
    assert done.returncode == 0, done.stderr
    assert outcomes(EvalRecord.load(folder / "record.json")) == outcomes(alone())


def test_distributed_needs_torch_distributed(folder: Path) -> None:
    from zoo import net

    with pytest.raises(ShardError, match="Start with torchrun"):
        evaluate(net(), "digits", ThreatModel("Linf", "0.1"), ("apgd-ce",), n=4, distributed=True)
