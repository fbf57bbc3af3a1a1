"""The backbones of the Fashion-MNIST suite, trained on 50,000 training images; the other 10,000 are for the heads.

Heads never see what the backbone was trained on, and choose on a fifth of their own 10,000 images. SAM's rho is chosen
there as well, by the accuracy under the validation attack at 8/255.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convex_head.baselines import (
    SAM,
    PreActResNet,
    channel_statistics,
    preact_resnet18,
    preact_resnet_small,
    preact_resnet_tiny,
    train,
)
from convex_head.baselines.pgd import pgd_accuracy
from convex_head.data import load_dataset
from convex_head.threat import ThreatModel

ARCHITECTURES = {
    "tiny": preact_resnet_tiny,
    "small": preact_resnet_small,
    "preact_resnet18": partial(preact_resnet18, in_channels=1),
}
THREAT = ThreatModel("Linf", "8/255")
RHOS = (0.05, 0.2)
HELD_OUT = 10_000


@dataclass(frozen=True)
class Schedule:
    """How long backbones are trained: epochs of the plain recipes and of the adversarial ones, images (None: all)."""

    epochs: int = 12
    adversarial_epochs: int = 8
    images: int | None = None
    batch_size: int = 128
    lr: float = 0.1


@dataclass(frozen=True)
class HeadData:
    """The 10,000 images for the heads; ``held_out`` and ``rest`` are rows, the split of ``robustify`` at that seed."""

    images: Tensor
    labels: Tensor
    rest: Tensor
    held_out: Tensor


@cache
def _training() -> tuple[Tensor, Tensor]:
    data = load_dataset("fashion_mnist", split="train")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(2024))
    return data.images[order], data.labels[order]


def backbone_data(images: int | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels that backbones are trained on: the first ``images`` of their 50,000."""
    pictures, labels = (part[HELD_OUT:][:images] for part in _training())
    return pictures, labels


def head_data(seed: int, n: int = HELD_OUT) -> HeadData:
    """Images that no backbone was trained on, split for choices by ``seed``."""
    images, labels = (part[:n] for part in _training())
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return HeadData(images, labels, shuffled[n // 5 :], shuffled[: n // 5])


def backbone(
    recipe: str,
    seed: int,
    folder: Path,
    *,
    arch: str = "tiny",
    schedule: Schedule | None = None,
    rhos: Sequence[float] = RHOS,
    device: str = "cpu",
) -> tuple[PreActResNet, dict[str, Any]]:
    """The trained network in evaluation mode, frozen, and its card of costs; from ``folder`` where it is finished."""
    schedule = schedule or Schedule()
    chosen = "" if recipe != "sam" or tuple(rhos) == RHOS else "-rho" + "-".join(f"{rho:g}" for rho in rhos)
    path = folder / f"{arch}-{recipe}{chosen}-{seed}.json"
    if path.exists():
        card = json.loads(path.read_text(encoding="utf-8"))
        if card["schedule"] == asdict(schedule):
            model = _fresh(arch, seed)
            model.load_state_dict(torch.load(path.with_suffix(".pt"), weights_only=True, map_location="cpu"))
            return _ready(model.to(device)), card
    variants: list[Any] = [SAM(rho=rho) for rho in rhos] if recipe == "sam" else [recipe]
    best: tuple[tuple[float, float], PreActResNet, dict[str, Any]] | None = None
    cost = {"seconds": 0.0, "forwards": 0, "backwards": 0}
    for number, variant in enumerate(variants):
        model = _fresh(arch, seed).to(device)
        if device != "cpu":  # as tensor cores want it
            model = model.to(memory_format=torch.channels_last)
        images, labels = backbone_data(schedule.images)
        adversarial = recipe in ("pgd_at", "trades")
        record = train(
            model,
            images,
            labels,
            recipe=variant,
            threat=THREAT if adversarial else None,
            epochs=schedule.adversarial_epochs if adversarial else schedule.epochs,
            batch_size=schedule.batch_size,
            lr=schedule.lr,
            seed=seed,
            checkpoint=path.with_name(f"{path.stem}-{number}.checkpoint"),
        )
        for name in cost:
            cost[name] += getattr(record, name)
        held = head_data(seed)
        clean, robust = pgd_accuracy(model, held.images[held.held_out], held.labels[held.held_out], THREAT)
        card = {"recipe": record.recipe, "validation_clean": clean, "validation_robust": robust}
        if best is None or (robust, clean) > best[0]:
            best = ((robust, clean), model, card)
    assert best is not None
    card = {"arch": arch, "seed": seed, "schedule": asdict(schedule), "device": device, **best[2], **cost}
    card |= {"rhos": list(rhos)} if recipe == "sam" else {}
    torch.save(best[1].state_dict(), path.with_suffix(".pt"))
    path.write_text(json.dumps(card), encoding="utf-8")
    return _ready(best[1]), card


def _fresh(arch: str, seed: int) -> PreActResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[arch](10, **channel_statistics(_training()[0][:HELD_OUT]))
    return model


def _ready(model: nn.Module) -> Any:
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
