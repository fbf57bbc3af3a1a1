"""Progress of an evaluation on disk, so that a killed run goes on where it was.

One JSON file, replaced atomically after every batch: the *key* says what is being evaluated, *stages* holds
one row of characters each, the *checksum* guards both. Going on with another key is refused, saying what
differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convex_head.errors import ResumeMismatchError
from convex_head.json_files import read_json, write_json

_SCHEMA = 1


@dataclass
class StageProgress:
    """What one stage of one attack has done.

    Attributes:
        row: one character a point, "1" still right, "0" broken, "-" not given to the stage (yet).
        batches: batches that are done.
        outside: points returned outside the threat set.
        forwards, backwards, seconds: cost of the batches that are done.
    """

    row: str
    batches: int = 0
    outside: int = 0
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0


@dataclass
class Progress:
    """All that has been found so far.

    Attributes:
        key: what is being evaluated, plain JSON.
        path: file, or None to keep nothing.
        report: what the checks before the attacks found; empty until they are done.
        stages: "attack/stage" -> progress.
        seconds: wall clock so far, interrupted runs included.
    """

    key: dict[str, Any]
    path: Path | None
    report: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, StageProgress] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, key: dict[str, Any]) -> Progress:
        """Progress saved under ``path``, or none yet.

        Raises:
            ResumeMismatchError: the file is damaged or belongs to another evaluation.
        """
        # Through JSON, so that tuples and keys compare as they will when read back.
        key = json.loads(json.dumps(key, allow_nan=False))
        if path is None or not Path(path).exists():
            return cls(key, None if path is None else Path(path))
        payload = read_json(path, ResumeMismatchError, "progress file")
        body = {name: payload.get(name) for name in ("schema", "key", "report", "stages", "seconds")}
        if payload.get("checksum") != _checksum(body) or body["schema"] != _SCHEMA:
            raise ResumeMismatchError(
                f"The progress file {os.fspath(path)} is damaged or of another version. "
                "Delete it to start again, or give another path."
            )
        differences = _differences(payload["key"], key)
        if differences:
            raise ResumeMismatchError(
                f"The progress in {os.fspath(path)} belongs to another evaluation: {'; '.join(differences)}. "
                "Restore what differs, delete the file or give another path."
            )
        stages = {name: StageProgress(**stage) for name, stage in payload["stages"].items()}
        return cls(key, Path(path), payload["report"], stages, payload["seconds"])

    def save(self) -> None:
        """Replace the file atomically."""
        if self.path is None:
            return
        body: dict[str, Any] = {
            "schema": _SCHEMA,
            "key": self.key,
            "report": self.report,
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
            "seconds": self.seconds,
        }
        write_json(self.path, {**body, "checksum": _checksum(body)})


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _differences(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    return [
        f"{name} was {_short(saved.get(name))}, now {_short(asked.get(name))}"
        for name in sorted({*saved, *asked})
        if saved.get(name) != asked.get(name)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
