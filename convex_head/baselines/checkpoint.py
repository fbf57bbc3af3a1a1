"""Training checkpoints: what a run is (its key), and where it stands, in one file written atomically."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ResumeMismatchError
from .state import Epoch, Tally, TrainingState


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of shapes, dtypes and values."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def training_key(model: nn.Module, images: Tensor, labels: Tensor, **settings: Any) -> dict[str, Any]:
    """What a checkpoint belongs to: the settings, the data, the initial weights and which of them train."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {
        **settings,
        "data": digest([images, labels]),
        "initial model": digest(model.state_dict().values()),
        "trained parameters": hashlib.sha256("\n".join(trained).encode()).hexdigest(),
    }


def save(
    path: Path, key: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState
) -> None:
    """Write atomically: a killed process leaves the previous checkpoint or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    content = {
        "key": key,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "state": dataclasses.asdict(state),
    }
    torch.save(content, partial)
    os.replace(partial, path)


def load(
    path: Path, key: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> TrainingState:
    """Put model and optimiser where the checkpoint left them.

    Raises:
        ResumeMismatchError: the file is damaged or belongs to another training.
    """
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        differing = [name for name in key if saved["key"].get(name) != key[name]]
    except Exception as error:
        raise ResumeMismatchError(
            f"{path} is not a readable training checkpoint ({type(error).__name__}); delete it and start again."
        ) from error
    if differing:
        raise ResumeMismatchError(
            f"{path} belongs to another training: {', '.join(differing)} differ. "
            "Delete it, or give this training another checkpoint file."
        )
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    state = saved["state"]
    return TrainingState(
        state["epoch"],
        state["seconds"],
        [Epoch(**line) for line in state["history"]],
        Tally(**state["tally"]),
    )
