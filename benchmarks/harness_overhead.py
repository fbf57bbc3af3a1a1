"""What the harness adds to AutoAttack's own time, on the same points.

    python -m benchmarks.harness_overhead             128 images, three rounds
    python -m benchmarks.harness_overhead --quick     24 images, one round

Both sides run pyautoattack's standard version with one seed and one batch size on a small convolutional network
trained on the spot on sklearn's digits, in turns, so that a slow moment of the machine meets both. ``evaluate``
does more: it checks the model, measures every result again, writes progress and keeps a record. Target: at most 3 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import pyautoattack
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from convex_head.evaluate import evaluate
from convex_head.threat import ThreatModel

BATCH_SIZE = 128


def trained(epochs: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network, and the test part of the digits."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(1400).split(100):
            optimiser.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimiser.step()
    return model.eval().requires_grad_(False), images[1400:], labels[1400:]


def own_time(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> tuple[float, int]:
    """Seconds of AutoAttack by itself, and points that it leaves."""
    started = time.perf_counter()
    adversary = pyautoattack.AutoAttack(model, norm="Linf", eps=eps, seed=0, version="standard")
    adversarial, _ = adversary.run_standard_evaluation(images, labels, batch_size=BATCH_SIZE)
    with torch.no_grad():
        left = int((model(adversarial).argmax(dim=1) == labels).sum())
    return time.perf_counter() - started, left


def harness_time(model: nn.Module, images: Tensor, labels: Tensor, eps: float, state: Path) -> tuple[float, int]:
    """Seconds of ``evaluate`` with progress on disk, and points that it leaves."""
    started = time.perf_counter()
    record = evaluate(model, (images, labels), ThreatModel("Linf", eps), batch_size=BATCH_SIZE, state=state)
    return time.perf_counter() - started, record.robust_correct


def main() -> None:
    """Parse arguments, run, print one JSON line an eps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="24 images, one round")
    parser.add_argument("--eps", type=float, nargs="+", default=[0.1, 0.3])
    arguments = parser.parse_args()
    n, rounds = (24, 1) if arguments.quick else (128, 3)
    model, images, labels = trained()
    images, labels = images[:n], labels[:n]
    with tempfile.TemporaryDirectory() as folder:
        for eps in arguments.eps:
            own, ours, left = [], [], set()
            for number in range(rounds):
                for seconds, (taken, robust) in (
                    (own, own_time(model, images, labels, eps)),
                    (ours, harness_time(model, images, labels, eps, Path(folder) / f"{eps}-{number}.json")),
                ):
                    seconds.append(taken)
                    left.add(robust)
            added = statistics.median(ours) / statistics.median(own) - 1
            print(
                json.dumps(
                    {
                        "eps": eps,
                        "n": n,
                        "robust_correct": sorted(left),
                        "autoattack_s": round(statistics.median(own), 3),
                        "evaluate_s": round(statistics.median(ours), 3),
                        "added_percent": round(100 * added, 2),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
