"""One training loop for every recipe: whole network or head only, resumable, deterministic by seed.

Only parameters with ``requires_grad`` are trained; frozen modules stay in evaluation mode, so a frozen
backbone is left bit for bit as it was. The learning rate rises linearly over the first tenth of the steps and
falls to zero by a half cosine. Each epoch seeds its own randomness with (seed, epoch): a run resumed after
epoch e therefore ends in the same weights as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import EmptyDataError, InputError, LabelShapeError, LabelTypeError
from ..threat import ThreatModel
from . import checkpoint as checkpoints
from .modes import set_training_mode
from .recipe import Recipe, as_recipe
from .state import Epoch, TrainingRecord, TrainingState


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    recipe: str | Recipe = "standard",
    threat: ThreatModel | None = None,
    epochs: int = 30,
    batch_size: int = 128,
    lr: float = 0.1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: str | Path | None = None,
    device: torch.device | str | None = None,
) -> TrainingRecord:
    """Train ``model`` in place and leave it in evaluation mode; the global random state is restored.

    Args:
        model: images -> logits (N, C). A :class:`~convex_head.splice.SplicedModel` trains its head only.
        images: (n, ...) floats, in [0, 1] for the adversarial recipes; features work for a bare head.
        labels: (n,) integers.
        recipe: "standard", "sam", "pgd_at", "trades", or a recipe object with its own hyperparameters.
        threat: the pixel threat that the adversarial recipes train against.
        epochs, batch_size, lr, seed: as usual; lr is the peak of the schedule.
        progress: called with (steps done, steps in all) after each step.
        checkpoint: file written after each epoch and read at the start. It belongs to one initial model,
            data, recipe and schedule.
        device: where to train; default: where the model's parameters are.

    Raises:
        EmptyDataError, LabelShapeError, LabelTypeError: on the data.
        InputError: unknown recipe, nothing to train, or a non-positive number.
        ThreatModelError: an adversarial recipe without a threat it can use.
        ResumeMismatchError: the checkpoint belongs to another training.
    """
    _check(model, images, labels, epochs=epochs, batch_size=batch_size, lr=lr)
    recipe = as_recipe(recipe, threat)
    home = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(home)
    schedule = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "threat": str(threat)}
    optimizer = recipe.optimizer((p for p in model.parameters() if p.requires_grad), lr)
    state, path, key = TrainingState(), None, {}
    if checkpoint is not None:
        path = Path(checkpoint)
        key = checkpoints.training_key(model, images, labels, **recipe.describe(), **schedule)
        if path.exists():
            state = checkpoints.load(path, key, model, optimizer, home)

    def step(batch: Tensor, done: int, total: int) -> tuple[Tensor, Tensor]:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(done, total, lr)
        x, y = images[batch].to(home), labels[batch].to(home, torch.int64)
        loss, logits = recipe.step(model, optimizer, x, y, threat)
        return loss * len(y), (logits.argmax(1) == y).sum()

    hook = getattr(model, "backbone", model).register_forward_hook(state.tally)
    per_epoch = math.ceil(len(images) / batch_size)
    try:
        with torch.random.fork_rng(devices=[home] if home.type == "cuda" else []):
            for epoch in range(state.epoch, epochs):
                started = time.perf_counter()
                set_training_mode(model)
                torch.manual_seed(_epoch_seed(seed, epoch))
                totals = torch.zeros(2, device=home)
                for index, batch in enumerate(torch.randperm(len(images)).split(batch_size)):
                    done = epoch * per_epoch + index
                    totals += torch.stack(step(batch, done, epochs * per_epoch))
                    if progress is not None:
                        progress(done + 1, epochs * per_epoch)
                mean_loss, accuracy = (totals / len(images)).tolist()
                seconds = time.perf_counter() - started
                rate = optimizer.param_groups[0]["lr"]
                state.history.append(Epoch(epoch, mean_loss, accuracy, rate, seconds))
                state.seconds += seconds
                state.epoch = epoch + 1
                if path is not None:
                    checkpoints.save(path, key, model, optimizer, state)
    finally:
        hook.remove()
        model.eval()
    return TrainingRecord(
        recipe.describe(), state.seconds, state.tally.forwards, state.tally.backwards, tuple(state.history)
    )


def _check(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, batch_size: int, lr: float) -> None:
    if len(images) == 0:
        raise EmptyDataError("training needs at least one example; got none. Check the split or the filter.")
    if labels.ndim != 1 or len(labels) != len(images):
        raise LabelShapeError(
            f"labels must be one integer an image, shape ({len(images)},); got {tuple(labels.shape)}."
        )
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype is torch.bool:
        raise LabelTypeError(f"labels must be integers; got {labels.dtype}. Use labels.long() for classes.")
    for name, value in {"epochs": epochs, "batch_size": batch_size, "lr": lr}.items():
        if not value > 0:
            raise InputError(f"{name} must be positive; got {value}.")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            "the model has no parameter with requires_grad=True, so there is nothing to train; "
            "unfreeze a head with head.requires_grad_(True)."
        )


def _learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _epoch_seed(seed: int, epoch: int) -> int:
    """A seed for one epoch: hashed, so that (0, 1) and (1, 0) share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:7], "big")
