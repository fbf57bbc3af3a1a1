"""Does adversarial convex training raise l-infinity robust test accuracy over plain convex training?

    python -m benchmarks.breast_cancer            20 random splits of sklearn's breast cancer data
    python -m benchmarks.breast_cancer --quick    2 splits, few radii

The first experiment of arXiv 2405.14033. ConvexRobustHead is fitted on 455 standardised examples, without adversary
(radius 0) and with l2 balls of growing radius, each to a certified gap of 1 %; 114 test examples are attacked.

Threat: |e|_inf <= eps in standardised units, deviations of the training data. The harness wants images in [0, 1], so
an image is 1/2 + z / (2 S) with S so large that no attack meets the border, and its eps is eps / (2 S).

    attacked   right under torchattacks' PGD and AutoAttack's APGD: an upper bound of the true robust accuracy; on the
               first splits the whole of AutoAttack, to see what the short list misses
    certified  right by  min |e|_inf <= eps of f(z + e) >= f - eps |g|_1 + d eps^2 min(0, lowest eigenvalue) / 2
               or by the exact l2 worst case in the ball of radius eps sqrt(d) around the box: a lower bound

and for l2 balls the exact accuracy. Intervals are over splits, which overlap: the variance is corrected as in
C. Nadeau and Y. Bengio, "Inference for the generalization error", Machine Learning 52 (2003).
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import t as student
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks.common import COLOURS, Column, Record, arguments, load_average, publish
from convex_head import ConvexRobustHead
from convex_head.console import messages, progress_bars
from convex_head.errors import ConvergenceWarning
from convex_head.evaluate import evaluate
from convex_head.records import EvalRecord
from convex_head.threat import ThreatModel

NAME = "breast_cancer"
REG = 1e-2
ATTACKS = ("torchattacks:PGD(steps=50)", "apgd-ce")
STRONGER = ("torchattacks:PGD(steps=50)", "autoattack")


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        splits: random splits; on the first ``checked`` the whole of AutoAttack runs.
        heads: (radius, reg) of the heads. Plain training gets other regularisations too, so that a better choice of
            reg cannot be what the adversary is credited with.
        eps: l-infinity radii.
        l2: radii of the exact l2 accuracies.
    """

    splits: int = 20
    checked: int = 2
    heads: tuple[tuple[float, float], ...] = (
        *((radius, REG) for radius in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)),
        *((0.0, reg) for reg in (3e-3, 3e-2, 1e-1, 3e-1, 1.0)),
    )
    eps: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    l2: tuple[float, ...] = (0.5, 1.0, 2.0)


QUICK = Plan(splits=2, checked=0, heads=((0.0, REG), (0.5, REG), (0.0, 1e-1)), eps=(0.1, 0.3), l2=(0.5,))


@dataclass(frozen=True)
class Split:
    """Standardised training and test examples, float32 (n, 30), labels (n,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @staticmethod
    def draw(seed: int) -> Split:
        """A stratified fifth of the data is for testing; mean and deviation come from the rest."""
        features, labels = load_breast_cancer(return_X_y=True)
        train, test, train_labels, test_labels = train_test_split(
            features, labels, test_size=0.2, stratify=labels, random_state=seed
        )
        mean, scale = train.mean(axis=0), train.std(axis=0)
        to_tensor = [torch.tensor((part - mean) / scale, dtype=torch.float32) for part in (train, test)]
        return Split(to_tensor[0], torch.tensor(train_labels), to_tensor[1], torch.tensor(test_labels))


class AsImages(nn.Module):
    """Images (n, 1, 1, d) in [0, 1] to logits: image = 1/2 + z / (2 span), logits = head(z)."""

    def __init__(self, head: ConvexRobustHead, span: float):
        super().__init__()
        self.head, self.span = head, span

    def forward(self, images: Tensor) -> Tensor:
        return self.head((2 * images.flatten(1) - 1) * self.span)

    def images(self, features: Tensor) -> Tensor:
        """The images of features (n, d)."""
        return (0.5 + features / (2 * self.span))[:, None, None, :]


def attacked(head: ConvexRobustHead, split: Split, eps: float, attacks: Sequence[str]) -> EvalRecord:
    """The harness's record under l-infinity ``eps`` in standardised units."""
    model = AsImages(head, float(split.test.abs().max()) + 2 * eps).eval()
    threat = ThreatModel("Linf", eps / (2 * model.span))
    return evaluate(model, (model.images(split.test), split.test_labels), threat, attacks, progress=False)


