"""The attack interface: measured success, isolation, the registry."""

from __future__ import annotations

import logging
import random
import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from attack_cases import view_of
from torch import Tensor, nn

from convex_head.attacks import Attack, ModelView, attack_names, register_attack, resolve_attack
from convex_head.attacks.base import within
from convex_head.attacks.conformance import check_attack
from convex_head.attacks.registry import resolve_attacks
from convex_head.attacks.view import attack_shape, is_right
from convex_head.errors import AttackContractError, AttackError, UnknownAttackError
from convex_head.threat import ThreatModel


class Returns(Attack):
    """An attack that returns what it is told to."""

    name = "returns"

    def __init__(self, make: Any) -> None:
        self._make = make

    def perturb(self, model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
        result: Tensor = self._make(images)
        return result


# -- measuring ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda images: images + 0.2,
        lambda images: torch.full_like(images, torch.nan),
        lambda images: images * 1e30,
    ],
    ids=["beyond eps", "NaN", "outside [0, 1]"],
)
def test_points_outside_the_threat_set_are_not_broken(make: Any) -> None:
    view, images, labels = view_of()
    result = Returns(make).run(view, images, (labels + 1) % 4, ThreatModel("Linf", 0.1), seed=0)
    assert result.outside == len(images)
    assert torch.equal(result.images, images)
    # The labels are all wrong, so that the clean images themselves would count as broken.
    assert not result.broken.any()


@pytest.mark.parametrize("make", [lambda images: images[:1], lambda images: images.numpy()])
def test_a_result_of_another_shape_is_an_error(make: Any) -> None:
    view, images, labels = view_of()
    with pytest.raises(AttackContractError, match="returns a tensor of shape"):
        Returns(make).run(view, images, labels, ThreatModel("Linf", 0.1), seed=0)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_within_tells_rounding_from_cheating(norm: str) -> None:
    threat = ThreatModel(norm, 0.25)
    images = torch.full((1, 1, 2, 2), 0.5)
    direction = torch.zeros_like(images)
    direction[..., 0, 0] = 0.25
    assert within(images, images + direction * (1 + 1e-6), threat).all()
    assert not within(images, images + direction * 1.01, threat).any()


def test_nothing_is_searched_at_eps_zero() -> None:
    view, images, labels = view_of()

    def refuse(images: Tensor) -> Tensor:
        raise AssertionError("called")

    result = Returns(refuse).run(view, images, labels, ThreatModel("L2", 0.0), seed=0)
    assert not result.broken.any()


# -- the view ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (3, 4), (3, 4, 4), (2, 3, 4, 4)])
def test_view_folds_any_shape_and_counts_passes(shape: tuple[int, ...]) -> None:
    seen: list[tuple[int, ...]] = []

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(tuple(x.shape[1:]))
            return torch.stack([x.flatten(1).sum(dim=1), x.flatten(1).square().sum(dim=1)], dim=1)

    view = ModelView(Model(), shape, scale=0.5)
    images = torch.rand(5, *attack_shape(shape), requires_grad=True)
    logits = view(images)
    logits.sum().backward()
    assert seen == [shape]
    assert torch.allclose(logits[:, 0], 0.5 * images.flatten(1).sum(dim=1))
    assert (view.passes.forwards, view.passes.backwards) == (5, 5)
    with torch.no_grad():
        view(images)
    assert (view.passes.forwards, view.passes.backwards) == (10, 5)


def test_view_gives_float32_for_a_float64_model() -> None:
    view = ModelView(nn.Linear(3, 2).double(), (3,))
    assert view(torch.rand(2, 1, 1, 3)).dtype == torch.float32


def test_view_has_a_zero_gradient_where_the_model_has_none() -> None:
    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()[:, :2]

    images = torch.rand(3, 1, 1, 4, requires_grad=True)
    view = ModelView(Detached(), (4,))
    gradient = torch.autograd.grad(view(images).sum(), images)[0]
    assert torch.equal(gradient, torch.zeros_like(images))


