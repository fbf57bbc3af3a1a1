"""Pictures of adversarial examples that a record carries.

    metadata["examples"] = {"attack": text, "images": [{"clean": uri, "adversarial": uri, "label": class,
                            "clean_prediction": class, "adversarial_prediction": class}, ...]}

with PNG data URIs, as :func:`convex_head.examples.adversarial_examples` makes them. They illustrate; no count of the
record depends on them. Whatever is not such a picture is left out: a record is the caller's.
"""

from __future__ import annotations

import base64
import binascii
import struct
from typing import Any

from convex_head.records import EvalRecord
from convex_head.report.values import plain

MOST, LARGEST_SIDE, LONGEST_URI = 12, 256, 150_000
_PREFIX = "data:image/png;base64,"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CLASSES = ("label", "clean_prediction", "adversarial_prediction")


def pictures(record: EvalRecord) -> list[dict[str, Any]]:
    """At most a dozen pairs of pictures with their classes; "broken" where the prediction is not the label."""
    examples = record.metadata.get("examples")
    listed = examples.get("images") if isinstance(examples, dict) else None
    shown = []
    for item in listed[:MOST] if isinstance(listed, list) else []:
        if isinstance(item, dict) and is_png(item.get("clean")) and is_png(item.get("adversarial")):
            classes = {key: plain(item.get(key, "?"), 30) for key in _CLASSES}
            broken = classes["adversarial_prediction"] != classes["label"]
            shown.append({"clean": item["clean"], "adversarial": item["adversarial"], "broken": broken, **classes})
    return shown


def pictures_attack(record: EvalRecord) -> str:
    """What made the pictures, as the record says."""
    examples = record.metadata.get("examples")
    return plain(examples.get("attack", ""), 100) if isinstance(examples, dict) else ""


def is_png(uri: Any) -> bool:
    """A data URI of a PNG of bounded size: a short file can unpack to gigabytes, so the header's sides count."""
    if not isinstance(uri, str) or len(uri) > LONGEST_URI or not uri.startswith(_PREFIX):
        return False
    try:
        content = base64.b64decode(uri[len(_PREFIX) :], validate=True)
        width, height = struct.unpack(">II", content[16:24])
    except (binascii.Error, struct.error, ValueError):
        return False
    return content.startswith(_SIGNATURE) and 0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE
