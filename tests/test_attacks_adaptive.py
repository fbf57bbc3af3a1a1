"""Attacks that know the head, and the descent that they share."""

from __future__ import annotations

import warnings

import pyautoattack
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from convex_head.attacks import ModelView, resolve_attack
from convex_head.attacks.certified_margins import CertifiedMargins
from convex_head.attacks.conformance import linear_case, linear_distance
from convex_head.attacks.descent import descend, random_start, steepest_descent
from convex_head.attacks.torch_attacks import as_torchattack
from convex_head.attacks.view import margins
from convex_head.errors import AttackError
from convex_head.evaluate import evaluate
from convex_head.head import ConvexRobustHead
from convex_head.splice import replace_head
from convex_head.threat import ThreatModel


class Spliced(nn.Module):
    """Backbone and head, as ``replace_head`` makes them."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))
        return logits


@pytest.fixture(scope="module")
def spliced() -> tuple[Spliced, Tensor, Tensor]:
    """A smooth random backbone with a certified polynomial head on three classes of 5 x 5 images."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    images = 0.35 + 0.1 * torch.randn(60, 1, 5, 5)
    for column in range(3):
        images[labels == column, :, :, column + 1] += 0.3
    images = images.clamp(0, 1)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(25, 8), nn.Tanh()).eval().requires_grad_(False)
    with torch.no_grad():
        features = backbone(images)
    head = ConvexRobustHead(8, 3, radius=0.3, reg=2e-2).fit(features, labels, tol=0.2)
    return Spliced(backbone, head).eval(), images, labels


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_steepest_descent_is_the_steepest(norm: str) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(3, 1, 4, 5)
    direction = steepest_descent(gradient, norm)
    unit = ThreatModel(norm, 1.0)
    assert torch.allclose(unit.distance(torch.zeros_like(direction), direction), torch.ones(3), atol=1e-5)
    gain = -(gradient * direction).flatten(1).sum(dim=1)
    others = torch.randn(200, 3, 1, 4, 5)
    for other in others:
        size = unit.distance(torch.zeros_like(other), other).view(-1, 1, 1, 1)
        assert (gain >= -(gradient * other / size).flatten(1).sum(dim=1) - 1e-5).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_descent_solves_the_linear_problem(norm: str) -> None:
    model, images, labels = linear_case(2)
    threat = ThreatModel(norm, 0.5 * float(linear_distance(model, images, labels, norm).median()))
    view = ModelView(model, tuple(images.shape[1:]))
    with torch.no_grad():
        start = margins(view(images), labels)
    weight = model[1].weight
    dual = (weight[0] - weight[1]).abs().sum() if norm == "Linf" else (weight[0] - weight[1]).norm()
    best, value = descend(lambda x: margins(view(x), labels), images, images, threat, steps=30)
    assert torch.allclose(value, start - threat.eps * dual, atol=1e-3)
    assert (threat.distance(images, best) <= threat.eps * (1 + 1e-5)).all()


def test_random_start_is_inside_and_depends_on_its_generator_only() -> None:
    images = torch.rand(4, 1, 5, 5)
    for norm, eps in (("Linf", 0.1), ("L2", 0.5), ("L1", 1.0)):
        threat = ThreatModel(norm, eps)
        first, second = (random_start(images, threat, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, second) and not torch.equal(first, images)
        assert (threat.distance(images, first) <= eps * (1 + 1e-5)).all()


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.04), ("L2", 0.15), ("L1", 0.4)])
def test_feature_exact_is_at_least_as_strong_as_pgd(
    spliced: tuple[Spliced, Tensor, Tensor], norm: str, eps: float
) -> None:
    model, images, labels = spliced
    threat = ThreatModel(norm, eps)
    record = evaluate(model, (images, labels), threat, "feature-exact")
    assert record.flags == ()
    assert 0 < record.robust_correct < record.clean_correct
    if norm != "L1":
        pgd = "torchattacks:PGD(steps=50)" if norm == "Linf" else "torchattacks:PGDL2(steps=50)"
        both = evaluate(model, (images, labels), threat, ["feature-exact", pgd], skip_broken=False)
        assert both.attacks["feature-exact"]["broken"] >= both.attacks[pgd]["broken"]