def certified(head: ConvexRobustHead, split: Split, eps: float) -> Tensor:
    """(n,) bool: no perturbation of size ``eps`` can change the label; see the module's docstring."""
    network, (a, b, c) = head.network(), head.coefficients
    x, sign = split.test.double(), 2.0 * split.test_labels - 1
    t = x @ network.directions.mT
    margin = sign * (((a * t + b) * t + c) @ network.weights)
    gradient = ((2 * a * t + b) * network.weights) @ network.directions
    hessian = 2 * a * network.directions.mT @ (network.weights[:, None] * network.directions)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    curvature = torch.where(sign > 0, eigenvalues[0], -eigenvalues[-1]).clamp_max(0)
    width = x.shape[1]
    by_curvature = margin - eps * gradient.abs().sum(dim=1) + 0.5 * width * eps**2 * curvature
    ball = head.worst_case_margin(split.test, split.test_labels, eps * width**0.5)
    return (by_curvature > 0) | (ball > 0)


def measure(plan: Plan, seed: int, radius: float, reg: float) -> list[Record]:
    """All records of one head on one split."""
    split = Split.draw(seed)
    # The features are standardised already, so that the head's units are those of the threat.
    head = ConvexRobustHead(split.train.shape[1], 2, radius=radius, reg=reg, standardize=False)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        head.fit(split.train, split.train_labels, tol=1e-2, max_seconds=300, progress=False)
    result = head.result_
    if result is None:
        raise RuntimeError("fit returned without a result")
    right = (head(split.test).argmax(dim=1) == split.test_labels).double().mean()
    common = {
        "split": seed,
        "radius": radius,
        "reg": reg,
        "clean": float(right),
        "status": str(result.status),
        "gap": result.gap,
        "neurons": result.neurons,
        "fit_seconds": result.seconds,
        "load_average": load_average(),
    }
    records = []
    for eps in plan.eps:
        strong = seed < plan.checked
        record = attacked(head, split, eps, STRONGER if strong else ATTACKS)
        added = None
        if strong:
            # What all of AutoAttack broke beyond PGD and its own first component.
            added = sum(
                stage["broken"] for name, stage in record.attacks["autoattack"]["stages"].items() if name != "apgd-ce"
            )
        records.append(
            {
                **common,
                "norm": "Linf",
                "eps": eps,
                "robust": record.robust_accuracy,
                "certified": float(certified(head, split, eps).double().mean()),
                "flags": list(record.flags),
                "autoattack_added": added,
            }
        )
    for eps in plan.l2:
        exact = float((head.worst_case_margin(split.test, split.test_labels, eps) > 0).double().mean())
        records.append({**common, "norm": "L2", "eps": eps, "robust": exact, "certified": exact})
    return records


def interval(values: Sequence[float], test_share: float = 114 / 455) -> tuple[float, float]:
    """Mean over splits and the half width of its 95 % interval (Nadeau and Bengio's variance)."""
    mean, n = statistics.fmean(values), len(values)
    return mean, float(student.ppf(0.975, n - 1)) * statistics.stdev(values) * (1 / n + test_share) ** 0.5


