"""The main job: does a convex robust head help? Small backbones on real images, trained on the spot.

    backbones   a small PreAct ResNet on sklearn's digits: standard, SAM, PGD-AT training
    heads       its own; linear (the control: same frozen features); convex polynomial with certificate
    evaluation  two torchattacks attacks, then AutoAttack standard, on one fixed subset of the test split

Everything that is chosen is chosen on training data: the feature radius is the one with the best end-to-end
PGD accuracy on a fifth of the training split that the head did not see. The default eps of 0.1 was fixed on
backbones of this kind with their own heads, before any convex head was measured: there, standard training
keeps about a fifth of the points, SAM a quarter, PGD-AT nine tenths.

A row of the result is one JSON record. A row whose settings and package versions are unchanged is not computed
again, and an interrupted run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from convex_head import provenance
from convex_head.baselines import channel_statistics, linear_head, preact_resnet_small, train
from convex_head.certificate_check import certificate_facts, save_for_check
from convex_head.data import Dataset, load_dataset
from convex_head.eps_curve import evaluate_curve
from convex_head.errors import ConvergenceWarning, RecordError
from convex_head.evaluate import evaluate
from convex_head.examples import adversarial_examples
from convex_head.features import extract_features
from convex_head.head import ConvexRobustHead
from convex_head.records import EvalRecord
from convex_head.robustify import robustify
from convex_head.splice import SplicedModel, replace_head
from convex_head.threat import ThreatModel
from convex_head.workers import Listener, Report, Task, run_tasks

_CUT = "fc"
_EXAMPLES = 6
BENCH_RECIPES = ("pgd_at", "sam", "standard")


@dataclass(frozen=True)
class BenchSettings:
    """What a bench run computes; every field is part of the key of each row.

    Attributes:
        eps: text of the Linf radius in pixel units, as in "0.1" or "8/255".
        eps_curve: further radii at which every row is attacked, for its curve.
        n: points of the test split, a stratified draw by ``seed``.
        seed: of the weights, the training, the subset and every attack.
        recipes: how backbones are trained; names of :data:`convex_head.baselines.RECIPES`.
        heads: "own", "linear", "convex".
        attacks: by the registry's names.
        epochs, batch_size, lr: the training of the backbones.
        widths: channels of the stages of the backbone; the last is the number of features.
        standardise, shape_rounds: units of the convex head, as in :func:`convex_head.robustify`.
        radii, regs: candidates for the convex head in these units, None for those of "auto"; all but the first are
            warm-started.
        tol: relative gap of the head that is deployed; candidates stop at five times it.
        max_seconds: limit of one head fit; a fit that reaches it is shown with its honest gap.
    """

    eps: str = "0.1"
    eps_curve: tuple[str, ...] = ()
    n: int = 150
    seed: int = 0
    recipes: tuple[str, ...] = BENCH_RECIPES
    heads: tuple[str, ...] = ("own", "linear", "convex")
    attacks: tuple[str, ...] = ("torchattacks:PGD(steps=20)", "torchattacks:MIFGSM(steps=20)", "autoattack")
    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.1
    widths: tuple[int, ...] = (4, 32)
    standardise: str = "whiten"
    shape_rounds: int = 1
    radii: tuple[float, ...] | None = None
    regs: tuple[float, ...] | None = None
    tol: float = 1e-2
    max_seconds: float = 20.0

    @property
    def threat(self) -> ThreatModel:
        """The pixel threat: training, choice of radius and evaluation share it."""
        return ThreatModel("Linf", self.eps)

    def command(self) -> str:
        """The command that computes a row again."""
        curve = f" --eps-curve {','.join(self.eps_curve)}" if self.eps_curve else ""
        if self == self.quick():
            return f"convex-head bench --quick --eps {self.eps}{curve} --n-ex {self.n} --seed {self.seed}"
        training = "" if self.recipes == BENCH_RECIPES else "".join(f" --training {name}" for name in self.recipes)
        return f"convex-head bench --eps {self.eps}{curve} --n-ex {self.n} --seed {self.seed}{training}"

    def quick(self) -> BenchSettings:
        """The same path in seconds: one barely trained backbone, few points, one attack."""
        return dataclasses.replace(
            self,
            n=min(self.n, 20),
            recipes=("standard",),
            heads=("linear", "convex"),
            attacks=("apgd-ce",),
            epochs=3,
            widths=(4, 8),
            radii=(1.0,),
            regs=(0.1,),
            tol=0.1,
        )

    def rows(self) -> list[Row]:
        """All rows, in the order in which they are started: the slowest backbone first."""
        return [Row(recipe, head) for recipe in self.recipes for head in self.heads]


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    recipe: str
    head: str

    @property
    def name(self) -> str:
        """File name of the record, and name of the entry."""
        return f"digits-{self.recipe}-{self.head}".replace("_", "-")


def run_bench(settings: BenchSettings, out: Path, *, jobs: int, listener: Listener) -> list[EvalRecord]:
    """Compute the rows that ``out`` does not hold yet.

    Args:
        settings: what to compute.
        out: folder; records go to ``out/records``, backbones to ``out/backbones``, convex heads and the features that
            they were fitted on to ``out/heads``.
        jobs: processes to use.
        listener: gets the events of the tasks: one a backbone ("train sam") and one a row (its name).

    Returns:
        the records of the rows that exist now, in the order of ``settings.rows()``.
    """
    tasks = plan(settings, out)
    if tasks:
        run_tasks(tasks, jobs, listener)
    found = [_finished(settings, row, out) for row in settings.rows()]
    return [record for record in found if record is not None]


def plan(settings: BenchSettings, out: Path) -> list[Task]:
    """What is left to do: the backbones first, then the rows that ``out`` does not hold."""
    missing = [row for row in settings.rows() if _finished(settings, row, out) is None]
    recipes = [recipe for recipe in settings.recipes if any(row.recipe == recipe for row in missing)]
    tasks = [Task(f"train {name}", partial(_train_task, settings, name, out)) for name in recipes]
    rows = [Task(row.name, partial(_row_task, settings, row, out), after=f"train {row.recipe}") for row in missing]
    return tasks + rows


def row_key(settings: BenchSettings, row: Row) -> str:
    """Digest of everything that a row's numbers depend on."""
    content = {"settings": dataclasses.asdict(settings), "row": dataclasses.asdict(row)}
    # Rows do not depend on which other rows are asked for.
    del content["settings"]["recipes"], content["settings"]["heads"]
    content["versions"] = provenance.versions()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def record_path(out: Path, row: Row) -> Path:
    """Where the record of a row lives."""
    return out / "records" / f"{row.name}.json"


