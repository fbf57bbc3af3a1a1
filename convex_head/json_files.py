"""JSON on disk that is either the old file or the new one, never half of one, and never holds NaN."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: str | os.PathLike[str], payload: dict[str, Any], *, indent: int | None = None) -> None:
    """Write ``payload`` to ``path`` by an atomic rename; parent folders are made.

    Raises:
        ValueError: the payload holds NaN or infinity.
    """
    target = Path(path)
    text = json.dumps(payload, indent=indent, allow_nan=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    # One name a process: two processes that write the same file never share a half-written one.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | os.PathLike[str], error: type[Exception], what: str) -> dict[str, Any]:
    """Read one JSON object.

    Args:
        path: file to read.
        error: class raised when the file is missing, no JSON, holds NaN or is not an object.
        what: what the file should be, for the message ("record", "progress file").
    """

    def refuse_constant(constant: str) -> None:
        raise ValueError(f"it holds {constant}, which is no JSON number")

    try:
        payload = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except (OSError, ValueError, RecursionError) as problem:
        raise error(
            f"Cannot read the {what} {os.fspath(path)}: {problem}. Give another path or delete the file and run again."
        ) from problem
    if not isinstance(payload, dict):
        raise error(f"A {what} is one JSON object; {os.fspath(path)} holds a {type(payload).__name__}.")
    return payload
