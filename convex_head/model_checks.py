"""Before an attack runs: is this a model whose robust accuracy means anything?

A model is a map from images in [0, 1] to finite logits of at least two classes. What breaks that is refused
with :class:`ModelContractError`. What only makes the attacks blind is a *flag*: the attacks still run, with
a remedy where there is one, and the record says why its number is doubtful.

    train_mode          handed over in training mode, and that changes its logits (evaluated in eval mode)
    nondeterministic    two passes of one batch differ
    stateful            logits depend on earlier calls, on the rest of the batch or on the grad mode
    logit_scale         margins so large (or small) that cross-entropy has no float32 gradient; the attacks
                        see the logits times a power of two, which changes no prediction
    zero_gradient       the margin has no gradient with respect to the image
    shattered_gradient  it has one, but a small step along it does not lower the margin
    optimises_in_forward  the forward pass computes gradients itself, which attacks cannot see through
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from convex_head.attacks.descent import steepest_descent
from convex_head.attacks.isolation import process_state
from convex_head.attacks.view import ModelView, attack_shape, margins
from convex_head.errors import ModelContractError
from convex_head.threat import ThreatModel

PROBE = 32
# Above what float32, TF32 and another choice of kernel make of one function.
_SAME = 5e-3
_LARGE_MARGIN, _SMALL_MARGIN, _GOOD_MARGIN = 64.0, 1e-6, 8.0
_BLIND_SHARE, _FOLLOWED = 0.2, 0.1
_STEP_FRACTIONS = (1 / 4, 1 / 16, 1 / 64)
# Steps a pixel below which float32 logits do not resolve the change.
_LEAST_STEP = 1e-4


@dataclass
class ModelReport:
    """What the checks found.

    Attributes:
        right: (n,) bool on the CPU, classified rightly without attack.
        num_classes: width of the logits.
        scale: power of two by which attacks should multiply the logits.
        flags: flag -> one sentence with the value found.
    """

    right: Tensor
    num_classes: int
    scale: float = 1.0
    flags: dict[str, str] = field(default_factory=dict)


def check_model(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    batch_size: int,
    device: torch.device,
    was_training: bool,
) -> ModelReport:
    """Check ``model``, already in eval mode, on all images.

    Args:
        model: images (b, ...) to logits.
        images: (n, ...) float32 in [0, 1].
        labels: (n,) int64.
        threat: sets the length of the steps along gradients.
        batch_size: examples a pass.
        device: where the model is.
        was_training: some module was in training mode when the model was handed over.

    Raises:
        ModelContractError: the output is not a finite (b, K >= 2) tensor, is a probability distribution,
            or the labels do not fit K.
    """
    with process_state():
        logits = clean_logits(model, images, batch_size, device)
        check_logits(logits, labels)
        report = ModelReport(right=logits.argmax(dim=1) == labels, num_classes=logits.shape[1])
        view = ModelView(model, tuple(images.shape[1:]))
        probe = images[:PROBE].to(device)
        if was_training:
            report.flags.update(_training_mode_matters(model, probe))
        report.flags.update(_behaviour(model, probe))
        report.flags.update(_optimises(model, probe))
        report.scale, scale_flags = _logit_scale(logits)
        report.flags.update(scale_flags)
        chosen = report.right.nonzero().flatten()[:PROBE]
        if len(chosen) and threat.eps > 0:
            shaped = images[chosen].reshape(-1, *attack_shape(tuple(images.shape[1:]))).to(device)
            report.flags.update(_gradients(view, shaped, labels[chosen].to(device), threat))
    return report


@torch.no_grad()
def clean_logits(model: nn.Module, images: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """(n, K) float32 logits on the CPU.

    Raises:
        ModelContractError: the output of a batch is no floating point tensor (b, K).
    """
    view = ModelView(model, tuple(images.shape[1:]))
    return torch.cat([_checked_output(view, batch.to(device)).cpu() for batch in _batches(images, batch_size)])


def _batches(images: Tensor, batch_size: int) -> Iterator[Tensor]:
    return iter(images.split(batch_size))


def _checked_output(view: ModelView, batch: Tensor) -> Tensor:
    try:
        output = view(batch)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as problem:
        raise ModelContractError(
            f"A model maps images {tuple(batch.shape)} to logits; its forward pass failed: {problem}. "
            "Pass a model and data that fit each other."
        ) from problem
    if output.ndim != 2 or output.shape[0] != batch.shape[0]:
        raise ModelContractError(
            f"A model returns logits (n, classes); for {batch.shape[0]} images it returned shape "
            f"{tuple(output.shape)}. Return one row of logits an image."
        )
    return output


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Raise :class:`ModelContractError` unless these are finite logits of two or more classes."""
    classes = logits.shape[1]
    if classes < 2:
        raise ModelContractError(
            "A classifier returns at least two logits; found one. One logit is always the largest, so that "
            "every attack reports 100 %. Return (-f/2, f/2)."
        )
    finite = torch.isfinite(logits).all(dim=1)
    if not finite.all():
        raise ModelContractError(
            f"Logits are finite; found NaN or infinity for {int((~finite).sum())} of {len(logits)} images. "
            "Remove what overflows in the forward pass."
        )
    if int(labels.max()) >= classes:
        raise ModelContractError(
            f"Labels are 0..{classes - 1} for {classes} logits; found {int(labels.max())}. "
            "Pass the labels of the classes that the model knows."
        )
    sums = logits.double().sum(dim=1)
    if logits.min() >= 0 and logits.max() <= 1 and ((sums - 1).abs() < 1e-4).all():
        raise ModelContractError(
            "A model returns logits; these outputs are probabilities (in [0, 1], rows sum to 1), through "
            "which cross-entropy has almost no gradient. Remove the softmax."
        )


