"""Does stacking help? The neurons of one certified convex head are the features of the next.

    python -m benchmarks.layerwise            standard backbone of the Fashion-MNIST suite, 4,000 head images
    python -m benchmarks.layerwise --quick    two layers on a barely trained backbone

Greedy layers, each with a certificate of its own in its own feature ball:

    z_0 = phi(x),   z_{k+1} = ( s(u_1'z_k), ..., s(u_m'z_k) ),   head_k fitted on z_k at the radius and reg that do best
                                                                 under PGD through all layers on validation images

The neurons of head k are kept, its readout is dropped when the next layer is put on. The certificate of layer k is one
in z_k, not in pixels; what counts is the accuracy under attack through everything, on images that no choice has seen.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coefficients import Plan as Data
from benchmarks.coefficients import Setting, prepare
from benchmarks.common import COLOURS, Column, Record, arguments, load_average, publish
from benchmarks.fashion_mnist_backbones import Schedule
from convex_head import ConvexRobustHead, ThreatModel, load_dataset, replace_head
from convex_head.baselines.pgd import pgd_accuracy
from convex_head.errors import ConvergenceWarning

NAME = "layerwise"


@dataclass(frozen=True)
class Plan:
    """Layers, candidates of radius and reg for each, pixel eps of the choice and of the attack, test points."""

    data: Data
    layers: int = 3
    radii: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    regs: tuple[float, ...] = (0.1, 0.03)
    eps: tuple[str, ...] = ("4/255", "8/255")
    tol: float = 0.05


FULL = Plan(Data())
QUICK = Plan(
    Data(images=400, test=100, schedule=Schedule(1, 1, 2000)), layers=2, radii=(0.5,), regs=(0.1,), eps=("4/255",)
)


class Neurons(nn.Module):
    """The hidden layer of a fitted polynomial head: features (n, d) to activations (n, m)."""

    def __init__(self, head: ConvexRobustHead):
        super().__init__()
        self.coefficients = head.coefficients
        self.register_buffer("directions", head.network().directions.float())
        self.register_buffer("mean", head.mean.clone())
        self.register_buffer("scale", head.scale.clone())

    def forward(self, features: Tensor) -> Tensor:
        a, b, c = self.coefficients
        t = ((features - self.mean) / self.scale) @ self.directions.mT
        return (a * t + b) * t + c


@dataclass(frozen=True)
class Fitted:
    """A candidate of one layer."""

    record: Record
    head: ConvexRobustHead
    model: nn.Module


def fit_layer(plan: Plan, at: Setting, stack: Sequence[nn.Module], layer: int) -> list[Fitted]:
    """All candidates of a layer on top of ``stack``."""
    below = nn.Sequential(*stack)
    z = below(at.features)
    threat = ThreatModel("Linf", plan.eps[-1])
    found = []
    for reg in plan.regs:
        start = None
        for radius in plan.radii:
            head = ConvexRobustHead(z.shape[1], 10, radius=radius, reg=reg)
            began = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                head.fit(z[at.rest], at.labels[at.rest], tol=plan.tol, max_seconds=60, progress=False, start=start)
            start, result = head.network(), head.result_
            if result is None:
                raise RuntimeError("fit returned without a result")
            seconds = time.process_time() - began
            model = replace_head(at.model, nn.Sequential(*stack, head), at="fc")
            clean, robust = pgd_accuracy(model, at.images[at.held_out], at.labels[at.held_out], threat)
            record = {
                "layer": layer,
                "features": z.shape[1],
                "radius": radius,
                "reg": reg,
                "gap": result.gap,
                "neurons": result.neurons,
                "seconds": seconds,
                "validation_clean": clean,
                "validation_robust": robust,
                "chosen": False,
                "load_average": load_average(),
            }
            found.append(Fitted(record, head, model))
    return found


def measure(plan: Plan) -> list[Record]:
    """Layer after layer; the chosen head of each is attacked on test images."""
    at = prepare(plan.data)
    test = load_dataset("fashion_mnist", split="test", n=plan.data.test, seed=0)
    records: list[Record] = []
    stack: list[nn.Module] = []
    for layer in range(1, plan.layers + 1):
        tried = fit_layer(plan, at, stack, layer)
        chosen = max(tried, key=lambda one: (one.record["validation_robust"], one.record["validation_clean"]))
        chosen.record["chosen"] = True
        for eps in plan.eps:
            clean, robust = pgd_accuracy(chosen.model, test.images, test.labels, ThreatModel("Linf", eps), steps=50)
            chosen.record.update({"test_clean": clean, f"test_{eps}": robust})
        records += [one.record for one in tried]
        stack.append(Neurons(chosen.head))
    return records


def verdict(plan: Plan, rows: Sequence[Record]) -> list[str]:
    """What each further layer adds on test images."""
    lines = []
    for row in rows[1:]:
        gains = ", ".join(f"{100 * (row[f'test_{eps}'] - rows[0][f'test_{eps}']):+.1f} at {eps}" for eps in plan.eps)
        clean = 100 * (row["test_clean"] - rows[0]["test_clean"])
        lines.append(f"{row['layer']} layers against one, test points: {clean:+.1f} clean, {gains} (PGD, 50 steps).")
    return lines


def draw(pyplot: Any, plan: Plan, rows: Sequence[Record]) -> None:
    """Clean and attacked accuracy against the number of layers."""
    layers = [row["layer"] for row in rows]
    pyplot.plot(layers, [100 * row["test_clean"] for row in rows], "o-", color="black", label="clean")
    for colour, eps in zip(COLOURS, plan.eps, strict=False):
        pyplot.plot(layers, [100 * row[f"test_{eps}"] for row in rows], "o-", color=colour, label=f"PGD, {eps}")
    pyplot.xticks(layers)
    pyplot.xlabel("convex layers")
    pyplot.ylabel("test accuracy, %")
    pyplot.title("Greedy stacking of certified convex layers")
    pyplot.legend()


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    options = arguments(NAME, __doc__, argv)
    plan = QUICK if options.quick else FULL
    records = measure(plan)
    rows = [record for record in records if record["chosen"]]

    def share(value: float) -> str:
        return f"{100 * value:.1f}"

    columns = [
        Column("layer", "layers"),
        Column("features", "features in"),
        Column("radius", "radius", "{:g}".format),
        Column("reg", "reg", "{:g}".format),
        Column("neurons", "neurons"),
        Column("gap", "gap", "{:.3f}".format),
        Column("validation_robust", "PGD, validation, %", share),
        Column("test_clean", "clean, test, %", share),
        *(Column(f"test_{eps}", f"PGD {eps}, test, %", share) for eps in plan.eps),
    ]
    title = "Layer-wise stacking on Fashion-MNIST features"
    publish(options, title, records, rows, columns, lambda pyplot: draw(pyplot, plan, rows), verdict(plan, rows))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
