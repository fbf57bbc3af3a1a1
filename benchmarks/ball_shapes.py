"""Which set of features should a head be trained against? A round ball, and four ellipsoids of the same reach.

    python -m benchmarks.ball_shapes            SAM and standard backbone of the Fashion-MNIST suite, seed 0
    python -m benchmarks.ball_shapes --quick    two shapes on a barely trained backbone

All shapes are balls behind a whitening matrix, scaled so that radius 1 is how far Linf 8/255 moves features in a
direction drawn at random, on average (convex_head/displacement.py). Behind the matrix these have one covariance:

    round        none: features of deviation 1
    noise        of images with +-eps in every pixel, signs drawn at random; no gradients are needed
    attack       of images that were attacked on the network's own head
    directions   of images that ascend a direction of feature space drawn at random, sixteen for every feature and one
                 step along each; what ``robustify`` begins with
    few          of 2,000 such images, three steps along each

In each, a convex head and a linear one (hinge, exact worst cases too) are fitted; the radius is the one that does best
under PGD at 8/255 on validation images. Test accuracies are those of 50 steps of PGD on the margin, for both heads
alike.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import COLOURS, Column, Record, arguments, load_average, publish
from benchmarks.fashion_mnist_backbones import HELD_OUT, THREAT, Schedule, backbone, head_data
from benchmarks.fashion_mnist_heads import Units, hinge_in_ball
from convex_head import ConvexRobustHead, ThreatModel, load_dataset, replace_head
from convex_head.baselines.pgd import pgd_accuracy
from convex_head.displacement import MovedImages, attacked_images
from convex_head.errors import ConvergenceWarning
from convex_head.features import extract_features

NAME = "ball_shapes"
_EPS = ("4/255", "8/255")
_CUT = "pool"
_DECAY = 1e-4
_FEW = 2000


@dataclass(frozen=True)
class Plan:
    """Backbones, shapes, radii in units of the reach, reg of the convex head, head images, test points."""

    backbones: tuple[str, ...] = ("sam", "standard")
    shapes: tuple[str, ...] = ("round", "noise", "attack", "few", "directions")
    radii: tuple[float, ...] = (0.5, 1.0, 2.0)
    reg: float = 0.01
    images: int = HELD_OUT
    test: int = 2000
    tol: float = 0.1
    schedule: Schedule | None = None


FULL = Plan()
QUICK = Plan(
    backbones=("standard",),
    shapes=("round", "directions"),
    radii=(1.0,),
    reg=0.1,
    images=500,
    test=100,
    schedule=Schedule(1, 1, 2000),
)


def displacements(shape: str, model: nn.Module, sample: MovedImages, labels: Tensor) -> Tensor | None:
    """(N, p), standardised, of the sample's images; None for the round ball."""
    if shape == "round":
        return None
    if shape == "noise":
        signs = torch.randint(0, 2, sample.images.shape, generator=torch.Generator().manual_seed(1)) * 2.0 - 1
        return sample.shift(THREAT.project(sample.images, sample.images + THREAT.eps * signs))
    if shape == "attack":
        return sample.shift(attacked_images(model, sample.images, labels, THREAT))
    return (sample.ascended(steps=3, draws=_FEW) if shape == "few" else sample.ascended())[1]


def measure(plan: Plan, name: str) -> list[Record]:
    """One record a shape, head and radius of a backbone."""
    folder = Path("runs") / ("fashion_mnist-quick" if plan.schedule else "fashion_mnist") / "backbones"
    folder.mkdir(parents=True, exist_ok=True)
    model, _ = backbone(name, 0, folder, schedule=plan.schedule)
    data = head_data(0, plan.images)
    test = load_dataset("fashion_mnist", split="test", n=plan.test, seed=0)
    probe = replace_head(model, nn.Identity(), at=_CUT).backbone
    features = extract_features(probe, data.images)

    def attacked(head: nn.Module) -> Record:
        spliced = replace_head(model, head, at=_CUT)
        clean, robust = pgd_accuracy(spliced, data.images[data.held_out], data.labels[data.held_out], THREAT)
        found: Record = {"validation_clean": clean, "validation_robust": robust}
        for eps in _EPS:
            found["test_clean"], found[f"test_{eps}"] = pgd_accuracy(
                spliced, test.images, test.labels, ThreatModel("Linf", eps), steps=50
            )
        return found

    records = []
    for shape in plan.shapes:
        sample = MovedImages(probe, data.images, features, THREAT)
        # Attacks are on labels as the network gives them: the sample has none.
        predicted = torch.cat([model(part).argmax(1) for part in sample.images.split(256)])
        units = Units.of(sample, displacements(shape, model, sample, predicted))
        x, y = features[data.rest], data.labels[data.rest]
        heads: dict[str, Callable[[float], tuple[nn.Module, Record]]] = {
            "convex": partial(_convex, plan, units, x, y),
            "linear": partial(_linear, units, x, y),
        }
        for head, fit in heads.items():
            tried = []
            for radius in plan.radii:
                began = time.process_time()
                fitted, card = fit(radius)
                seconds = time.process_time() - began
                row = {"backbone": name, "shape": shape, "head": head, "radius": radius, "seconds": seconds, **card}
                row |= {**attacked(fitted), "chosen": False, "load_average": load_average()}
                tried.append(row)
            max(tried, key=lambda row: (row["validation_robust"], row["validation_clean"]))["chosen"] = True
            records += tried
    return records


