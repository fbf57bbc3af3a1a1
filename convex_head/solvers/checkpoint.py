"""Checkpoint of a long solve: written atomically after every outer iteration, and gone on from with the same result.

One safetensors file (no pickle): the present and the best network, and the numbers of the iteration as JSON. It carries
a key of the problem, so that it cannot be taken for the checkpoint of another one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from convex_head.errors import ResumeMismatchError
from convex_head.problems.base import Network
from convex_head.problems.multipliers import Multipliers
from convex_head.solvers.result import Progress

_FORMAT = "convex_head.solve/1"


@dataclass(frozen=True)
class SolveState:
    """Where a solve stands after an outer iteration.

    Attributes:
        network: the point to go on from.
        best: the best point so far.
        numbers: what else the algorithm and its book-keeping need, as JSON values.
        history: the outer iterations so far.
        tensors: what else the algorithm needs, by name.
    """

    network: Network
    best: Network
    numbers: dict[str, Any]
    history: list[Progress]
    tensors: dict[str, torch.Tensor]


def save_state(path: Path, key: dict[str, Any], state: SolveState) -> None:
    """Write atomically: a killed process leaves the previous checkpoint or the new one."""
    tensors = {f"extra.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    for name, network in (("network", state.network), ("best", state.best)):
        for part in ("directions", "weights", "function"):
            tensors[f"{name}.{part}"] = getattr(network, part).detach().cpu().clone().contiguous()
    content = {"key": key, "numbers": state.numbers, "history": [asdict(line) for line in state.history]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, str(partial), metadata={"format": _FORMAT, "state": json.dumps(content)})
    os.replace(partial, path)


def load_state(path: Path, key: dict[str, Any], device: torch.device | str) -> SolveState:
    """Read a checkpoint of the problem with this key.

    Raises:
        ResumeMismatchError: the file is damaged or belongs to another problem.
    """
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            content = json.loads((file.metadata() or {})["state"])
            networks = [
                Network(*(file.get_tensor(f"{name}.{part}") for part in ("directions", "weights", "function")))
                for name in ("network", "best")
            ]
            names = [name for name in file.keys() if name.startswith("extra.")]  # noqa: SIM118 (not a dict)
            extra = {name.removeprefix("extra."): file.get_tensor(name) for name in names}
        history = [Progress(**line) for line in content["history"]]
        found, numbers = content["key"], content["numbers"]
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as fault:
        raise ResumeMismatchError(
            f"{path} must be a checkpoint of a solve; found a damaged or foreign file ({type(fault).__name__}). "
            "Delete it and start again."
        ) from fault
    differing = [name for name in key if found.get(name) != key[name]]
    if differing:
        raise ResumeMismatchError(
            f"{path} must belong to this problem; found another {', '.join(differing)}. "
            "Delete it, or give this fit another checkpoint file."
        )
    return SolveState(networks[0], networks[1], numbers, history, extra)


def multipliers_to_keep(
    problem: Any, found: Multipliers | None, centre: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The multipliers of the last point, and the centre of the smoothing where it is another, of all examples."""
    slopes = None if found is None else found.slopes
    kept = {} if slopes is None else {"slopes": problem.all_multipliers(slopes)}
    if centre is slopes or centre is None:
        return kept | {"centred": torch.tensor(centre is not None)}
    return kept | {"centre": problem.all_multipliers(centre)}


def kept_multipliers(
    problem: Any, width: float, tensors: dict[str, torch.Tensor]
) -> tuple[Multipliers | None, torch.Tensor | None]:
    """Multipliers, of this width, and centre that :func:`multipliers_to_keep` described, of the rows held here."""
    slopes = problem.own_multipliers(tensors["slopes"]) if "slopes" in tensors else None
    centre = slopes if "centred" in tensors and bool(tensors["centred"]) else None
    if "centre" in tensors:
        centre = problem.own_multipliers(tensors["centre"])
    return problem.multipliers(slopes, width), centre