def _finished(settings: BenchSettings, row: Row, out: Path) -> EvalRecord | None:
    path = record_path(out, row)
    if not path.exists():
        return None
    try:
        record = EvalRecord.load(path)
    except RecordError:
        return None
    return record if record.metadata.get("bench_key") == row_key(settings, row) else None


def _backbone(settings: BenchSettings, recipe: str, out: Path, report: Report) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network and what it cost; from its checkpoint where that is finished."""
    data = load_dataset("digits", split="train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = preact_resnet_small(data.num_classes, 1, widths=settings.widths, **channel_statistics(data.images))
    schedule = (settings.epochs, settings.batch_size, settings.lr, settings.seed)
    content = (recipe, str(settings.threat), settings.widths, schedule, provenance.versions())
    key = hashlib.sha256(repr(content).encode()).hexdigest()[:12]
    record = train(
        model,
        data.images,
        data.labels,
        recipe=recipe,
        threat=settings.threat,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        seed=settings.seed,
        checkpoint=out / "backbones" / f"{recipe}-{key}.pt",
        progress=lambda done, total: report(done / total, "training"),
    )
    cost = {
        "training": recipe,
        "backbone": f"PreAct ResNet {'-'.join(map(str, settings.widths))}",
        "backbone_seconds": record.seconds,
        "backbone_forwards": record.forwards,
        "backbone_backwards": record.backwards,
    }
    return model, cost


def _train_task(settings: BenchSettings, recipe: str, out: Path, report: Report) -> None:
    _backbone(settings, recipe, out, report)


def _row_task(settings: BenchSettings, row: Row, out: Path, report: Report) -> None:
    model, card = _backbone(settings, row.recipe, out, lambda fraction, text: None)
    model.requires_grad_(False)
    data = load_dataset("digits", split="train")
    if row.head == "own":
        card["head"] = "own"
    else:
        report(0.0, "fitting the head")
        fit = {"linear": _fit_linear, "convex": _fit_convex}[row.head]
        model, facts = fit(settings, row, model, data, out)
        card.update(facts)
    key = row_key(settings, row)
    points = load_dataset("digits", split="test", n=settings.n, seed=settings.seed)
    state = out / "state" / f"{row.name}-{key}.json"
    asked: dict[str, Any] = {
        "attacks": settings.attacks,
        "batch_size": settings.n,
        "seed": settings.seed,
        "state": state,
        "progress": lambda event: report(event.fraction, event.stage),
        "name": row.name,
        "dataset_name": "digits",
        "command": settings.command(),
        "metadata": {
            **card,
            "bench_key": key,
            "subset": f"{settings.n} of the test split, seed {settings.seed}",
            "examples": adversarial_examples(model, points, settings.threat, _EXAMPLES, seed=settings.seed),
        },
    }
    if settings.eps_curve:
        record = evaluate_curve(model, points, settings.threat, settings.eps_curve, **asked)
    else:
        record = evaluate(model, points, settings.threat, **asked)
    record.save(record_path(out, row))
    for file in state.parent.glob(f"{state.name}*"):
        file.unlink(missing_ok=True)


def _fit_linear(
    settings: BenchSettings, row: Row, model: nn.Module, data: Dataset, out: Path
) -> tuple[SplicedModel, dict[str, Any]]:
    began = time.perf_counter()
    features = extract_features(replace_head(model, nn.Identity(), at=_CUT).backbone, data.images)
    head = linear_head(features, data.labels, data.num_classes)
    return replace_head(model, head, at=_CUT), {
        "head": "linear",
        "head_seconds": time.perf_counter() - began,
    }


def _fit_convex(
    settings: BenchSettings, row: Row, model: nn.Module, data: Dataset, out: Path
) -> tuple[SplicedModel, dict[str, Any]]:
    """Radius and reg chosen on held-out training data, then fitted on all of it; weights and features are kept."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        # The table and the record show the gap that was reached.
        warnings.simplefilter("ignore", ConvergenceWarning)
        spliced = robustify(
            model,
            data,
            settings.threat,
            at=_CUT,
            standardise=settings.standardise,
            shape_rounds=settings.shape_rounds,
            radii=settings.radii,
            regs=settings.regs,
            tol=settings.tol,
            max_seconds=settings.max_seconds,
            seed=settings.seed,
        )
    head = cast(ConvexRobustHead, spliced.head)
    facts = {
        "head": "convex",
        "standardise": settings.standardise,
        "shape_rounds": settings.shape_rounds,
        **certificate_facts(head),
        "head_seconds": time.perf_counter() - began,
        "path": [dataclasses.asdict(candidate) for candidate in spliced.path_],
    }
    save_for_check(out / "heads" / row.name, spliced, data.images, data.labels)
    return spliced, facts
