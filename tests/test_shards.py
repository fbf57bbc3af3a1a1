"""Two processes of torch.distributed find the head that one finds; a lost process ends the fit with a named error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris

from convex_head import ConvexRobustHead
from convex_head.errors import ShardError

RANK = """
import atexit, json, os, sys, warnings
import torch, torch.distributed as dist
from sklearn.datasets import load_iris
from convex_head import ConvexRobustHead, activations
torch.set_num_threads(1)
rank, lost = int(sys.argv[1]), sys.argv[3] == "lost"
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
atexit.register(dist.destroy_process_group)
x, y = (torch.as_tensor(v) for v in load_iris(return_X_y=True))
mine = slice(0, 70) if rank == 0 else slice(70, 150)
if sys.argv[3] == "one class":
    y = torch.zeros_like(y)
if sys.argv[3] == "precisions":
    activations.polynomial._OWN_FLOAT32_ABOVE = 100
    x = x.float() if rank == 0 else x
def leave(line):
    if lost and rank == 1 and line.iteration == 2:
        os._exit(3)
head = ConvexRobustHead(4, 3, reg=0.02).double()
kept = {"callback": leave if lost else None, "checkpoint": sys.argv[2] + ".ckpt"}
head.fit(x[mine], y[mine], distributed=True, tol=1e-3, progress=rank == 0, **kept)
print(json.dumps([head.result_.primal, head.result_.dual, head.directions.tolist()]))
"""


def ranks(tmp_path: Path, mode: str, script: str = RANK) -> list[subprocess.CompletedProcess[str]]:
    command = [sys.executable, "-c", script]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    done = []
    for process in started:
        out, err = process.communicate(timeout=120)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    first, second = (json.loads(rank.stdout.splitlines()[-1]) for rank in ranks(tmp_path, "whole"))
    assert first == second
    x, y = load_iris(return_X_y=True)
    alone = ConvexRobustHead(4, 3, reg=0.02).double().fit(x, y, tol=1e-3)
    assert first[0] == pytest.approx(alone.result_.primal, rel=1e-6)
    assert first[1] == pytest.approx(alone.result_.dual, rel=1e-6)


SAMPLES = """
import atexit, sys
import torch, torch.distributed as dist
from convex_head.problems.polynomial import PolynomialProblem
from convex_head.shards import Shard, Whole
rank, alone = int(sys.argv[1]), sys.argv[3] == "alone"
x = torch.arange(1500.0).view(-1, 1)
mine = slice(0, None) if alone else slice(0, 900) if rank == 0 else slice(900, None)
shard = Whole()
if not alone:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    atexit.register(dist.destroy_process_group)
    shard = Shard(len(x[mine]), x.device)
y = torch.arange(1500) % 2
problem = PolynomialProblem(x[mine], y[mine], num_classes=2, radius=0.0, reg=0.1, shard=shard)
part = problem.sample(300, 0)
print(part.n, part.shard.first, part.sample(40, 1).features.squeeze(1).tolist(), sep=";")
"""


def test_processes_with_features_of_different_precision_take_one(tmp_path: Path) -> None:
    first, second = ranks(tmp_path, "precisions")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert json.loads(first.stdout) == json.loads(second.stdout)


def test_processes_draw_a_sample_of_a_sample_as_one_does(tmp_path: Path) -> None:
    alone = ranks(tmp_path, "alone", SAMPLES)[0].stdout.split(";")
    parts = [rank.stdout.split(";") for rank in ranks(tmp_path, "together", SAMPLES)]
    assert [part[0] for part in parts] == [alone[0]] * 2 == ["300"] * 2
    assert parts[0][1] == "0" and int(parts[1][1]) > 100
    drawn = [json.loads(part[2]) for part in parts]
    assert drawn[0] + drawn[1] == json.loads(alone[2]) and len(drawn[0]) > 10 and len(drawn[1]) > 5


def test_a_lost_process_ends_the_fit_with_a_clear_error(tmp_path: Path) -> None:
    left, lost = ranks(tmp_path, "lost")
    assert lost.returncode == 3 and left.returncode == 1
    assert "ShardError: every process must stay until the work ends; rank 0 of 2 lost another one" in left.stderr
    # The same command with as many processes goes on from the checkpoint, to the head of a fit that was never cut off.
    (tmp_path / "store").unlink(missing_ok=True)
    assert (tmp_path / "store.ckpt").is_file()
    resumed = [json.loads(rank.stdout.splitlines()[-1]) for rank in ranks(tmp_path, "whole")]
    (tmp_path / "fresh").mkdir()
    straight = [json.loads(rank.stdout.splitlines()[-1]) for rank in ranks(tmp_path / "fresh", "whole")]
    assert resumed == straight


def test_one_class_in_all_shards_is_refused(tmp_path: Path) -> None:
    for rank in ranks(tmp_path, "one class"):
        assert "SingleClassError: training needs at least two classes; found only label 0" in rank.stderr


def test_distributed_needs_torch_distributed() -> None:
    with pytest.raises(ShardError, match="Start with torchrun"):
        ConvexRobustHead(2, 2).fit(torch.randn(8, 2), torch.arange(8) % 2, distributed=True)


def test_torchrun_fits_a_head_from_a_file(tmp_path: Path) -> None:
    x, y = load_iris(return_X_y=True)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    out, common = tmp_path / "head.safetensors", ["--labels", str(tmp_path / "y.npy"), "--reg", "0.02", "--json"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = ["-m", "convex_head", "fit", str(tmp_path / "x.npy"), "--stream", "--out", str(out), *common]
    done = subprocess.run(
        [*launcher, *command], capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    facts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(facts) == 1 and facts[0]["status"] == "converged"
    head = ConvexRobustHead.load(out)
    alone = ConvexRobustHead(4, 3, reg=0.02).fit(x, y)
    assert head.result_.primal == pytest.approx(alone.result_.primal, rel=1e-6)