def summaries(records: Sequence[Record]) -> list[Record]:
    """Means over splits, one row for every head, norm and eps; ``gain`` is over radius 0 at the same reg, by split."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in ("norm", "eps", "reg", "radius")), []).append(record)
    rows = []
    for (norm, eps, reg, radius), group in groups.items():
        plain = groups[norm, eps, REG, 0.0]
        robust, robust_half = interval([record["robust"] for record in group])
        clean, clean_half = interval([record["clean"] for record in group])
        gain, gain_half = interval([one["robust"] - other["robust"] for one, other in zip(group, plain, strict=True)])
        added = [record["autoattack_added"] for record in group if record.get("autoattack_added") is not None]
        rows.append(
            {
                "norm": norm,
                "eps": eps,
                "reg": reg,
                "radius": radius,
                "clean": clean,
                "clean_half": clean_half,
                "robust": robust,
                "robust_half": robust_half,
                "certified": statistics.fmean(record["certified"] for record in group),
                "gain": gain,
                "gain_half": gain_half,
                "is_plain": group is plain,
                "by_split": [record["robust"] for record in group],
                "autoattack_added": sum(added) if added else None,
                "unconverged": sum(record["status"] != "converged" for record in group),
            }
        )
    return sorted(rows, key=lambda row: (row["norm"], row["eps"], row["radius"], row["reg"]))


def verdict(rows: Sequence[Record]) -> list[str]:
    """The claim in plain words, at every l-infinity eps."""
    lines = [
        f"Best means the best mean robust test accuracy, for both sides: over the radii at reg {REG:g}, and over the "
        "regs at radius 0. Differences are paired by split, with 95 % intervals."
    ]
    for eps in sorted({row["eps"] for row in rows if row["norm"] == "Linf"}):
        here = [row for row in rows if row["norm"] == "Linf" and row["eps"] == eps]
        plain = max((row for row in here if row["radius"] == 0), key=lambda row: row["robust"])
        robust = max((row for row in here if row["radius"] > 0), key=lambda row: row["robust"])
        pairs = zip(robust["by_split"], plain["by_split"], strict=True)
        gain, half = interval([one - other for one, other in pairs])
        lines.append(
            f"eps {eps:g}: the best adversarial head (radius {robust['radius']:g}) is right under attack on "
            f"{100 * robust['robust']:.1f} % (clean {100 * robust['clean']:.1f} %). That is {_points(robust['gain'])} "
            f"± {100 * robust['gain_half']:.1f} points over the plain program at the same reg, and {_points(gain)} "
            f"± {100 * half:.1f} over the plain program with its best reg {plain['reg']:g} "
            f"({100 * plain['robust']:.1f} %, clean {100 * plain['clean']:.1f} %)."
        )
    return lines


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def draw(pyplot: Any, rows: Sequence[Record]) -> None:
    """Clean and robust accuracy against the training radius."""
    curves = [row for row in rows if row["norm"] == "Linf" and row["reg"] == REG]
    every = sorted({row["eps"] for row in curves})
    clean = [row for row in curves if row["eps"] == every[0]]
    pyplot.errorbar(
        [row["radius"] for row in clean],
        [100 * row["clean"] for row in clean],
        [100 * row["clean_half"] for row in clean],
        color="black",
        marker="o",
        capsize=2,
        label="clean",
    )
    for colour, eps in zip(COLOURS, every, strict=False):
        line = [row for row in curves if row["eps"] == eps]
        radius = [row["radius"] for row in line]
        robust, half = ([100 * row[key] for row in line] for key in ("robust", "robust_half"))
        pyplot.errorbar(radius, robust, half, color=colour, marker="o", capsize=2, label=f"attacked, eps {eps:g}")
        pyplot.plot(radius, [100 * row["certified"] for row in line], ":", color=colour)
        plain = max(row["robust"] for row in rows if (row["norm"], row["eps"], row["radius"]) == ("Linf", eps, 0))
        pyplot.plot(radius[0], 100 * plain, "*", color=colour, markersize=11)
    pyplot.plot([], [], ":", color="0.4", label="certified")
    pyplot.plot([], [], "*", color="0.4", markersize=11, label="plain, best reg")
    pyplot.xlabel("training radius (l2, standardised features); 0 is the plain convex program")
    pyplot.ylabel("test accuracy, %")
    pyplot.title("Breast cancer: adversarial convex training under l-infinity attacks")
    pyplot.legend(loc="upper left", bbox_to_anchor=(1, 1))


def shown(row: Record) -> Record:
    """The row with "mean +- half width" in per cent; a plain head has no gain over itself."""
    text = {f"{k}_shown": f"{100 * row[k]:.1f} ± {100 * row[f'{k}_half']:.1f}" for k in ("clean", "robust", "gain")}
    return {**row, **text, **({"gain_shown": None} if row["is_plain"] else {})}


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    options = arguments(NAME, __doc__, argv)
    plan = QUICK if options.quick else Plan()
    jobs = [(seed, radius, reg) for seed in range(plan.splits) for radius, reg in plan.heads]
    records: list[Record] = []
    with progress_bars(messages()) as bars:
        task = bars.add_task("splits and heads", total=len(jobs), note="")
        for seed, radius, reg in jobs:
            records += measure(plan, seed, radius, reg)
            bars.update(task, advance=1, note=f"split {seed}, radius {radius:g}")
            if (radius, reg) == plan.heads[-1]:
                bars.console.print(f"split {seed + 1} of {plan.splits} is done")
    rows = summaries(records)
    columns = [
        Column("norm", "norm"),
        Column("eps", "eps", "{:g}".format),
        Column("radius", "radius", "{:g}".format),
        Column("reg", "reg", "{:g}".format),
        Column("clean_shown", "clean, %"),
        Column("robust_shown", "robust, %"),
        Column("certified", "certified, %", lambda value: f"{100 * value:.1f}"),
        Column("gain_shown", "gain, points"),
        Column("autoattack_added", "AA broke more"),
        Column("unconverged", "gap > 1 %"),
    ]
    title = f"Breast cancer, {plan.splits} splits: accuracy against the training radius"
    publish(
        options, title, records, [shown(row) for row in rows], columns, lambda pyplot: draw(pyplot, rows), verdict(rows)
    )


if __name__ == "__main__":
    main()