def _linear(units: Units, x: Tensor, y: Tensor, radius: float) -> tuple[nn.Module, Record]:
    return units.on_features(hinge_in_ball(units.of_features(x), y, radius, _DECAY)), {}


def _convex(plan: Plan, units: Units, x: Tensor, y: Tensor, radius: float) -> tuple[nn.Module, Record]:
    head = ConvexRobustHead(x.shape[1], 10, radius=radius, reg=plan.reg, whitening=units.matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        head.fit(x, y, tol=plan.tol, max_seconds=60, progress=False)
    result = head.result_
    if result is None:
        raise RuntimeError("fit returned without a result")
    return head, {"reg": plan.reg, "gap": result.gap, "neurons": result.neurons}


def verdict(rows: Sequence[Record]) -> list[str]:
    """What each shape adds to the round ball, on test images."""
    round_ones = {(row["backbone"], row["head"]): row for row in rows if row["shape"] == "round"}
    lines = []
    for row in rows:
        if row["shape"] != "round":
            base = round_ones[row["backbone"], row["head"]]
            gains = ", ".join(f"{100 * (row[f'test_{eps}'] - base[f'test_{eps}']):+.1f} at {eps}" for eps in _EPS)
            clean = 100 * (row["test_clean"] - base["test_clean"])
            which = f"{row['backbone']}, {row['head']} head: {row['shape']} against round"
            lines.append(f"{which} {clean:+.1f} clean, {gains} points.")
    return lines


def draw(pyplot: Any, records: Sequence[Record]) -> None:
    """Robust against clean test accuracy, a line of radii for each shape and head; a panel a backbone."""
    names = list(dict.fromkeys(row["backbone"] for row in records))
    figure = pyplot.gcf()
    figure.set_size_inches(5.5 * len(names), 4.5)
    for panel, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), panel)
        for colour, shape in zip(COLOURS, dict.fromkeys(row["shape"] for row in records), strict=False):
            for head, style in (("convex", "o-"), ("linear", "v:")):
                here = [r for r in records if (r["backbone"], r["shape"], r["head"]) == (name, shape, head)]
                clean, robust = ([100 * r[key] for r in here] for key in ("test_clean", f"test_{_EPS[-1]}"))
                axes.plot(clean, robust, style, color=colour, markersize=5, label=f"{shape}, {head}")
        axes.set_xlabel("clean test accuracy, %")
        axes.set_ylabel(f"test accuracy under PGD, {_EPS[-1]}, %")
        axes.set_title(f"{name} backbone")
    figure.axes[0].legend(fontsize=8)


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    options = arguments(NAME, __doc__, argv)
    plan = QUICK if options.quick else FULL
    records = [row for name in plan.backbones for row in measure(plan, name)]
    rows = [row for row in records if row["chosen"]]

    def share(value: float) -> str:
        return f"{100 * value:.1f}"

    columns = [
        Column("backbone", "backbone"),
        Column("shape", "shape"),
        Column("head", "head"),
        Column("radius", "radius", "{:g}".format),
        Column("gap", "gap", "{:.3f}".format),
        Column("validation_clean", "clean, validation, %", share),
        Column("validation_robust", "PGD 8/255, validation, %", share),
        Column("test_clean", "clean, test, %", share),
        *(Column(f"test_{eps}", f"PGD {eps}, test, %", share) for eps in _EPS),
        Column("seconds", "CPU s", "{:.0f}".format),
    ]
    title = "Shapes of the feature ball, Fashion-MNIST, the radius that is best on validation images"
    publish(options, title, records, rows, columns, lambda pyplot: draw(pyplot, records), verdict(rows))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
