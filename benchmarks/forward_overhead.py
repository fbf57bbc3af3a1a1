"""What the head costs in a forward pass: a spliced network with ConvexRobustHead against the same with nn.Linear.

    python -m benchmarks.forward_overhead            ResNet-18 (64x64) and PreAct ResNet-18 (32x32), batch 64
    python -m benchmarks.forward_overhead --quick    a small PreAct ResNet, few rounds

Both networks run in turns, in an order that alternates, so that a slow moment of the machine meets both; the overhead
is the median over rounds of the ratio of two neighbouring passes. Random weights: they do not change the cost.
Aim: at most 1.05.
"""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Column, Record, arguments, load_average, publish, synthetic_features
from convex_head import ConvexRobustHead
from convex_head.baselines.preact_resnet import preact_resnet18, preact_resnet_small
from convex_head.errors import ConvergenceWarning
from convex_head.splice import replace_head

NAME = "forward_overhead"
CLASSES, BATCH = 10, 64


def networks(quick: bool) -> dict[str, tuple[nn.Module, int, Tensor]]:
    """Backbones by name, each with its number of features and a batch of images."""
    torch.manual_seed(0)
    if quick:
        return {"PreAct ResNet, small": (preact_resnet_small(), 64, torch.rand(BATCH, 1, 28, 28))}
    from torchvision.models import resnet18  # an extra that --quick does not need

    return {
        "ResNet-18": (resnet18(weights=None), 512, torch.rand(BATCH, 3, 64, 64)),
        "PreAct ResNet-18": (preact_resnet18(), 512, torch.rand(BATCH, 3, 32, 32)),
    }


def seconds_of(model: nn.Module, images: Tensor) -> float:
    """Wall clock of one forward pass."""
    started = time.perf_counter()
    model(images)
    return time.perf_counter() - started


@torch.inference_mode()
def in_turns(first: nn.Module, second: nn.Module, images: Tensor, rounds: int) -> list[tuple[float, float]]:
    """Seconds of both, round by round."""
    for model in (first, second):
        model(images)
    pairs = []
    for number in range(rounds):
        if number % 2:
            late = seconds_of(second, images)
            pairs.append((seconds_of(first, images), late))
        else:
            early = seconds_of(first, images)
            pairs.append((early, seconds_of(second, images)))
    return pairs


def fitted_head(width: int) -> ConvexRobustHead:
    """A head with as many neurons as a fit on ten overlapping clusters needs."""
    features, labels = synthetic_features(1000, width, CLASSES, seed=0)
    head = ConvexRobustHead(width, CLASSES, radius=0.5, reg=1e-2)
    # The cost depends on the neurons, which are there long before the gap is closed.
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        return head.fit(features, labels, tol=0.1, max_seconds=3.0, progress=False)


def measure(name: str, net: nn.Module, width: int, images: Tensor, rounds: int) -> list[Record]:
    """One record a round."""
    head = fitted_head(width)
    linear = replace_head(net, nn.Linear(width, CLASSES), example_input=images[:1])
    convex = replace_head(net, head, example_input=images[:1])
    load = load_average()
    return [
        {
            "network": name,
            "image_side": images.shape[-1],
            "batch": BATCH,
            "neurons": head.directions.shape[0],
            "round": number,
            "linear_ms": 1e3 * linear_seconds,
            "convex_ms": 1e3 * convex_seconds,
            "threads": torch.get_num_threads(),
            "load_average": load,
        }
        for number, (linear_seconds, convex_seconds) in enumerate(in_turns(linear, convex, images, rounds))
    ]


def summary(records: list[Record]) -> Record:
    """Medians over the rounds of one network."""
    ratios = [record["convex_ms"] / record["linear_ms"] for record in records]
    return {
        **records[0],
        "linear_ms": statistics.median(record["linear_ms"] for record in records),
        "convex_ms": statistics.median(record["convex_ms"] for record in records),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "rounds": len(records),
    }


def draw(pyplot: Any, rows: list[Record]) -> None:
    """Distribution of the ratio over the rounds."""
    pyplot.boxplot([row["ratios"] for row in rows], orientation="horizontal", tick_labels=[r["network"] for r in rows])
    pyplot.axvline(1.05, color="0.4", linestyle="--", linewidth=1)
    pyplot.annotate("aim", (1.05, 0.95), (3, 0), ("data", "axes fraction"), "offset points")
    pyplot.xlabel("forward pass, ConvexRobustHead / nn.Linear")
    pyplot.title(f"Cost of the head, batch {BATCH}")


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    options = arguments(NAME, __doc__, argv)
    records: list[Record] = []
    rows = []
    for name, (net, width, images) in networks(options.quick).items():
        found = measure(name, net, width, images, 5 if options.quick else 31)
        records += found
        rows.append(summary(found))
    columns = [
        Column("network", "network"),
        Column("image_side", "image side"),
        Column("neurons", "neurons"),
        Column("linear_ms", "linear, ms", "{:.1f}".format),
        Column("convex_ms", "convex, ms", "{:.1f}".format),
        Column("ratio", "ratio", "{:.3f}".format),
    ]
    title = f"Forward pass through the spliced model, batch {BATCH}"
    publish(options, title, records, rows, columns, lambda pyplot: draw(pyplot, rows))


if __name__ == "__main__":
    main()
