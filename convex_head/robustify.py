"""From a backbone, training data and a pixel threat to a spliced robust model in one call.

Pixel eps and feature radius are not linked by theory, so ``radius="auto"`` measures: it follows a warm-started path
of regularisations and radii, attacks the spliced model end to end at the pixel eps on a validation split taken from the
*training* data, and keeps the pair with the best robust validation accuracy. The test set plays no part.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from convex_head.baselines.pgd import pgd_accuracy
from convex_head.console import clock, messages
from convex_head.data import as_pair
from convex_head.displacement import MovedImages, attacked_images
from convex_head.errors import ChoiceWarning, ConvergenceWarning, InputError, RadiusError
from convex_head.features import extract_features
from convex_head.head import ConvexRobustHead
from convex_head.splice import SplicedModel, replace_head
from convex_head.threat import ThreatModel
from convex_head.validation import check_radius, check_reg

# (radii, regs) of "auto", in the units of either standardisation.
GRIDS = {
    "whiten": ((0.5, 0.7, 1.0, 1.4), (0.01, 0.003)),
    "scale": ((0.25, 0.5, 1.0, 2.0), (0.1, 0.03)),
}
# Further radii of "auto", with "whiten", each tried where the one before is the best so far. They go beyond what the
# threat reaches: one that wins no more under attack than it loses when clean is passed over.
WIDER = (2.0, 2.8, 4.0)
# Candidates stop at so many times the gap of the head that is returned.
LOOSE = 5.0
# Images that are attacked to shape the ellipsoid, and steps: four times as many images, or ten steps, shaped it no
# better.
SHAPE_IMAGES, SHAPE_STEPS = 2000, 3
# For the distance of radius 0 to 1.
_LEAST_RADIUS = 1e-9
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Candidate:
    """One head of the path.

    Attributes:
        radius, reg: its settings.
        clean, robust: accuracy on the validation images, without attack and under the validation attack.
        gap: its relative duality gap.
        round: adversarial rounds before it; 0 is a fit on clean features.
        allowed: it keeps as much clean accuracy as ``max_clean_drop`` asks for and, where its radius is one that "auto"
            added to the usual ones, wins more under attack than it loses when clean, against the best before it.
        chosen: its settings are those of the head that is returned.
    """

    radius: float
    reg: float
    clean: float
    robust: float
    gap: float
    round: int = 0
    allowed: bool = True
    chosen: bool = False


def robustify(
    backbone: nn.Module,
    train_data: Any,
    threat: ThreatModel,
    *,
    radius: float | str = "auto",
    reg: float | str = "auto",
    at: str | None = None,
    radii: Sequence[float] | None = None,
    regs: Sequence[float] | None = None,
    validation_share: float = 0.2,
    tol: float = 1e-2,
    max_seconds: float | None = None,
    batch_size: int = 256,
    seed: int = 0,
    standardise: str = "whiten",
    shape_rounds: int = 1,
    rounds: int = 0,
    max_clean_drop: float | None = None,
    cache_dir: Any = None,
    progress: Callable[[str], Any] | bool | None = None,
    **head_settings: Any,
) -> SplicedModel:
    """Extract features, choose radius and regularisation, fit a certified head on all of them, splice.

    Args:
        backbone: images in [0, 1] to logits; copied, never changed.
        train_data: a dataset name, an (images, labels) pair, a Dataset or a DataLoader. Training data only.
        threat: the pixel threat; Linf or L2 for "auto" and for "whiten".
        radius: feature radius in standardised units, or "auto" to choose among ``radii``; where these are not given and
            the largest is the best, with "whiten", among larger ones too, each of which has to win more accuracy under
            attack than it loses when clean.
        reg: regularisation weight, or "auto" to choose among ``regs``.
        at: node where the head goes; the classifier if None (see :func:`~convex_head.splice.replace_head`).
        validation_share: share of the training data that candidates are compared on and not fitted on.
        tol: relative gap of the head that is returned; candidates stop at five times it.
        max_seconds: limit of one fit.
        batch_size: images in one pass through the backbone.
        seed: of the ellipsoid, the split and the fits.
        standardise: "whiten" measures how far the threat moves features (:mod:`convex_head.displacement`) and gives the
            head a matrix behind which displacements have one covariance and are 1 long on average in the direction
            they aim at: an ellipsoid of features, still exact, and a radius of 1 is what the threat reaches. "scale"
            is the round ball of features of deviation 1.
        shape_rounds: with "whiten", before all other fits: how often a head is fitted on the rows of the candidates (at
            the radius nearest to 1, in ratio, and the smallest reg, to the gap of a candidate), attacked on 2,000 of
            their images in three steps, and what that moves mixed into the ellipsoid, which all heads then keep.
        rounds: adversarial rounds after the choice of radius and reg: attack the fitted images, add the features of
            what is found as further centres, refit. Validation chooses the number, 0 among them.
        max_clean_drop: most that a candidate may lose against the backbone as given, in clean validation accuracy: 0.01
            is one point. Others are passed over; where none is left, the one with the best clean accuracy is taken,
            with a :class:`~convex_head.errors.ChoiceWarning`. None: robust accuracy alone decides.
        cache_dir: folder of the feature cache, or None.
        progress: True for a line a step on stderr, with the time left, or a function that gets the lines.
        **head_settings: passed to :class:`~convex_head.head.ConvexRobustHead` (loss, coefficients, ...).

    Returns:
        The spliced model; ``model.path_`` holds every :class:`Candidate`, ``model.head.result_`` the certificate.

    Raises:
        RadiusError, RegularisationError: a candidate is not admissible.
        InputError: ``validation_share`` is not inside (0, 1), or leaves no example on a side; ``standardise`` is no
            name above; ``rounds`` or ``shape_rounds`` is no whole number of at least 0; ``max_clean_drop`` is not
            inside [0, 1], there is one candidate only, or the backbone does not predict these classes; the threat
            moves no feature.
    """
    if standardise not in GRIDS:
        raise InputError(f"standardise must be 'whiten' or 'scale'; found {standardise!r}.")
    for name, value in (("rounds", rounds), ("shape_rounds", shape_rounds)):
        if not isinstance(value, Integral) or value < 0:
            raise InputError(f"{name} must be a whole number of at least 0; found {value}. 0 takes no attack.")
    if max_clean_drop is not None and not 0 <= max_clean_drop <= 1:
        raise InputError(f"max_clean_drop must be in [0, 1] or None; found {max_clean_drop!r}. 0.01 is one point.")
    images, labels = as_pair(train_data)
    num_classes = int(labels.max()) + 1
    usual_radii, usual_regs = GRIDS[standardise]
    path_radii = _candidates("radius", radius, usual_radii if radii is None else radii)
    path_regs = _candidates("reg", reg, usual_regs if regs is None else regs)
    candidates = len(path_radii) * len(path_regs)
    if max_clean_drop is not None and candidates == 1:
        raise InputError("max_clean_drop chooses among candidates; found one. Pass several radii or regs.")
    is_open = radius == "auto" and radii is None and standardise == "whiten"
    steps = [2 + (standardise == "whiten") * (1 + shape_rounds)]
    steps[0] += candidates + rounds + (max_clean_drop is not None) if candidates > 1 else 0
    say = _teller(progress, steps)
    say("extracting features")
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    labels = labels.to(device)

    def splice(head: nn.Module) -> SplicedModel:
        return replace_head(backbone, head, at=at, example_input=images[:2])

    probe = splice(nn.Identity()).backbone
    features = extract_features(probe, images, batch_size=batch_size, cache_dir=cache_dir).to(device)
    everything = torch.arange(len(labels))

    def fit(r: float, b: float, rows: Tensor, aim: float, start: Any, more: Sequence[Any] = ()) -> ConvexRobustHead:
        head = ConvexRobustHead(features.shape[1], num_classes, radius=r, reg=b, **head_settings).to(device)
        x = torch.cat([features[rows], *more])
        y = labels[rows].repeat(1 + len(more))
        return head.fit(x, y, tol=aim, max_seconds=max_seconds, progress=False, seed=seed, start=start)

    def fit_loosely(r: float, b: float, rows: Tensor, start: Any, more: Sequence[Any] = ()) -> ConvexRobustHead:
        with warnings.catch_warnings():
            # Such heads may stop early; their gaps stand in the path and in the lines of the progress.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return fit(r, b, rows, LOOSE * tol, start, more)

    def validated(head: ConvexRobustHead, number: int) -> Candidate:
        clean, robust = pgd_accuracy(splice(head), images[held_out], labels[held_out], threat)
        assert head.result_ is not None
        after = f", round {number}" if number else ""
        say(f"radius {head.radius:g}, reg {head.reg:g}{after}: validation clean {clean:.3f}, robust {robust:.3f}")
        return Candidate(head.radius, head.reg, clean, robust, head.result_.gap, number, clean >= least_clean)

    def adversarial(head: ConvexRobustHead, rows: Tensor) -> Tensor:
        found = attacked_images(splice(head), images[rows], labels[rows], threat, batch_size)
        return extract_features(probe, found, batch_size=batch_size).to(device)

    def best_of(path: Sequence[Candidate]) -> int:
        if not any(candidate.allowed for candidate in path):
            return max(range(len(path)), key=lambda i: (path[i].clean, path[i].robust))
        return max(range(len(path)), key=lambda i: (path[i].allowed, path[i].robust, path[i].clean))

    def measure_ellipsoid(rows: Tensor) -> None:
        if standardise != "whiten":
            return
        say("measuring how far the threat moves the features")
        scaled = bool(head_settings.get("standardize", True))
        sample = MovedImages(probe, images, features, threat, seed=seed, batch=batch_size, standardize=scaled)
        shift, attacked = sample.ascended()[1], []
        head_settings["whitening"] = sample.whitening(shift)
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        drawn = rows[drawn[:SHAPE_IMAGES]]
        r = min(sorted(path_radii), key=lambda candidate: abs(math.log(max(candidate, _LEAST_RADIUS))))
        for number in range(1, shape_rounds + 1):
            head = fit_loosely(r, min(path_regs), rows, None)
            model = splice(head)
            found = attacked_images(model, images[drawn], labels[drawn], threat, batch_size, steps=SHAPE_STEPS)
            attacked.append(sample.shift(found, drawn))
            head_settings["whitening"] = sample.whitening(shift, attacked)
            assert head.result_ is not None
            say(f"shaped by attacks on a head of gap {head.result_.gap:.3f}, round {number}")

    least_clean = 0.0
    path: list[Candidate] = []
    start, chosen_rounds = None, rounds
    chosen_radius, chosen_reg = path_radii[0], path_regs[0]
    if candidates == 1:
        measure_ellipsoid(everything)
    else:
        rest, held_out = _split(len(labels), validation_share, seed)
        if max_clean_drop is not None:
            least_clean = _accuracy(backbone, images[held_out], labels[held_out], num_classes, batch_size)
            say(f"the network as given: validation clean {least_clean:.3f}")
            least_clean -= max_clean_drop + _ROUNDING
        measure_ellipsoid(rest)
        heads: list[ConvexRobustHead] = []
        for b in path_regs:
            # From the same radius at the reg before, then from the radius before.
            start = heads[-len(path_radii)].result_ if heads else None
            for r in path_radii:
                head = fit_loosely(r, b, rest, start)
                start = head.result_
                path.append(validated(head, 0))
                heads.append(head)
        for r in WIDER if is_open else ():
            best = best_of(path)
            if path[best].radius < max(candidate.radius for candidate in path):
                break
            steps[0] += 1
            heads.append(fit_loosely(r, path[best].reg, rest, heads[best].result_))
            wider = validated(heads[-1], 0)
            pays = wider.robust - path[best].robust > path[best].clean - wider.clean
            path.append(replace(wider, allowed=wider.allowed and pays))
        best = best_of(path)
        chosen_radius, chosen_reg, head, more = path[best].radius, path[best].reg, heads[best], []
        for number in range(1, rounds + 1):
            more.append(adversarial(head, rest))
            head = fit_loosely(chosen_radius, chosen_reg, rest, head.network(), more)
            path.append(validated(head, number))
            heads.append(head)
        best = best_of(path)
        if not path[best].allowed:
            warnings.warn(
                f"no candidate keeps a validation accuracy of {least_clean:.3f} when clean; the best has "
                f"{path[best].clean:.3f}. Smaller radii, or a larger max_clean_drop, would do.",
                ChoiceWarning,
                stacklevel=2,
            )
        start, chosen_rounds = heads[best].network(), path[best].round
        path[best] = replace(path[best], chosen=True)
    say(f"fitting radius {chosen_radius:g}, reg {chosen_reg:g} on all {len(labels)} examples")
    head, more = fit(chosen_radius, chosen_reg, everything, tol, start), []
    for _ in range(chosen_rounds):
        more.append(adversarial(head, everything))
        head = fit(chosen_radius, chosen_reg, everything, tol, head.network(), more)
    model = splice(head)
    model.path_ = tuple(path)
    return model


def _candidates(name: str, value: float | str, auto: Sequence[float]) -> list[float]:
    check = check_radius if name == "radius" else check_reg
    if isinstance(value, str):
        if value != "auto":
            raise RadiusError(f"{name} must be a number or 'auto'; found {value!r}.")
        if not auto:
            raise InputError(f"{name}='auto' needs at least one candidate; found none. Pass {name}s or a number.")
        return [check(v) for v in auto]
    return [check(value)]


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor, num_classes: int, batch_size: int) -> float:
    """Clean accuracy of images to logits."""
    logits = extract_features(model, images, batch_size=batch_size)
    if logits.shape[1] != num_classes:
        raise InputError(
            f"max_clean_drop compares with the backbone as given, which must have one output a class; found "
            f"{logits.shape[1]} outputs and {num_classes} classes."
        )
    return float((logits.argmax(1) == labels.cpu()).double().mean())


def _split(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Random (rest, held out) rows."""
    if not 0 < share < 1 or not 0 < int(share * n) < n:
        raise InputError(
            f"validation_share must leave examples on both sides; found {share!r} of {n} examples. Use for example 0.2."
        )
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held_out = int(share * n)
    return shuffled[held_out:], shuffled[:held_out]


def _teller(progress: Callable[[str], Any] | bool | None, steps: list[int]) -> Callable[[str], Any]:
    """What to call with one line at each step; the lines on stderr say how far of ``steps[0]``, which may grow."""
    if callable(progress):
        return progress
    if not progress:
        return lambda line: None
    console, began, told = messages(), monotonic(), 0

    def say(line: str) -> None:
        nonlocal told
        told += 1
        elapsed = monotonic() - began
        left = f", about {clock(elapsed * (steps[0] - told + 1) / (told - 1))} left" if told > 2 else ""
        console.print(f"[{told}/{steps[0]}] {line}{left}", style="dim", markup=False)

    return say