def test_feature_exact_never_breaks_what_the_certificate_covers(
    spliced: tuple[Spliced, Tensor, Tensor],
) -> None:
    """If the pixel ball maps into the feature ball of positive worst-case margin, no attack may succeed."""
    model, images, labels = spliced
    # |phi(x') - phi(x)| <= |W|_2 |x' - x|_2, since tanh is 1-Lipschitz.
    lipschitz = float(torch.linalg.matrix_norm(model.backbone[1].weight.detach(), 2))
    threat = ThreatModel("L2", 0.05)
    reach = lipschitz * threat.eps / float(model.head.scale.min())
    with torch.no_grad():
        margin = model.head.worst_case_margin(model.backbone(images), labels, radius=reach)
    covered = margin > 0
    assert covered.any()
    record = evaluate(model, (images, labels), threat, "feature-exact")
    assert record.robust[covered.numpy()].all()


def test_feature_exact_counts_passes_through_the_backbone(spliced: tuple[Spliced, Tensor, Tensor]) -> None:
    model, images, labels = spliced
    view = ModelView(model, (1, 5, 5))
    attack = resolve_attack("feature-exact(steps=10, restarts=1)")
    result = attack.run(view, images[:1], labels[:1], ThreatModel("Linf", 1e-4), seed=0)
    # One pass for the target, six and six with gradients; one for the rivals, eleven with gradients for each of two;
    # one to measure.
    assert (result.forwards, result.backwards) == (1 + 12 + 1 + 22 + 1, 12 + 22)


class Gated(nn.Module):
    """1[g'z >= 0] times a linear map, plus a small linear part: gradients do not see the gate."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("gates", torch.randn(25, 6, generator=generator))
        self.register_buffer("values", torch.randn(6, 3, generator=generator))

    def forward(self, features: Tensor) -> Tensor:
        return ((features - 0.5) @ self.gates >= 0).float() @ self.values + 0.01 * (features @ self.gates)[:, :3]

    def soft_forward(self, features: Tensor, temperature: float) -> Tensor:
        return ((features - 0.5) @ self.gates / temperature).sigmoid() @ self.values


def test_soft_gate_breaks_what_gradients_do_not_see() -> None:
    torch.manual_seed(0)
    model = Spliced(nn.Flatten(), Gated()).eval()
    images = torch.rand(30, 1, 5, 5)
    labels = model(images).argmax(dim=1)
    record = evaluate(model, (images, labels), ThreatModel("Linf", 0.1), ["apgd-ce", "soft-gate"], skip_broken=False)
    assert record.attacks["soft-gate"]["broken"] >= record.attacks["apgd-ce"]["broken"] + 5


@pytest.mark.parametrize(
    ("attack", "head", "message"),
    [
        ("feature-exact", nn.Linear(25, 3), r"worst_case_features\(\)"),
        ("soft-gate", nn.Linear(25, 3), r"soft_forward\(\)"),
    ],
)
def test_a_head_without_the_method_is_refused(attack: str, head: nn.Module, message: str) -> None:
    model = Spliced(nn.Flatten(), head)
    with pytest.raises(AttackError, match=message):
        evaluate(model, (torch.rand(4, 1, 5, 5), torch.zeros(4).long()), ThreatModel("Linf", 0.1), attack)


def test_our_attack_is_a_torchattacks_attack(spliced: tuple[Spliced, Tensor, Tensor]) -> None:
    model, images, labels = spliced
    threat = ThreatModel("Linf", 0.04)
    attack = as_torchattack(model, "feature-exact", threat)
    assert isinstance(attack, torchattacks.attack.Attack)
    adversarial = attack(images, labels)
    assert (threat.distance(images, adversarial) <= threat.eps * (1 + 1e-5)).all()
    right = model(adversarial).argmax(dim=1) == labels
    record = evaluate(model, (images, labels), threat, "feature-exact", batch_size=len(images))
    assert right.tolist() == record.robust.tolist()
    # torchattacks' own combination takes it like one of its classes.
    both = torchattacks.MultiAttack([torchattacks.FGSM(model, eps=threat.eps), attack])
    union = model(both(images, labels)).argmax(dim=1) == labels
    assert (union <= right).all()


@pytest.mark.parametrize("name", ["FGSM", "PGD", "BIM", "MIFGSM", "APGD", "APGDT", "FAB", "CW", "DeepFool"])
def test_a_spliced_model_passes_through_torchattacks(spliced: tuple[Spliced, Tensor, Tensor], name: str) -> None:
    model, images, labels = spliced
    spec = f"torchattacks:{name}"
    if name == "APGDT":
        with pytest.raises(AttackError, match="at least 4 classes"):
            evaluate(model, (images[:6], labels[:6]), ThreatModel("Linf", 0.06), spec)
        return
    record = evaluate(model, (images[:6], labels[:6]), ThreatModel("Linf", 0.06), spec)
    assert record.flags == () and record.attacks[spec]["forwards"] > 0


def test_step_size_keeps_its_ratio_to_eps() -> None:
    """At eps = 64/255 the library's default of 2/255 a step cannot reach the border in ten steps."""
    model, images, labels = linear_case(4)
    view = ModelView(model, tuple(images.shape[1:]))
    threat = ThreatModel("Linf", "64/255")
    result = resolve_attack("torchattacks:PGD(random_start=False)").run(view, images, labels, threat, seed=0)
    reached = threat.distance(images, result.images)
    assert torch.allclose(reached[result.broken], torch.tensor(threat.eps), atol=1e-6)


