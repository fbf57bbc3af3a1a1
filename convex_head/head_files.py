"""The file of a head: safetensors (no pickle) with weights, settings and certificate, written atomically.

The tensors are the head's state dict; the metadata has ``format``, ``settings`` (JSON, the constructor's arguments) and
``certificate`` (JSON, the scalar fields of a SolveResult, or null).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from convex_head.errors import RecordError
from convex_head.solvers.result import SolveResult, Status

_FORMAT = "convex_head.head/1"
_SCALARS = ("status", "primal", "dual", "gap", "neurons", "seconds", "iterations", "message", "solver")


def write_head(
    path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], result: SolveResult | None
) -> None:
    """Write a head file; an existing one is replaced only once the new one is complete."""
    certificate = None if result is None else {name: getattr(result, name) for name in _SCALARS}
    metadata = {"format": _FORMAT, "settings": json.dumps(settings), "certificate": json.dumps(certificate)}
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(plain, str(temporary), metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_head(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], SolveResult | None]:
    """Tensors, settings and result of a head file.

    Raises:
        RecordError: the file is damaged or not a head.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no head file at {path}. Save one with head.save(path).")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as fault:
        raise damaged(path, fault) from fault
    if metadata.get("format") != _FORMAT:
        raise RecordError(f"{path} must have format {_FORMAT!r}; found {metadata.get('format')!r}. Save it again.")
    try:
        settings = json.loads(metadata["settings"])
        certificate = json.loads(metadata["certificate"])
        result = None
        if certificate is not None:
            result = SolveResult(history=(), **certificate | {"status": Status(certificate["status"])})
    except (KeyError, TypeError, ValueError) as fault:
        raise damaged(path, fault) from fault
    return tensors, settings, result


def damaged(path: Path, fault: Exception) -> RecordError:
    """The error for a file whose content does not make a head."""
    text = " ".join(str(fault).split())
    return RecordError(
        f"{path} must be a whole head file; found a damaged one ({type(fault).__name__}: {text}). Save it again."
    )
