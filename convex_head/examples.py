"""A few adversarial examples as pictures, to look at beside the numbers.

The points are the first ones that are right without attack, not chosen by success, and the search is our own
projected descent on the margin (attacks/descent.py) of a few dozen steps: weaker than the attacks that are counted,
so a point may look right here that the record counts as broken. No count depends on it.
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convex_head.attacks.base import Attack
from convex_head.attacks.descent import descend, random_start
from convex_head.attacks.isolation import evaluation_mode
from convex_head.attacks.view import ModelView, margins
from convex_head.data import as_pair
from convex_head.errors import ImageError
from convex_head.threat import ThreatModel

_STEPS = 50
_LARGEST_SIDE = 96


class _Descent(Attack):
    """The search behind the pictures; the base class measures its success again."""

    name = "descent"

    def perturb(self, model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
        start = random_start(images, threat, torch.Generator().manual_seed(seed))
        return descend(lambda x: margins(model(x), labels), images, start, threat, steps=_STEPS)[0]


def adversarial_examples(
    model: nn.Module, data: Any, threat: ThreatModel, count: int = 6, *, seed: int = 0, batch_size: int = 128
) -> dict[str, Any]:
    """Clean and perturbed thumbnails of the first ``count`` points that the model gets right.

    Args:
        model: images in [0, 1] to logits.
        data: a dataset name, a pair (images, labels) or a DataLoader; images (n, c, h, w) with c = 1 or 3.
        threat: norm and eps in pixel space.
        count: number of points.
        seed: of the random start.
        batch_size: images a pass while right points are looked for.

    Returns:
        plain JSON for ``metadata["examples"]`` of a record: "attack", and "images" with PNG data URIs "clean" and
        "adversarial" (sides of at most 96 pixels) and classes "label", "clean_prediction", "adversarial_prediction".

    Raises:
        ImageError: the data are no images of one or three channels.
    """
    images, labels = as_pair(data)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ImageError(
            f"Pictures need images (n, c, h, w) with 1 or 3 channels; found {tuple(images.shape)}. Leave them out."
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    view = ModelView(model, tuple(images.shape[1:]))
    with evaluation_mode(model):
        chosen = _first_right(view, images, labels, count, batch_size, device)
        x, y = images[chosen].to(device), labels[chosen].to(device)
        found, predicted = x, y
        if len(chosen):
            found = _Descent().run(view, x, y, threat, seed=seed).images
            with torch.no_grad():
                predicted = view(found).argmax(dim=1)
    listed = [
        {
            "clean": png_uri(x[k]),
            "adversarial": png_uri(found[k]),
            "label": int(y[k]),
            "clean_prediction": int(y[k]),
            "adversarial_prediction": int(predicted[k]),
        }
        for k in range(len(chosen))
    ]
    return {"attack": f"projected descent, {_STEPS} steps, {threat}, for illustration only", "images": listed}


def _first_right(
    view: ModelView, images: Tensor, labels: Tensor, count: int, batch_size: int, device: torch.device
) -> Tensor:
    """Indices of the first ``count`` points that are classified rightly."""
    found = torch.zeros(0, dtype=torch.int64)
    for start in range(0, len(images), batch_size):
        if len(found) >= count:
            break
        with torch.no_grad():
            predicted = view(images[start : start + batch_size].to(device)).argmax(dim=1).cpu()
        right = (predicted == labels[start : start + batch_size]).nonzero().flatten()
        found = torch.cat([found, start + right])
    return found[:count]


def png_uri(image: Tensor) -> str:
    """PNG data URI of a (1 or 3, h, w) image in [0, 1], shrunk to sides of at most 96 pixels."""
    shrink = _LARGEST_SIDE / max(image.shape[1:])
    if shrink < 1:
        sides = [max(1, int(side * shrink)) for side in image.shape[1:]]
        image = functional.interpolate(image[None], size=sides, mode="area")[0]
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    height, width, channels = pixels.shape
    # Every line begins with its filter, 0 for none (PNG specification, section 9).
    lines = b"".join(b"\x00" + pixels[row].tobytes() for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
