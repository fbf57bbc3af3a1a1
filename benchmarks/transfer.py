"""A head swapped in an existing pipeline: a CIFAR-10 network, frozen, classifies Fashion-MNIST.

    python -m benchmarks.transfer            2,000 training images, 50 test points
    python -m benchmarks.transfer --quick    100 training images, 6 test points, apgd-ce with 5 steps

The backbone is the CIFAR-10 ResNet-18 that pyautoattack carries (standard training, 512 features); its linear layer is
replaced. Images are resized to 32x32 and repeated over three channels inside the model, so that the threat is to the
28x28 pixels. A pass costs a thousand times that of the Fashion-MNIST suite's backbone, so the attacks are AutoAttack's
apgd-ce and apgd-t and, for the convex head, the one that knows it. That is less than AutoAttack, and few points.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from benchmarks.common import COLOURS, Column, Record, arguments, load_average, publish
from convex_head import ConvexRobustHead, ThreatModel, evaluate, load_dataset, replace_head
from convex_head.attacks.registry import AttackLike
from convex_head.baselines import MLPHead, linear_head, train
from convex_head.errors import ConvergenceWarning
from convex_head.features import extract_features

NAME = "transfer"
CUT = "net.linear"


@dataclass(frozen=True)
class Plan:
    """Training images, test points, attacks, eps, and settings of the convex head; all heads are fitted on features."""

    images: int = 2000
    n: int = 50
    eps: tuple[str, ...] = ("1/255", "2/255")
    attacks: tuple[AttackLike, ...] = ("apgd-ce", "apgd-t")
    heads: tuple[str, ...] = ("linear", "mlp", "convex")
    radius: float = 1.0
    reg: float = 0.1
    tol: float = 0.03
    max_seconds: float = 120.0
    adaptive: bool = True


QUICK = Plan(
    images=100,
    n=6,
    eps=("1/255",),
    attacks=("torchattacks:PGD(steps=5)",),
    heads=("linear", "convex"),
    adaptive=False,
    tol=0.3,
    max_seconds=5.0,
)


class Pipeline(nn.Module):
    """Grey images (n, 1, h, w) in [0, 1] to the logits of a network for 32x32 colour images."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        large = interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
        return self.net(large.expand(-1, 3, -1, -1))


def pretrained() -> nn.Module:
    """pyautoattack's ResNet-18 with its weights, in evaluation mode."""
    module = import_module("pyautoattack.examples.resnet")
    net = module.ResNet18()
    weights = Path(module.__file__).with_name("model_test.pt")
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False)


def fit(plan: Plan, head: str, features: Tensor, labels: Tensor) -> nn.Module:
    """A head on the features (n, d)."""
    if head == "linear":
        return linear_head(features, labels, 10, reg=1e-2)
    if head == "mlp":
        torch.manual_seed(0)
        module = MLPHead(features.shape[1], 10, features=features)
        train(module, features, labels, epochs=20, lr=0.02)
        return module.eval().requires_grad_(False)
    convex = ConvexRobustHead(features.shape[1], 10, radius=plan.radius, reg=plan.reg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return convex.fit(features, labels, tol=plan.tol, max_seconds=plan.max_seconds, progress=False)


def measure(plan: Plan) -> list[Record]:
    """One record a head and eps."""
    base = Pipeline(pretrained())
    data = load_dataset("fashion_mnist", split="train", n=plan.images, seed=0)
    test = load_dataset("fashion_mnist", split="test", n=plan.n, seed=0)
    began = process_time()
    features = extract_features(replace_head(base, nn.Identity(), at=CUT).backbone, data.images)
    extraction, records = process_time() - began, []
    for name in plan.heads:
        began = process_time()
        head = fit(plan, name, features, data.labels)
        seconds = process_time() - began
        model = replace_head(base, head, at=CUT)
        for eps in plan.eps:
            threat = ThreatModel("Linf", eps)
            found = evaluate(
                model, test, threat, plan.attacks, batch_size=plan.n, progress=False, adaptive=plan.adaptive
            )
            result = getattr(head, "result_", None)
            low, high = found.interval
            records.append(
                {
                    "head": name,
                    "eps": eps,
                    "n": found.n,
                    "images": plan.images,
                    "clean": found.clean_accuracy,
                    "robust": found.robust_accuracy,
                    "low": low,
                    "high": high,
                    "attacks": ", ".join(found.attacks),
                    "flags": list(found.flags),
                    "feature_seconds": extraction,
                    "head_seconds": seconds,
                    "gap": None if result is None else result.gap,
                    "load_average": load_average(),
                }
            )
    return records


def draw(pyplot: Any, records: Sequence[Record]) -> None:
    """Clean and robust accuracy of every head."""
    names = list(dict.fromkeys(record["head"] for record in records))
    every = list(dict.fromkeys(record["eps"] for record in records))
    for number, eps in enumerate(every):
        rows = [record for record in records if record["eps"] == eps]
        if number == 0:
            pyplot.plot(names, [100 * row["clean"] for row in rows], "o", color="black", label="clean")
        middle = [100 * row["robust"] for row in rows]
        ends = [
            [100 * (row["robust"] - row["low"]) for row in rows],
            [100 * (row["high"] - row["robust"]) for row in rows],
        ]
        pyplot.errorbar(names, middle, ends, fmt="s", color=COLOURS[number], capsize=2, label=f"attacked, {eps}")
    pyplot.ylabel("test accuracy, %")
    pyplot.title("CIFAR-10 ResNet-18, frozen, on Fashion-MNIST")
    pyplot.legend()


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument("--n", type=int, help="test points")
    extra.add_argument("--images", type=int, help="training images")
    extra.add_argument("--heads", nargs="+", choices=Plan.heads)
    extra.add_argument("--eps", nargs="+")
    extra.add_argument("--attacks", nargs="+", help="names of attacks")
    options = arguments(NAME, __doc__, argv, extra=extra)
    plan = QUICK if options.quick else Plan()
    given = {key: getattr(options, key) for key in ("n", "images", "heads", "eps", "attacks")}
    plan = replace(plan, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None})
    records = measure(plan)

    def share(value: float) -> str:
        return f"{100 * value:.1f}"

    columns = [
        Column("head", "head"),
        Column("eps", "eps"),
        Column("n", "n"),
        Column("clean", "clean, %", share),
        Column("robust", "robust, %", share),
        Column("low", "from", share),
        Column("high", "to", share),
        Column("head_seconds", "head, CPU s", "{:.1f}".format),
        Column("feature_seconds", "features, CPU s", "{:.1f}".format),
        Column("attacks", "attacks"),
    ]
    title = "Fashion-MNIST through a frozen CIFAR-10 ResNet-18"
    publish(options, title, records, records, columns, lambda pyplot: draw(pyplot, records))


if __name__ == "__main__":
    main()