def test_writing_into_logits_does_not_reach_the_model() -> None:
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("logits", torch.tensor([[1.0, 2.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return self.logits  # type: ignore[no-any-return]

    model = Stored()
    with torch.no_grad():
        ModelView(model, (1,))(torch.rand(1, 1, 1, 1)).fill_(-torch.inf)
    assert torch.equal(model.logits, torch.tensor([[1.0, 2.0]]))


def test_not_finite_is_not_right() -> None:
    class Nan(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[torch.nan, 0.0], [1.0, 0.0]])

    right = is_right(ModelView(Nan(), (1,)), torch.rand(2, 1, 1, 1), torch.tensor([0, 0]))
    assert right.tolist() == [False, True]


# -- isolation ---------------------------------------------------------------------------------------------


def vandalise(model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
    """Everything that attack libraries were seen to do, and a little more."""
    from pyautoattack import checks

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    torch.set_grad_enabled(False)
    checks.funcs["grad"] += 7
    sys.settrace(None)
    log = logging.getLogger("auto-attack")
    log.addHandler(logging.NullHandler())
    log.setLevel(logging.DEBUG)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = torch.ones_like(parameter)
    model.train()
    return images


def test_nothing_of_an_attack_outlives_it() -> None:
    from pyautoattack import checks

    view, images, labels = view_of()
    model = view.inner
    model.train()
    model[1].eval()
    model[1].weight.requires_grad_(False)
    model[1].bias.grad = torch.full_like(model[1].bias, 2.0)
    log = logging.getLogger("auto-attack")
    before = (list(log.handlers), log.level, dict(checks.funcs), random.getstate(), torch.is_grad_enabled())
    numpy_state, torch_state = str(np.random.get_state()), torch.get_rng_state()

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        return None

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        resolve_attack(register_attack("vandal")(vandalise) and "vandal").run(
            view, images, labels, ThreatModel("Linf", 0.1), seed=0
        )
        assert sys.gettrace() is trace
    finally:
        sys.settrace(previous)
    assert before == (
        list(log.handlers),
        log.level,
        dict(checks.funcs),
        random.getstate(),
        torch.is_grad_enabled(),
    )
    assert numpy_state == str(np.random.get_state())
    assert torch.equal(torch_state, torch.get_rng_state())
    assert model.training and not model[1].training
    assert not model[1].weight.requires_grad and model[1].weight.grad is None
    assert model[1].bias.requires_grad and torch.equal(model[1].bias.grad, torch.full_like(model[1].bias, 2.0))


def test_an_attack_works_when_the_caller_has_gradients_off() -> None:
    view, images, labels = view_of()
    threat = ThreatModel("Linf", 0.1)
    with torch.no_grad():
        result = resolve_attack("fgsm").stages(view, 4, threat)[0].run(view, images, labels, threat, seed=0)
    assert result.broken.any()


# -- registry ----------------------------------------------------------------------------------------------


def test_ten_lines_register_an_attack() -> None:
    @register_attack("corner")
    def corner(
        model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int, sign: int = 1
    ) -> Tensor:
        return threat.project(images, images + sign * threat.eps)

    assert "corner" in attack_names()
    attack = resolve_attack("corner(sign=-1)")
    assert (attack.name, attack.settings()) == ("corner(sign=-1)", {"sign": -1})
    view, images, labels = view_of()
    moved = attack.run(view, images, labels, ThreatModel("Linf", 0.1), seed=0).images
    assert torch.allclose(moved, images - 0.1)


def test_a_class_can_be_registered() -> None:
    @register_attack("still")
    class Still(Attack):
        name = "still"

        def perturb(self, model: ModelView, images: Tensor, *others: Any, seed: int) -> Tensor:
            return images

    assert isinstance(resolve_attack("still"), Still)
    with pytest.raises(AttackContractError, match="breaks nothing"):
        check_attack("still")


def test_an_installed_package_can_bring_attacks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought_attack.py").write_text(
        "def brought(model, images, labels, threat, *, seed):\n    return images\n"
    )
    info = tmp_path / "brought_attack-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought-attack\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[convex_head.attacks]\nbrought = brought_attack:brought\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "brought" in attack_names()
    assert resolve_attack("brought").name == "brought"


@pytest.mark.parametrize(
    ("attack", "error", "message"),
    [
        ("no-such", UnknownAttackError, "No attack is registered as 'no-such'"),
        ("torchattacks:Nothing", UnknownAttackError, "torchattacks has no 'Nothing'"),
        ("torchattacks:AutoAttack", UnknownAttackError, "10 steps instead of 100"),
        ("torchattacks:PGD(step=3)", AttackError, "takes the settings .*found step"),
        ("torchattacks:PGD(eps=0.5)", AttackError, "eps, norm and seed come from the evaluation"),
        ("square(queries=)", AttackError, "key=value"),
        ("square(300)", AttackError, "key=value"),
        ("square(quantity=3)", AttackError, "does not take the settings"),
        ("feature-exact(steps=0)", AttackError, "steps >= 2"),
        ("soft-gate(temperatures=(0.0,))", AttackError, "positive temperatures"),
    ],
)
def test_attacks_that_cannot_be_resolved(attack: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve_attack(attack)


def test_names_that_cannot_be_registered() -> None:
    with pytest.raises(AttackError, match="holds no '\\('"):
        register_attack("a(b)")
    with pytest.raises(AttackError, match="a subclass"):
        register_attack("number")(3)


def test_cheap_attacks_first_and_black_boxes_last() -> None:
    order = [attack.name for attack in resolve_attacks(["square(queries=5)", "autoattack", "pgd", "fgsm"])]
    assert order == ["fgsm", "pgd", "autoattack", "square(queries=5)"]
    assert [a.name for a in resolve_attacks(("square", {"queries": 3}))] == ["square(queries=3)"]  # type: ignore[arg-type]
    with pytest.raises(AttackError, match="runs once"):
        resolve_attacks(["pgd", "pgd"])


@pytest.mark.parametrize(
    "attack", ["fgsm", "pgd", "torchattacks:PGDL2(steps=20)", "torchattacks:APGD", "deepfool", "apgd-ce"]
)
def test_built_in_attacks_conform(attack: str) -> None:
    check_attack(attack)


def test_conformance_finds_what_is_wrong() -> None:
    @register_attack("unseeded")
    def unseeded(model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(torch.seed() % 2**31))
        return threat.project(images, images + threat.eps * noise.sign())

    @register_attack("too-far")
    def too_far(model: ModelView, images: Tensor, labels: Tensor, threat: ThreatModel, *, seed: int) -> Tensor:
        return (images + 2 * threat.eps).clamp(0, 1)

    with pytest.raises(AttackContractError, match=r"two runs with one seed differ|breaks nothing"):
        check_attack("unseeded")
    with pytest.raises(AttackContractError, match="left the threat set"):
        check_attack("too-far")
