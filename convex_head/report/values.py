"""Values of records made safe to show: metadata are whoever's made them, and may hold anything that JSON can."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

from convex_head.records import EvalRecord


def slug(text: str) -> str:
    """A file name and HTML id: lower-case letters, digits, hyphens; at most 80 characters, never empty."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80].strip("-") or "entry"


def fact(record: EvalRecord, key: str, kind: type | tuple[type, ...]) -> Any:
    """``record.metadata[key]`` if it is of that kind (and a finite float), else None: metadata is the caller's."""
    value = record.metadata.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return None
    return None if isinstance(value, (int, float)) and not is_finite(value) else value


def is_finite(value: Any) -> bool:
    """A number, not a bool, that a float can hold: JSON has integers of any length."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def plain(value: Any, limit: int = 300) -> str:
    """Text in one line and of bounded length, without what would disturb its neighbours.

    Control characters, direction marks and lone surrogates (which no file can hold) are left out.
    """
    text = str(value)
    short = " ".join(text[: 8 * limit].split())
    kept = "".join(letter for letter in short if unicodedata.category(letter) not in ("Cc", "Cf", "Cs"))
    return kept if len(kept) <= limit and len(text) <= 8 * limit else kept[: limit - 1] + "…"
