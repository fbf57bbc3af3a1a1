"""Kill an evaluation at random moments, let it go on, and count records that differ.

    python -m benchmarks.kill_resume              200 kills
    python -m benchmarks.kill_resume --quick      5 kills

A child process evaluates a small convolutional network on random images with several attacks in many batches, keeping
its progress in a file. The parent sends SIGKILL after a random time, over and over, until the child finishes; then
the record is compared with that of an undisturbed run. Kills are spread over as many evaluations as they need.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from multiprocessing.context import ForkProcess as Process
from pathlib import Path

import torch
from torch import nn

from convex_head.evaluate import evaluate
from convex_head.records import EvalRecord
from convex_head.threat import ThreatModel

ATTACKS = (("pgd", {"steps": 5}), ("apgd-dlr", {"restarts": 1}), ("square", {"queries": 60}))


def run(state: Path | None, record: Path) -> None:
    """The evaluation that is killed: 60 images in batches of 5, three attacks."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    images = torch.rand(60, 1, 8, 8)
    labels = model(images).argmax(dim=1)
    evaluate(model, (images, labels), ThreatModel("Linf", 0.02), ATTACKS, batch_size=5, state=state).save(record)


def child(state: Path, record: Path) -> Process:
    """Start :func:`run` in a process of its own, forked so that 200 of them need not import torch again."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(state, record))
    process.start()
    return process


def killed_evaluation(folder: Path, kills_left: int, longest: float, generator: random.Random) -> int:
    """Kill and restart one evaluation until it is done; the number of kills."""
    kills = 0
    while True:
        process = child(folder / "state.json", folder / "record.json")
        process.join(generator.uniform(0, longest) if kills < kills_left else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        elif process.exitcode == 0:
            return kills
        else:
            raise SystemExit(f"the evaluation failed with exit code {process.exitcode}")


def main() -> None:
    """Parse arguments, run, print one JSON line with the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="5 kills")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = 5 if arguments.quick else arguments.kills
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.monotonic()
        child(folder / "undisturbed-state.json", folder / "undisturbed.json").join()
        longest = time.monotonic() - started
        reference = EvalRecord.load(folder / "undisturbed.json").identity()
        kills = evaluations = differing = 0
        while kills < wanted:
            work = folder / str(evaluations)
            work.mkdir()
            kills += killed_evaluation(work, wanted - kills, longest, generator)
            evaluations += 1
            differing += EvalRecord.load(work / "record.json").identity() != reference
            print(f"{kills}/{wanted} kills, {evaluations} evaluations, {differing} differ", file=sys.stderr)
    result = {"kills": kills, "evaluations": evaluations, "differing_records": differing, "uninterrupted_s": longest}
    print(json.dumps(result))
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
