"""Does a convex robust head beat SAM and adversarial training? Fashion-MNIST, four backbones, many heads.

    python -m benchmarks.fashion_mnist                                    the full design: days on two cores
    python -m benchmarks.fashion_mnist --backbones sam --seeds 0          a part; finished cells are kept
    python -m benchmarks.fashion_mnist --known leaderboard/entries        goes on from the cells that are published
    python -m benchmarks.fashion_mnist --report                           table and figure of what is finished
    python -m benchmarks.fashion_mnist --device cuda --batch-size 1000    on a GPU: larger batches, not the same record
    python -m benchmarks.fashion_mnist --quick                            the same path in a minute

A cell is one backbone, seed, head, norm and eps: 1,000 test points, AutoAttack standard and the attacks that know the
head. Its record is kept in ``runs/fashion_mnist/records``; an interrupted cell goes on where it was. ``--attacks apgd``
is a cheaper column of its own, AutoAttack's APGD on the cross-entropy and its targeted APGD with the attacks that know
the head; it never stands for AutoAttack.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import arguments, load_average
from benchmarks.fashion_mnist_backbones import ARCHITECTURES, HELD_OUT, RHOS, Schedule, backbone, head_data
from benchmarks.fashion_mnist_heads import HEADS, Effort, fit_head
from benchmarks.fashion_mnist_report import report
from convex_head.certificate_check import save_for_check
from convex_head.console import messages
from convex_head.data import Dataset, load_dataset
from convex_head.errors import InputError
from convex_head.evaluate import evaluate
from convex_head.examples import adversarial_examples
from convex_head.head import ConvexRobustHead
from convex_head.records import EvalRecord
from convex_head.report.entries import load_entries
from convex_head.splice import SplicedModel
from convex_head.threat import ThreatModel

NAME = "fashion_mnist"
_PICTURES = 4
ATTACKS = {"autoattack": ("autoattack",), "apgd": ("apgd-ce", "apgd-t")}


@dataclass(frozen=True)
class Cell:
    """One evaluation."""

    arch: str
    backbone: str
    seed: int
    head: str
    norm: str
    eps: str
    attacks: str

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel(self.norm, self.eps)

    @property
    def model(self) -> str:
        """Name of the model, as in the leaderboard."""
        return f"{NAME}-{self.arch}-{self.backbone}-{self.head}-seed{self.seed}".replace("_", "-")

    @property
    def file(self) -> str:
        return f"{self.model}-{self.norm}-{self.eps}-{self.attacks}".replace("/", "_") + ".json"


@dataclass(frozen=True)
class Plan:
    """The design; its defaults are the whole of it, in the order in which cells are run.

    Attributes:
        backbones, seeds, heads, threats: what is crossed; threats are (norm, eps).
        train_eps: the Linf eps that adversarial heads train against and that every choice is made at.
        n: test points.
        rhos: SAM's, of which validation takes one.
        device: where networks are trained, heads are fitted and attacks are run.
    """

    arch: str = "tiny"
    backbones: tuple[str, ...] = ("sam", "standard", "pgd_at", "trades")
    seeds: tuple[int, ...] = (0, 1, 2)
    heads: tuple[str, ...] = tuple(HEADS)
    threats: tuple[tuple[str, str], ...] = (
        ("Linf", "4/255"),
        ("Linf", "8/255"),
        ("Linf", "2/255"),
        ("Linf", "1/255"),
        ("L2", "0.5"),
    )
    attacks: str = "autoattack"
    train_eps: str = "8/255"
    n: int = 1000
    batch_size: int = 250
    rhos: tuple[float, ...] = RHOS
    device: str = "cpu"
    head_images: int = HELD_OUT
    schedule: Schedule = field(default_factory=Schedule)
    effort: Effort = field(default_factory=Effort)

    def cells(self) -> Iterator[Cell]:
        """Seed by seed, backbone by backbone, threat by threat."""
        for seed in self.seeds:
            for name in self.backbones:
                for norm, eps in self.threats:
                    for head in self.heads:
                        yield Cell(self.arch, name, seed, head, norm, eps, self.attacks)

    def model_key(self) -> str:
        """Digest of what a fitted model depends on beside its name."""
        content = [self.train_eps, self.head_images, asdict(self.schedule), asdict(self.effort)]
        content += [self.rhos] if self.rhos != RHOS else []
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    def command(self, cell: Cell) -> str:
        """The command that computes a cell again, and no other one."""
        quick = self.schedule == QUICK.schedule
        usual = QUICK if quick else Plan()
        words = ["python", "-m", f"benchmarks.{NAME}", *(["--quick"] if quick else [])]
        words += ["--backbones", cell.backbone, "--heads", cell.head, "--seeds", str(cell.seed)]
        words += ["--eps", cell.eps, *(["--norm", cell.norm] if cell.norm != "Linf" else [])]
        words += ["--attacks", cell.attacks] if cell.attacks != usual.attacks else []
        words += ["--arch", cell.arch] if cell.arch != usual.arch else []
        words += ["--n", str(self.n)] if self.n != usual.n else []
        words += ["--batch-size", str(self.batch_size)] if self.batch_size != usual.batch_size else []
        words += ["--rhos", *map(str, self.rhos)] if self.rhos != usual.rhos else []
        words += ["--device", self.device] if self.device != usual.device else []
        return shlex.join(words)


QUICK = Plan(
    backbones=("sam",),
    seeds=(0,),
    heads=("own", "mlp_at", "convex"),
    threats=(("Linf", "8/255"),),
    attacks="apgd",
    n=20,
    batch_size=20,
    head_images=500,
    schedule=Schedule(epochs=1, images=2000),
    effort=Effort(epochs=1, lrs=(0.1,), hidden=32, radii=(0.5,), regs=(0.1, 0.03), tol=0.2, max_seconds=10),
)


def build(plan: Plan, cell: Cell, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a cell, from disk where it is fitted, and its card."""
    path = folder / "models" / f"{cell.model}-{plan.model_key()}.pt"
    if path.exists():
        # Written by the lines below: our own modules, which no state dict can rebuild.
        model, card = torch.load(path, weights_only=False, map_location=plan.device)
        return model, card
    (folder / "backbones").mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"arch": cell.arch, "schedule": plan.schedule, "rhos": plan.rhos, "device": plan.device}
    base, trained = backbone(cell.backbone, cell.seed, folder / "backbones", **how)
    threat = ThreatModel("Linf", plan.train_eps)
    data = head_data(cell.seed, plan.head_images)
    model, card = fit_head(cell.head, base, data, threat, plan.effort, cell.seed)
    card = {"training": cell.backbone, "head": cell.head, "backbone": f"PreAct ResNet, {cell.arch}", **card}
    card["backbone_card"], card["train_eps"], card["load_average"] = trained, plan.train_eps, load_average()
    card["device"] = plan.device
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save((model, card), path)
    # After adversarial rounds a head has been fitted on further features, which are not kept.
    if isinstance(model, SplicedModel) and isinstance(model.head, ConvexRobustHead) and not card["rounds"]:
        save_for_check(folder / "heads" / cell.model, model, data.images, data.labels)
    return model, card


