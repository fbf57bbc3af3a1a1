"""Does a new attack keep the contract? One call, for an attack's own tests.

    def test_my_attack():
        check_attack("my-attack")

It runs on small linear classifiers, whose distance to the decision boundary is known: with logits Wx + b, point x is
at distance

    d(x) = min_{k != y} ((w_y - w_k)'x + b_y - b_k) / |w_y - w_k|_dual

from it, so that no perturbation of norm below d(x) can break it. The check uses a ball somewhat larger than the
median distance: some points can be broken, some cannot.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from convex_head.attacks.base import Attack, AttackResult, within
from convex_head.attacks.registry import AttackLike, resolve_attack
from convex_head.attacks.view import ModelView
from convex_head.errors import AttackContractError
from convex_head.threat import ThreatModel

_SHAPE = (3, 6, 6)
_LARGER_THAN_MEDIAN = 1.3


def linear_case(num_classes: int, n: int = 12) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A linear classifier, images (n, 3, 6, 6) away from 0 and 1, and the labels (n,) that it gives them."""
    generator = torch.Generator().manual_seed(num_classes)
    linear = nn.Linear(108, num_classes)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(num_classes, 108, generator=generator))
        linear.bias.zero_()
    model = nn.Sequential(nn.Flatten(), linear).eval()
    images = 0.3 + 0.4 * torch.rand(n, *_SHAPE, generator=generator)
    with torch.no_grad():
        return model, images, model(images).argmax(dim=1)


@torch.no_grad()
def linear_distance(model: nn.Sequential, images: Tensor, labels: Tensor, norm: str) -> Tensor:
    """(n,) d(x) of the formula above: no smaller perturbation changes the class."""
    weight = next(model.parameters())
    logits = model(images)
    gap = logits.gather(1, labels[:, None]) - logits
    rows = weight[labels][:, None] - weight[None]
    dual = {"Linf": rows.abs().sum(dim=2), "L2": rows.norm(dim=2), "L1": rows.abs().amax(dim=2)}[norm]
    own = functional.one_hot(labels, logits.shape[1]).bool()
    return (gap / dual).masked_fill(own, torch.inf).amin(dim=1)


def check_attack(attack: AttackLike, *, num_classes: int = 4) -> None:
    """Run ``attack`` in every norm that it searches, and check what it may not do.

    Checked: the result stays inside the threat set; nothing is broken that provably cannot be, and something is
    that can be; one seed gives one result; random generators, training modes, gradients and requires_grad are as
    before.

    Raises:
        AttackContractError: which of these does not hold, in which norm.
    """
    resolved = resolve_attack(attack)
    model, images, labels = linear_case(num_classes)
    view = ModelView(model, _SHAPE)
    for norm in resolved.norms:
        distance = linear_distance(model, images, labels, norm)
        threat = ThreatModel(norm, _LARGER_THAN_MEDIAN * float(distance.median()))
        for stage in resolved.stages(view, num_classes, threat):
            result = _undisturbed(stage, view, images, labels, threat)
            again = stage.run(view, images, labels, threat, seed=0)
            faults = {
                "it broke points that cannot be broken": (result.broken & (distance > 1.001 * threat.eps)).any(),
                "it left the threat set": result.outside > 0 and not stage.minimum_norm,
                "its result is outside the threat set": not within(images, result.images, threat).all(),
                "two runs with one seed differ": not torch.equal(result.images, again.images),
                "it breaks nothing": not result.broken.any() and not stage.minimum_norm,
            }
            for fault, found in faults.items():
                if found:
                    raise AttackContractError(f"{stage.name} at {threat}: {fault}. Correct its perturb().")


def _undisturbed(stage: Attack, view: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel) -> AttackResult:
    """One run, after which process and model must be as before."""
    model = view.inner
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    before = _generators()
    result = stage.run(view, images, labels, threat, seed=0)
    parameters = list(model.parameters())
    kept = {
        "random generators": _generators() == before,
        "training modes": all(module.training for module in model.modules()),
        "gradients": all(p.grad is not None and bool((p.grad == 3).all()) for p in parameters),
        "requires_grad": all(parameter.requires_grad for parameter in parameters),
    }
    model.eval()
    for what, same in kept.items():
        if not same:
            raise AttackContractError(f"{stage.name} changed the {what}. Leave run() to the base class.")
    return result


def _generators() -> list[str]:
    return [str(random.getstate()), str(np.random.get_state()), str(torch.get_rng_state().tolist())]