def test_certified_margins_are_those_of_the_head_and_follow_danskin(
    spliced: tuple[Spliced, Tensor, Tensor],
) -> None:
    model, images, labels = spliced
    certified = CertifiedMargins(model, radius=0.2)
    x = images[:10].clone().requires_grad_()
    values = certified(x)
    for label in range(3):
        exact = model.head.worst_case_margin(model.backbone(images[:10]), torch.full((10,), label), 0.2)
        assert torch.allclose(values[:, label].double(), exact, atol=1e-4)
    assert ((values > 0).sum(dim=1) <= 1).all() and not values[:, 3].any()
    gradient = torch.autograd.grad(values.gather(1, labels[:10, None]).sum(), x)[0]
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
    step = 1e-2
    with torch.no_grad():
        ends = [certified(images[:10] + sign * step * direction) for sign in (1, -1)]
    slope = ((ends[0] - ends[1]) / (2 * step)).gather(1, labels[:10, None])[:, 0]
    assert torch.allclose((gradient * direction).flatten(1).sum(dim=1), slope, rtol=0.02, atol=0.02)


def test_autoattack_turns_on_the_certificate(spliced: tuple[Spliced, Tensor, Tensor]) -> None:
    model, images, labels = spliced
    threat = ThreatModel("Linf", 0.02)
    adversary = pyautoattack.AutoAttack(
        CertifiedMargins(model, 0.1), norm="Linf", eps=threat.eps, seed=0, version="custom", attacks=["apgd-ce"]
    )
    adversary.apgd.n_restarts = 1
    found, _ = adversary.run_standard_evaluation(images, labels, batch_size=60)
    exact = model.head.worst_case_margin(model.backbone(found), labels, 0.1)
    certified_under_attack = int((exact > 0).sum())
    robust = evaluate(model, (images, labels), threat, "apgd-ce").robust_correct
    reported = CertifiedMargins(model, 0.1)(found).argmax(dim=1) == labels
    assert int(reported.sum()) == certified_under_attack
    assert 0 < certified_under_attack < robust


def test_evaluate_adds_the_attacks_that_know_the_head():
    torch.manual_seed(0)
    features, labels = torch.randn(60, 4), torch.arange(60) % 3
    features[:, 0] += 3.0 * labels
    head = ConvexRobustHead(4, 3, reg=0.1).fit(features, labels, tol=0.1)
    model = replace_head(nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 3)), head, at="2")
    images = torch.rand(12, 1, 2, 2)
    arguments = {"data": (images, torch.arange(12) % 3), "threat": ThreatModel("Linf", 0.05), "attacks": ("fgsm",)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert set(evaluate(model, **arguments).attacks) == {"fgsm", "feature-exact"}
        assert set(evaluate(model, adaptive=False, **arguments).attacks) == {"fgsm"}
        assert set(evaluate(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), **arguments).attacks) == {"fgsm"}
