"""Which polynomial should stand for the ReLU? A sweep of s(t) = a t^2 + b t + c.

    python -m benchmarks.coefficients            standard backbone of the Fashion-MNIST suite, 4,000 head images
    python -m benchmarks.coefficients --quick    three polynomials on a barely trained backbone

The seed's (0.09, 0.5, 0.47) is the least-squares fit to the ReLU on [-5, 5]; on [-L, L] that fit is

    a = 15 / (32 L),   b = 1/2,   c = 3 L / 32.

Swept: fits on other intervals, the fit to the arguments that the neurons really see (quantiles of u'z over the training
features, u the fitted directions), no linear term, no constant, and a nearly linear one. Scaling (a, b, c) by q is
scaling reg by 1/q, so every polynomial chooses reg on validation images; the radius is the same for all.

Feature-space accuracies are exact, on test images; pixel accuracies are those of a short PGD on validation images.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import COLOURS, Column, Record, arguments, load_average, publish
from benchmarks.fashion_mnist_backbones import Schedule, backbone, head_data
from convex_head import ConvexRobustHead, ThreatModel, load_dataset, replace_head
from convex_head.baselines.pgd import pgd_accuracy
from convex_head.errors import ConvergenceWarning
from convex_head.features import extract_features

NAME = "coefficients"
SEED = (0.09, 0.5, 0.47)


@dataclass(frozen=True)
class Plan:
    """What is run: head images, test points, interval ends, regs, radius, and radii of the exact accuracies."""

    images: int = 4000
    test: int = 2000
    intervals: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 8.0)
    regs: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01)
    radius: float = 1.0
    radii: tuple[float, ...] = (0.5, 1.0)
    eps: str = "4/255"
    tol: float = 0.03
    others: bool = True
    schedule: Schedule | None = None


QUICK = Plan(
    images=400, test=200, intervals=(2.0, 5.0), regs=(0.3, 0.1), tol=0.1, others=False, schedule=Schedule(1, 1, 2000)
)


def fit_on_interval(end: float) -> tuple[float, float, float]:
    """The least-squares polynomial of the ReLU on [-end, end]."""
    return 15 / (32 * end), 0.5, 3 * end / 32


def fit_to(arguments: Tensor) -> tuple[float, float, float]:
    """The least-squares polynomial of the ReLU over these arguments, a sample of any shape."""
    t = arguments.double().flatten()
    design = torch.stack([t.square(), t, torch.ones_like(t)], dim=1)
    a, b, c = torch.linalg.lstsq(design, t.relu()[:, None]).solution.flatten().tolist()
    return a, b, c


@dataclass(frozen=True)
class Setting:
    """Frozen network, head images with their features, rows of the split, test features."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    features: Tensor
    rest: Tensor
    held_out: Tensor
    test: Tensor
    test_labels: Tensor


def prepare(plan: Plan) -> Setting:
    """The backbone from the suite's folder, or trained now."""
    folder = Path("runs") / ("fashion_mnist-quick" if plan.schedule else "fashion_mnist") / "backbones"
    folder.mkdir(parents=True, exist_ok=True)
    model, _ = backbone("standard", 0, folder, schedule=plan.schedule)
    data = head_data(0, plan.images)
    test = load_dataset("fashion_mnist", split="test", n=plan.test, seed=0)
    probe = replace_head(model, nn.Identity(), at="fc").backbone
    features, outside = extract_features(probe, data.images), extract_features(probe, test.images)
    return Setting(model, data.images, data.labels, features, data.rest, data.held_out, outside, test.labels)


