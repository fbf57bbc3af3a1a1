"""AutoAttack for every class count and shape, and attacks of libraries that may be missing."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from attack_cases import view_of
from torch import nn

from convex_head.attacks import Attack, ModelView, resolve_attack
from convex_head.attacks.auto_attack import AutoAttack, Component
from convex_head.attacks.base import run_stages
from convex_head.attacks.conformance import check_attack, linear_distance
from convex_head.attacks.view import attack_shape, is_right
from convex_head.errors import AttackError, MissingExtraError
from convex_head.threat import ThreatModel


def shortened(stages: tuple[Attack, ...]) -> list[Component]:
    """The stages with 30 queries of square instead of 5,000."""
    assert all(isinstance(stage, Component) for stage in stages)
    components: list[Component] = [stage for stage in stages if isinstance(stage, Component)]
    return [Component("square", queries=30) if stage.kind == "square" else stage for stage in components]


@pytest.mark.parametrize(
    ("num_classes", "kinds", "targets"),
    [
        (2, ["apgd-ce", "fab", "fab-t", "square"], 1),
        (3, ["apgd-ce", "apgd-dlr", "fab", "fab-t", "square"], 2),
        (4, ["apgd-ce", "apgd-t", "fab-t", "square"], 3),
        (9, ["apgd-ce", "apgd-t", "fab-t", "square"], 8),
        (10, ["apgd-ce", "apgd-t", "fab-t", "square"], 9),
        (100, ["apgd-ce", "apgd-t", "fab-t", "square"], 9),
    ],
)
def test_the_usable_set_of_autoattack(num_classes: int, kinds: list[str], targets: int) -> None:
    view = view_of(num_classes)[0]
    stages = AutoAttack().stages(view, num_classes, ThreatModel("Linf", 0.1))
    assert [stage.name for stage in stages] == kinds
    assert {stage.settings()["targets"] for stage in stages if stage.name.endswith("-t")} == {targets}


@pytest.mark.parametrize(
    ("num_classes", "shape", "norm"),
    [
        (2, (30,), "Linf"),
        (3, (1, 4, 5), "L2"),
        (4, (30,), "L2"),
        (4, (4, 5), "L1"),
    ],
)
def test_autoattack_runs_when_points_survive(num_classes: int, shape: tuple[int, ...], norm: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), num_classes)).eval()
    images = torch.rand(1, *shape)
    labels = model(images).argmax(dim=1)
    view = ModelView(model, shape)
    batch = images.reshape(1, *attack_shape(shape))
    threat = ThreatModel(norm, 1e-4)
    for stage in shortened(AutoAttack().stages(view, num_classes, threat)):
        result = stage.run(view, batch, labels, threat, seed=0)
        assert not result.broken.any() and result.outside == 0, stage.name


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("shape", [(30,), (1, 4, 5)], ids=str)
def test_square_breaks_folded_images(shape: tuple[int, ...], norm: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 3)).eval()
    images = 0.3 + 0.4 * torch.rand(8, *shape)
    labels = model(images).argmax(dim=1)
    distance = linear_distance(nn.Sequential(model[0], model[1]), images, labels, norm)
    threat = ThreatModel(norm, 4.0 * float(distance.median()))
    view = ModelView(model, shape)
    batch = images.reshape(8, *attack_shape(shape))
    result = Component("square", queries=300).run(view, batch, labels, threat, seed=0)
    assert result.broken.any() and result.outside == 0
    assert not (result.broken & (distance > threat.eps)).any()


@pytest.mark.parametrize(("kind", "classes"), [("apgd-dlr", 2), ("apgd-t", 3)])
def test_a_component_that_needs_more_classes_is_refused(kind: str, classes: int) -> None:
    with pytest.raises(AttackError, match=f"{kind} needs at least {classes + 1} classes"):
        resolve_attack(kind).stages(view_of(classes)[0], classes, ThreatModel("Linf", 0.1))


def test_versions_of_autoattack() -> None:
    view, threat = view_of(10)[0], ThreatModel("Linf", 0.1)
    plus = [stage.name for stage in resolve_attack("autoattack-plus").stages(view, 10, threat)]
    assert plus == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    rand = resolve_attack("autoattack-rand").stages(view, 10, threat)
    assert [(stage.name, stage.settings()) for stage in rand] == [
        ("apgd-ce", {"restarts": 1, "eot": 20}),
        ("apgd-dlr", {"restarts": 1, "eot": 20}),
    ]
    with pytest.raises(AttackError, match="standard, plus, rand"):
        AutoAttack("fast")


def test_run_stages_never_returns_a_point_that_is_not_adversarial() -> None:
    view, images, labels = view_of(4)
    threat = ThreatModel("Linf", 0.01)
    found = run_stages(resolve_attack("apgd-ce"), view, images, labels, threat, seed=0)
    changed = (found != images).flatten(1).any(dim=1)
    assert changed.any() and not changed.all()
    assert not is_right(view, found[changed], labels[changed]).any()


@pytest.mark.parametrize("attack", ["foolbox:LinfPGD", "foolbox:L2DeepFoolAttack", "foolbox:L1PGD(steps=20)"])
def test_foolbox_attacks_conform_where_it_is_installed(attack: str) -> None:
    pytest.importorskip("foolbox")
    check_attack(attack)


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, attack in (("foolbox", "foolbox:LinfPGD"), ("torchattacks", "pgd")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match="pip install"):
            resolve_attack(attack)