def _relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two sets of logits, relative to their spread."""
    spread = float((a - a.mean(dim=1, keepdim=True)).abs().max().clamp_min(1e-30))
    return float((a - b).abs().max()) / spread


@torch.no_grad()
def _training_mode_matters(model: nn.Module, probe: Tensor) -> dict[str, str]:
    """Compare training and eval mode on copies of the buffers, so that batch norm keeps its statistics."""
    view = ModelView(model, tuple(probe.shape[1:]))
    settled = view(probe)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        moving = torch.func.functional_call(model, buffers, (probe.to(view.dtype),)).float()
        difference = _relative_difference(settled, moving)
    except (RuntimeError, ValueError):
        # Batch norm refuses a single value a channel in training mode: then the mode matters.
        difference = math.inf
    finally:
        for module, training in modes:
            module.training = training
    if difference < _SAME:
        return {}
    return {
        "train_mode": "the model was handed over in training mode, which changes its logits; "
        "it was evaluated in eval mode"
    }


def _behaviour(model: nn.Module, probe: Tensor) -> dict[str, str]:
    """Are logits a function of the image alone?"""
    view = ModelView(model, tuple(probe.shape[1:]))
    with torch.no_grad():
        first, second = view(probe), view(probe)
        repeated = _relative_difference(first, second)
        if not repeated < _SAME:
            return {"nondeterministic": f"two passes of one batch differ by {repeated:.1e} of the logits' spread"}
        # The mirrored images stand between the passes, so that a model that remembers its last call shows.
        view(1.0 - probe)
        others = {
            "the order of the batch": view(probe.flip(0)).flip(0),
            "the rest of the batch": torch.cat([view(part) for part in probe[:4].split(1)]),
            "earlier calls": view(probe),
        }
    with torch.enable_grad():
        others["the grad mode"] = view(probe.clone().requires_grad_()).detach()
    for cause, logits in others.items():
        difference = _relative_difference(first[: len(logits)], logits)
        if not difference < _SAME:
            return {"stateful": f"logits change by {difference:.1e} of their spread with {cause}"}
    return {}


def _optimises(model: nn.Module, probe: Tensor) -> dict[str, str]:
    """Does the forward pass run the autograd engine, as purification and test-time training do?"""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        entered = event == "call" and frame.f_globals.get("__name__") == "torch.autograd"
        calls += entered and frame.f_code.co_name in ("grad", "backward")

    previous = sys.getprofile()
    sys.setprofile(count)
    try:
        with torch.no_grad():
            ModelView(model, tuple(probe.shape[1:]))(probe[:1])
    finally:
        sys.setprofile(None)
        if callable(previous):
            sys.setprofile(previous)
        elif previous is not None:  # cProfile's own, which only it can put back
            previous.enable()
    if not calls:
        return {}
    return {"optimises_in_forward": f"the forward pass computes gradients itself, {calls} times for one image"}


def _logit_scale(logits: Tensor) -> tuple[float, dict[str, str]]:
    """Power of two that brings large or tiny margins to where cross-entropy has a float32 gradient."""
    top = logits.double().topk(2, dim=1).values
    margin = float((top[:, 0] - top[:, 1]).quantile(0.9))
    if margin == 0 or _SMALL_MARGIN <= margin <= _LARGE_MARGIN:
        return 1.0, {}
    exponent = math.floor(math.log2(_GOOD_MARGIN / margin))
    return 2.0**exponent, {
        "logit_scale": f"the 90th percentile of the gap between the two largest logits is {margin:.1e}; "
        f"attacks saw the logits times 2^{exponent}"
    }


def _gradients(view: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel) -> dict[str, str]:
    """Does the margin have a gradient, and does the margin follow it?"""
    inputs = images.clone().requires_grad_()
    with torch.enable_grad():
        start = margins(view(inputs), labels)
        gradient = torch.autograd.grad(start.sum(), inputs)[0].detach()
    absent = (gradient.flatten(1).abs().amax(dim=1) == 0) | ~torch.isfinite(gradient).flatten(1).all(dim=1)
    share = float(absent.float().mean())
    if share > _BLIND_SHARE:
        return {"zero_gradient": f"the margin has no gradient for {share:.0%} of {len(images)} images"}
    ratio = _followed(view, images[~absent], labels[~absent], start.detach()[~absent], gradient[~absent], threat)
    blind = float((ratio < _FOLLOWED).float().mean())
    if blind > 0.5:
        return {
            "shattered_gradient": f"small steps along the gradient lower the margin by less than "
            f"{_FOLLOWED:.0%} of what it promises for {blind:.0%} of {len(images)} images"
        }
    return {}


@torch.no_grad()
def _followed(
    view: ModelView, images: Tensor, labels: Tensor, start: Tensor, gradient: Tensor, threat: ThreatModel
) -> Tensor:
    """(n,) decrease of the margin over the one that the gradient promises; the best of three step lengths."""
    best = torch.full((len(images),), -math.inf, device=images.device)
    direction = steepest_descent(gradient, threat.norm)
    size = images[0].numel()
    least = _LEAST_STEP * {"Linf": 1.0, "L2": math.sqrt(size), "L1": float(size)}[threat.norm]
    for fraction in _STEP_FRACTIONS:
        moved = (images + max(fraction * threat.eps, least) * direction).clamp(0.0, 1.0)
        promised = -(gradient * (moved - images)).flatten(1).sum(dim=1)
        gained = start - margins(view(moved), labels)
        # At the border of [0, 1] nothing is promised, and nothing can be learnt.
        ratio = torch.where(promised > 0, gained / promised.clamp_min(1e-30), torch.inf)
        best = torch.maximum(best, ratio)
    return best