def measure(plan: Plan, at: Setting, name: str, coefficients: tuple[float, float, float]) -> list[Record]:
    """One record a reg."""
    records = []
    threat = ThreatModel("Linf", plan.eps)
    for reg in plan.regs:
        head = ConvexRobustHead(at.features.shape[1], 10, radius=plan.radius, reg=reg, coefficients=coefficients)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            head.fit(at.features[at.rest], at.labels[at.rest], tol=plan.tol, max_seconds=60, progress=False)
        result = head.result_
        if result is None:
            raise RuntimeError("fit returned without a result")
        model = replace_head(at.model, head, at="fc")
        clean, robust = pgd_accuracy(model, at.images[at.held_out], at.labels[at.held_out], threat)
        right = head(at.test).argmax(1) == at.test_labels
        exact = {
            f"exact_{radius:g}": float((head.worst_case_margin(at.test, at.test_labels, radius) > 0).double().mean())
            for radius in plan.radii
        }
        a, b, c = coefficients
        records.append(
            {"name": name, "a": a, "b": b, "c": c, "radius": plan.radius, "reg": reg, "gap": result.gap}
            | {"neurons": result.neurons, "seconds": result.seconds, "test_clean": float(right.double().mean())}
            | {"validation_clean": clean, "validation_robust": robust, **exact, "load_average": load_average()}
        )
    return records


def candidates(plan: Plan, at: Setting) -> dict[str, tuple[float, float, float]]:
    """Name -> coefficients."""
    found = {f"ReLU on [-{end:g}, {end:g}]": fit_on_interval(end) for end in plan.intervals}
    head = ConvexRobustHead(at.features.shape[1], 10, radius=plan.radius, reg=plan.regs[1], coefficients=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        head.fit(at.features[at.rest], at.labels[at.rest], tol=plan.tol, max_seconds=60, progress=False)
    seen = head.standardised(at.features[at.rest]) @ head.network().directions.mT
    found["ReLU on the arguments seen"] = fit_to(seen)
    if plan.others:
        a, b, c = SEED
        found |= {"no linear term": (a, 0.0, c), "no constant": (a, b, 0.0), "nearly linear": (0.005, b, c)}
    return found


def best(records: Sequence[Record]) -> list[Record]:
    """For every polynomial the reg of the best validation accuracy under attack."""
    names = dict.fromkeys(record["name"] for record in records)
    choose = {name: [record for record in records if record["name"] == name] for name in names}
    return [
        max(group, key=lambda one: (one["validation_robust"], one["validation_clean"])) for group in choose.values()
    ]


def draw(pyplot: Any, rows: Sequence[Record]) -> None:
    """Accuracies of every polynomial at its own reg."""
    places = range(len(rows))
    shown = [("test_clean", "clean, test"), ("validation_robust", "PGD, validation")]
    shown += [(key, f"feature ball {key[6:]}, exact, test") for key in rows[0] if key.startswith("exact_")]
    for colour, (key, label) in zip(COLOURS, shown, strict=False):
        pyplot.plot(places, [100 * row[key] for row in rows], "o", color=colour, label=label)
    pyplot.xticks(list(places), [f"{row['name']}\n{row['neurons']} neurons" for row in rows], rotation=60, fontsize=7)
    pyplot.ylabel("accuracy, %")
    pyplot.title("Polynomials in place of the ReLU, each with its best reg")
    pyplot.legend(loc="upper left", bbox_to_anchor=(1, 1))


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    options = arguments(NAME, __doc__, argv)
    plan = QUICK if options.quick else Plan()
    at = prepare(plan)
    records = [row for name, triple in candidates(plan, at).items() for row in measure(plan, at, name, triple)]
    rows = best(records)

    def share(value: float) -> str:
        return f"{100 * value:.1f}"

    columns = [
        Column("name", "polynomial"),
        *(Column(key, key, "{:.3f}".format) for key in ("a", "b", "c")),
        Column("reg", "reg", "{:g}".format),
        Column("test_clean", "clean, %", share),
        *(Column(f"exact_{radius:g}", f"ball {radius:g}, exact, %", share) for radius in plan.radii),
        Column("validation_robust", f"PGD {plan.eps}, validation, %", share),
        Column("neurons", "neurons"),
        Column("seconds", "fit, s", "{:.1f}".format),
        Column("gap", "gap", "{:.3f}".format),
    ]
    publish(options, "Coefficients of the polynomial", records, rows, columns, lambda pyplot: draw(pyplot, rows))


if __name__ == "__main__":
    main()
