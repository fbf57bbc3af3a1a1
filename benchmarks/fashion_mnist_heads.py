"""The heads that the suite compares: name -> how it is fitted on a frozen backbone, and what that cost.

All see the same 10,000 images, choose on the same fifth of them by accuracy under one attack at the same pixel eps,
and are then fitted on all. ``HEADS`` is the list; a head is one line of it.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fashion_mnist_backbones import HeadData
from convex_head.baselines import MLPHead, PGDAdversarialTraining, Recipe, Trades, linear_head, train
from convex_head.baselines.pgd import pgd_accuracy
from convex_head.certificate_check import certificate_facts
from convex_head.displacement import MovedImages, attacked_images
from convex_head.errors import ConvergenceWarning
from convex_head.features import extract_features
from convex_head.head import ConvexRobustHead
from convex_head.robustify import GRIDS, SHAPE_IMAGES, SHAPE_STEPS, robustify
from convex_head.splice import Backbone, replace_head
from convex_head.threat import ThreatModel

Card = dict[str, Any]
Fit = Callable[[nn.Module, HeadData, ThreatModel, "Effort", int], tuple[nn.Module, Card]]


# A radius of 1 is what the threat reaches. "Shaped": attacks on a head have their part in the ellipsoid, as they do by
# default; without them the radii that were best were larger.
_SHAPED: Card = {"standardise": "whiten", "shape_rounds": 1}
# For little clean accuracy. Half a point on validation images: heads that lost up to one there lost two elsewhere.
_CLEAN: Card = _SHAPED | {"radii": (0.5, 0.7, 1.0), "regs": (0.003, 0.001), "max_clean_drop": 0.005}
_WHITENED: Card = {"radii": (0.5, 0.7, 1.0, 2.0), "regs": (0.01, 0.003), "standardise": "whiten", "shape_rounds": 0}
# Of the linear control.
_LINEAR_STEPS, _DECAYS = 1000, (1e-3, 1e-4)


@dataclass(frozen=True)
class Effort:
    """What fitting may cost; the same for every backbone.

    Attributes:
        epochs, lrs, hidden: of the two-layer heads; every learning rate is tried on the split.
        radii, regs, tol: of the convex heads.
        max_seconds: limit of one convex fit.
    """

    epochs: int = 6
    lrs: tuple[float, ...] = (0.02, 0.1)
    hidden: int = 256
    radii: tuple[float, ...] = (0.5, 1.0, 2.0)
    regs: tuple[float, ...] = (0.1, 0.03)
    tol: float = 0.03
    max_seconds: float = 120.0


@dataclass
class Cost:
    """CPU seconds of the process, and images through the backbone and back."""

    seconds: float = 0.0
    wall: float = 0.0
    forwards: int = 0
    backwards: int = 0

    def _count(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(module, Backbone):
            self.forwards += len(output)
            if output.requires_grad:
                output.register_hook(self._count_backward)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@contextmanager
def measured() -> Iterator[Cost]:
    """The cost of what runs inside."""
    cost = Cost()
    hook = nn.modules.module.register_module_forward_hook(cost._count)
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        yield cost
    finally:
        hook.remove()
        cost.seconds, cost.wall = time.process_time() - cpu, time.perf_counter() - wall


def _features(model: nn.Module, data: HeadData, at: str = "fc") -> Tensor:
    return extract_features(replace_head(model, nn.Identity(), at=at).backbone, data.images)


def _own(model: nn.Module, data: HeadData, threat: ThreatModel, effort: Effort, seed: int) -> tuple[nn.Module, Card]:
    return model, {}


def _linear(model: nn.Module, data: HeadData, threat: ThreatModel, effort: Effort, seed: int) -> tuple[nn.Module, Card]:
    with measured() as cost:
        spliced = replace_head(model, linear_head(_features(model, data), data.labels, 10), at="fc")
    return spliced, {"total": asdict(cost)}


def _mlp(
    model: nn.Module,
    data: HeadData,
    threat: ThreatModel,
    effort: Effort,
    seed: int,
    *,
    recipe: Recipe | None = None,
    at: str = "fc",
) -> tuple[nn.Module, Card]:
    """Two layers: on features alone, or end to end through the frozen backbone at adversarial images."""

    def fitted(lr: float, rows: Tensor) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = MLPHead(features.shape[1], 10, hidden=effort.hidden, features=features[rows])
        spliced = replace_head(model, head, at=at)
        spliced.head.requires_grad_(True)
        trained: nn.Module = spliced.head if recipe is None else spliced
        inputs = features if recipe is None else data.images
        train(
            trained,
            inputs[rows],
            data.labels[rows],
            recipe=recipe or "standard",
            threat=threat if recipe else None,
            epochs=effort.epochs,
            lr=lr,
            seed=seed,
        )
        return spliced.eval().requires_grad_(False)

    with measured() as total:
        features = _features(model, data, at)
        scores = []
        for lr in effort.lrs:
            candidate = fitted(lr, data.rest)
            clean, robust = pgd_accuracy(candidate, data.images[data.held_out], data.labels[data.held_out], threat)
            scores.append((robust, clean, lr))
        robust, clean, lr = max(scores)
        with measured() as last:
            spliced = fitted(lr, torch.arange(len(data.labels)))
    card = {"lr": lr, "validation_clean": clean, "validation_robust": robust}
    return spliced, {**card, "total": asdict(total), "last": asdict(last)}


@dataclass(frozen=True)
class Units:
    """z = (x - mean) / scale W, as a head standardises features; (p,), (p,) and (p, p), float64."""

    mean: Tensor
    scale: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, sample: MovedImages, shift: Tensor | None, attacked: Sequence[Tensor] = ()) -> Units:
        """Those of moved images, whose features were displaced so, and by attacks on heads so."""
        return cls(sample.mean, sample.scale, sample.whitening(shift, attacked))

    def of_features(self, features: Tensor) -> Tensor:
        """z (n, p) of features (n, p), float32."""
        return (((features.double() - self.mean) / self.scale) @ self.matrix).float()

    def on_features(self, head: nn.Linear) -> nn.Linear:
        """The head on z as one on features."""
        weight = (head.weight.double() @ self.matrix.mT) / self.scale
        raw = nn.Linear(*weight.shape[::-1])
        raw.weight.data.copy_(weight)
        raw.bias.data.copy_(head.bias.double() - weight @ self.mean)
        return raw.requires_grad_(False)


def _linear_in_ball(
    model: nn.Module,
    data: HeadData,
    threat: ThreatModel,
    effort: Effort,
    seed: int,
    *,
    at: str,
    settings: Card,
) -> tuple[nn.Module, Card]:
    """A linear head trained in ellipsoids as the convex heads are, where its worst cases are closed form.

    A shaped one is shaped by attacks on such a linear head, at radius 1 and the smallest decay.
    """
    probe = replace_head(model, nn.Identity(), at=at).backbone

    def standardised(rows: Tensor) -> tuple[Units, Tensor]:
        features = _features(model, data, at)
        sample = MovedImages(probe, data.images, features, threat, seed=seed)
        shift, attacked = sample.ascended()[1], []
        units = Units.of(sample, shift)
        for _ in range(settings["shape_rounds"]):
            spliced = fitted(units, units.of_features(features), 1.0, _DECAYS[-1], rows)
            drawn = rows[:SHAPE_IMAGES]
            found = attacked_images(spliced, data.images[drawn], data.labels[drawn], threat, steps=SHAPE_STEPS)
            attacked.append(sample.shift(found, drawn))
            units = Units.of(sample, shift, attacked)
        return units, units.of_features(features)

    def fitted(units: Units, z: Tensor, radius: float, decay: float, rows: Tensor) -> nn.Module:
        head = hinge_in_ball(z[rows], data.labels[rows], radius, decay)
        return replace_head(model, units.on_features(head), at=at)

    with measured() as total:
        known = standardised(data.rest)
        scores = []
        for radius in settings["radii"]:
            for decay in _DECAYS:
                candidate = fitted(*known, radius, decay, data.rest)
                clean, robust = pgd_accuracy(candidate, data.images[data.held_out], data.labels[data.held_out], threat)
                scores.append((robust, clean, radius, decay))
        robust, clean, radius, decay = max(scores)
        with measured() as last:
            everything = torch.arange(len(data.labels))
            spliced = fitted(*standardised(data.rest), radius, decay, everything)
    card = {
        "radius": radius,
        "reg": decay,
        "shape_rounds": settings["shape_rounds"],
        "validation_clean": clean,
        "validation_robust": robust,
    }
    return spliced, {**card, "total": asdict(total), "last": asdict(last)}


def hinge_in_ball(z: Tensor, labels: Tensor, radius: float, decay: float) -> nn.Linear:
    """Minimise mean_i max_k (1 - (w_y - w_k)'z_i - b_y + b_k + radius |w_y - w_k|)_+ + decay/2 |W|^2 by Adam."""
    head = nn.Linear(z.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    own = nn.functional.one_hot(labels).bool()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _LINEAR_STEPS)
    for _ in range(_LINEAR_STEPS):
        logits = head(z)
        between = (head.weight[:, None] - head.weight).square().sum(-1).clamp_min(1e-12).sqrt()
        margins = logits[own].unsqueeze(1) - logits - radius * between[labels]
        loss = (1 - margins).masked_fill(own, 0.0).clamp_min(0).amax(1).mean()
        optimizer.zero_grad()
        (loss + 0.5 * decay * head.weight.square().sum()).backward()
        optimizer.step()
        schedule.step()
    return head.requires_grad_(False)


def _convex(
    model: nn.Module,
    data: HeadData,
    threat: ThreatModel,
    effort: Effort,
    seed: int,
    *,
    at: str = "fc",
    rounds: int = 0,
    radii: tuple[float, ...] | None = None,
    regs: tuple[float, ...] | None = None,
    standardise: str = "scale",
    shape_rounds: int = 0,
    max_clean_drop: float | None = None,
    **settings: Any,
) -> tuple[nn.Module, Card]:
    """``robustify`` with radius="auto"; then the chosen settings by themselves, for the cost of one fit."""
    usual = (effort.radii, effort.regs) if standardise == "scale" else (None, None)
    choose: Card = {"radii": radii or usual[0], "regs": regs or usual[1]}
    choose |= {"rounds": rounds, "max_clean_drop": max_clean_drop}
    common = {"at": at, "tol": effort.tol, "max_seconds": effort.max_seconds, "seed": seed, **settings}
    common |= {"standardise": standardise, "shape_rounds": shape_rounds}
    pair = (data.images, data.labels)
    with warnings.catch_warnings():
        # Gaps stand in the card and in the table.
        warnings.simplefilter("ignore", ConvergenceWarning)
        with measured() as total:
            spliced = robustify(model, pair, threat, **choose, **common)
        head, path = spliced.head, spliced.path_
        assert isinstance(head, ConvexRobustHead)
        best = next(candidate for candidate in path if candidate.chosen)
        with measured() as last:
            robustify(model, pair, threat, radius=head.radius, reg=head.reg, rounds=best.round, **common)
    card = {
        **certificate_facts(head),
        "standardise": standardise,
        "shape_rounds": shape_rounds,
        "rounds": best.round,
        "validation_clean": best.clean,
        "validation_robust": best.robust,
        "path": [asdict(candidate) for candidate in path],
    }
    return spliced, {**card, "total": asdict(total), "last": asdict(last)}


# On the SAM backbone the first grid ended at its largest radius; a second one, at the reg that was best there.
_WIDE: Card = {"radii": (2.0, 3.0, 4.0, 6.0), "regs": (0.03,)}

HEADS: dict[str, Fit] = {
    "own": _own,
    "linear": _linear,
    "linear_deep_whitened": partial(_linear_in_ball, at="pool", settings=_WHITENED),
    "linear_deep_shaped": partial(_linear_in_ball, at="pool", settings=_SHAPED | {"radii": GRIDS["whiten"][0]}),
    "mlp": _mlp,
    "mlp_at": partial(_mlp, recipe=PGDAdversarialTraining()),
    "mlp_trades": partial(_mlp, recipe=Trades()),
    "mlp_at_deep": partial(_mlp, recipe=PGDAdversarialTraining(), at="pool"),
    "mlp_trades_deep": partial(_mlp, recipe=Trades(), at="pool"),
    "convex": _convex,
    "convex_wide": partial(_convex, **_WIDE),
    "convex_whitened": partial(_convex, **_WHITENED),
    "convex_shaped": partial(_convex, **_SHAPED),
    "convex_rounds": partial(_convex, rounds=2, **_WIDE),
    "convex_deep": partial(_convex, at="pool"),
    "convex_deep_rounds": partial(_convex, at="pool", rounds=4, radii=(0.5, 2.0), regs=(0.1,)),
    "convex_deep_whitened": partial(_convex, at="pool", **_WHITENED),
    "convex_deep_whitened_clean": partial(_convex, at="pool", max_clean_drop=0.01, **_WHITENED),
    "convex_deep_shaped": partial(_convex, at="pool", **_SHAPED),
    "convex_deep_shaped_clean": partial(_convex, at="pool", **_CLEAN),
    "convex_deep_wide": partial(_convex, at="pool", radii=(4.0, 8.0), regs=(0.3, 0.1)),
    "relu": partial(_convex, activation="relu"),
    "gated_relu": partial(_convex, activation="gated_relu"),
}


def fit_head(
    name: str, model: nn.Module, data: HeadData, threat: ThreatModel, effort: Effort, seed: int
) -> tuple[nn.Module, Card]:
    """The model with that head, and a card: settings, validation accuracies, ``total`` and ``last`` cost.

    ``total`` has the choice of hyperparameters in it, ``last`` is the fit with the chosen ones alone.
    """
    return HEADS[name](copy.deepcopy(model), data, threat, effort, seed)