def points(plan: Plan) -> Dataset:
    """The fixed, stratified test points."""
    return load_dataset("fashion_mnist", split="test", n=plan.n, seed=0)


def measure(plan: Plan, cell: Cell, folder: Path) -> EvalRecord:
    """The record of a cell; from disk where it is finished."""
    path = folder / "records" / cell.file
    if path.exists():
        found = EvalRecord.load(path)
        if (found.metadata["key"], found.n, found.batch_size) == (plan.model_key(), plan.n, plan.batch_size):
            return found
    model, card = build(plan, cell, folder)
    # Another plan's progress is not this cell's: evaluate would refuse it.
    state = folder / "state" / f"{plan.model_key()}-{plan.n}-{plan.batch_size}-{cell.file}"
    state.parent.mkdir(parents=True, exist_ok=True)
    test = points(plan)
    pictures = adversarial_examples(model, test, cell.threat, _PICTURES)
    record = evaluate(
        model,
        test,
        cell.threat,
        ATTACKS[cell.attacks],
        batch_size=plan.batch_size,
        state=state,
        progress=False,
        name=cell.model,
        dataset_name="fashion_mnist",
        command=plan.command(cell),
        metadata={**card, "cell": asdict(cell), "key": plan.model_key(), "examples": pictures},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    record.save(path)
    state.unlink(missing_ok=True)
    return record


def take_known(folder: Path, entries: Path) -> int:
    """Copy the cells that a leaderboard has, and ``folder`` has not, into it; returns how many there were."""
    taken = 0
    for entry in load_entries(entries):
        cell = entry.record.metadata.get("cell")
        path = folder / "records" / Cell(**cell).file if isinstance(cell, dict) else None
        if path is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            entry.record.save(path)
            taken += 1
    return taken


def finished(folder: Path) -> list[EvalRecord]:
    """Every record that is there."""
    return [EvalRecord.load(path) for path in sorted((folder / "records").glob("*.json"))]


def parsed(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Plan]:
    """Options, and the plan that they ask for."""
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument("--arch", choices=ARCHITECTURES, help="architecture of the backbones")
    extra.add_argument("--backbones", nargs="+", help="training recipes of the backbones")
    extra.add_argument("--seeds", nargs="+", type=int)
    extra.add_argument("--heads", nargs="+", choices=HEADS)
    extra.add_argument("--eps", nargs="+", help="eps in pixel units, as in 4/255, of the norm that --norm names")
    extra.add_argument("--norm", choices=("Linf", "L2"), default="Linf", help="norm of --eps (default: %(default)s)")
    extra.add_argument("--attacks", choices=ATTACKS)
    extra.add_argument("--n", type=int, help="test points")
    extra.add_argument("--batch-size", type=int, help="test points attacked together; part of a record")
    extra.add_argument("--rhos", nargs="+", type=float, help="SAM's rho; validation takes one of several")
    extra.add_argument("--device", help="cpu, cuda, cuda:0 (default: cpu)")
    extra.add_argument("--folder", type=Path, help="where backbones, heads and records are kept")
    extra.add_argument("--known", type=Path, help="folder of leaderboard entries whose cells count as finished")
    extra.add_argument("--report", action="store_true", help="run nothing")
    options = arguments(NAME, __doc__, argv, extra=extra)
    plan = QUICK if options.quick else Plan()
    names = ("arch", "backbones", "seeds", "heads", "attacks", "n", "batch_size", "rhos", "device")
    given = {name: getattr(options, name) for name in names}
    plan = replace(plan, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None})
    if options.norm != "Linf" and not options.eps:
        raise InputError(f"--norm is that of --eps; found --norm {options.norm} alone. Add for example --eps 0.5.")
    if options.eps:
        plan = replace(plan, threats=tuple((options.norm, eps) for eps in options.eps))
    return options, plan


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then write table and figure of what is there."""
    options, plan = parsed(argv)
    folder = options.folder or (Path("runs") / (f"{NAME}-quick" if options.quick else NAME))
    if options.known:
        messages().print(f"{take_known(folder, options.known)} finished cells are taken from {options.known}")
    if not options.report:
        _run(plan, folder)
    report(options, finished(folder))


def _run(plan: Plan, folder: Path) -> None:
    console = messages()
    cells: Sequence[Cell] = list(plan.cells())
    for number, cell in enumerate(cells, 1):
        record = measure(plan, cell, folder)
        console.print(
            f"{number}/{len(cells)} {cell.model} {cell.norm} {cell.eps}: clean {record.clean_accuracy:.3f}, "
            f"robust {record.robust_accuracy:.3f} ({record.seconds:.0f} s)",
            markup=False,
            highlight=False,
        )


if __name__ == "__main__":
    main()
