"""robustify: the choice of radius, the ellipsoid and the adversarial rounds."""

import sys

import pytest
import torch
from torch import nn

from convex_head import errors
from convex_head.baselines import preact_resnet_small, train
from convex_head.displacement import attacked_images, displacement_map
from convex_head.features import extract_features
from convex_head.robustify import _split, robustify
from convex_head.splice import replace_head
from convex_head.threat import ThreatModel

THREAT = ThreatModel("Linf", 0.1)


@pytest.fixture(scope="module")
def setting():
    """A trained backbone and its images: a bright bar whose place is the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    images = 0.4 * torch.rand(90, 1, 8, 8, generator=generator)
    for k in range(3):
        images[labels == k, :, 2 * k : 2 * k + 3] += 0.3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = preact_resnet_small(3, widths=(4, 8))
    train(model, images, labels, epochs=4, batch_size=30, lr=0.05)
    return model.requires_grad_(False), images, labels


def chosen(setting, **settings):
    model, images, labels = setting
    return robustify(model, (images, labels), THREAT, radii=(0.25, 0.5), regs=(0.1,), tol=0.1, **settings)


def test_the_best_validated_candidate_is_returned(setting):
    model = chosen(setting)
    best = max(model.path_, key=lambda one: (one.robust, one.clean))
    assert [one.radius for one in model.path_] == [0.25, 0.5] and {one.round for one in model.path_} == {0}
    assert (model.head.radius, model.head.reg) == (best.radius, best.reg)
    assert [one for one in model.path_ if one.chosen] == [best]


def test_clean_accuracy_can_be_kept(setting, monkeypatch):
    """The candidates' validation accuracies are given, relative to what the network itself has there."""
    model, images, labels = setting
    held_out = _split(len(labels), 0.2, 0)[1]
    own = float((model(images[held_out]).argmax(1) == labels[held_out]).double().mean())
    scores = {0.25: (own - 0.03, 0.5), 0.5: (own - 0.1, 0.8)}
    module = sys.modules["convex_head.robustify"]  # the package has a function of that name
    monkeypatch.setattr(module, "pgd_accuracy", lambda spliced, *_: scores[spliced.head.radius])
    assert chosen(setting).head.radius == 0.5
    assert chosen(setting, max_clean_drop=0.05).head.radius == 0.25
    assert chosen(setting, max_clean_drop=0.1).head.radius == 0.5
    scores[0.25] = (own - 0.2, 0.9)
    assert chosen(setting, max_clean_drop=0.0).head.radius == 0.5


def test_attacked_images_stay_in_the_threat_set_and_hurt(setting):
    model, images, labels = setting
    found = attacked_images(model, images, labels, THREAT, batch=32)
    assert float((found - images).abs().max()) <= 0.1 + 1e-6 and float(found.min()) >= 0 and float(found.max()) <= 1

    def margin(x):
        logits = model(x)
        return logits.gather(1, labels[:, None])[:, 0] - logits.scatter(1, labels[:, None], -torch.inf).amax(1)

    assert float((margin(images) - margin(found)).mean()) > 0.1


@pytest.mark.parametrize("threat", [THREAT, ThreatModel("L2", 0.5)], ids=["Linf", "L2"])
def test_the_threat_reaches_as_far_in_all_directions_behind_the_map(setting, threat):
    """Directions of our own, and four gradient steps along each instead of the module's three."""
    model, images, _ = setting
    backbone = replace_head(model, nn.Identity(), at="fc").backbone
    features = extract_features(backbone, images)
    linear = displacement_map(backbone, images, features, threat, seed=1)
    torch.testing.assert_close(linear(features).mean(0), torch.zeros(features.shape[1]), atol=1e-4, rtol=0)

    def displaced(scale):
        directions = torch.randn(len(images), features.shape[1], generator=torch.Generator().manual_seed(7))
        directions /= directions.norm(dim=1, keepdim=True)
        x = images
        for _ in range(4):
            x = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(((backbone(x) @ scale.mT) * directions).sum(), x)
            step = (
                gradient.sign()
                if threat.norm == "Linf"
                else gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            )
            x = threat.project(images, x + threat.eps / 3 * step).detach()
        shift = (backbone(x) - features) @ scale.mT
        return shift, float((shift * directions).sum(1).mean())

    def spread(d):
        values = torch.linalg.eigvalsh(d.double().mT @ d.double())
        return float(values[-1] / values.sum())

    (before, _), (behind, reach) = displaced(torch.diag(1 / features.std(0))), displaced(linear.weight)
    assert spread(behind) < 0.7 * spread(before)
    assert reach == pytest.approx(1, abs=0.15)


def test_a_backbone_that_does_not_move_is_refused(setting):
    _, images, labels = setting
    dead = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Hardtanh(-1e-9, 1e-9), nn.Linear(4, 3))
    with pytest.raises(errors.InputError, match="must move the features"):
        robustify(dead, (images, labels), THREAT, radius=1.0, reg=0.1)


def test_a_backbone_without_gradients_takes_the_round_ball(setting):
    class Cut(nn.Module):
        def forward(self, x):
            return x.detach().flatten(1)

    _, images, labels = setting
    net = nn.Sequential(Cut(), nn.Linear(64, 3))
    with pytest.raises(errors.InputError, match=r"must be differentiable.*standardise='scale'"):
        robustify(net, (images, labels), THREAT, radius=0.5, reg=0.1)
    model = robustify(net, (images, labels), THREAT, radius=0.5, reg=0.1, standardise="scale", tol=0.1)
    assert model.head.standardize


def test_whitened_model_is_certified_behind_the_map(setting):
    model = chosen(setting)
    _, images, labels = setting
    assert not model.head.standardize
    features = model.features(images)
    margins = model.head.worst_case_margin(features, labels)
    worst = model.head.worst_case_features(features, labels)
    logits = model.head(worst)
    attained = logits.gather(1, labels[:, None])[:, 0] - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    torch.testing.assert_close(attained.double(), margins, atol=1e-3, rtol=1e-3)
    assert float((worst - features).norm(dim=1).max()) <= model.head.radius * (1 + 1e-4)
    torch.testing.assert_close(model(images), model.head(features))


def test_rounds_are_validated_and_change_the_head(setting):
    model = chosen(setting, rounds=2)
    assert [one.round for one in model.path_] == [0, 0, 1, 2]
    data, images, labels = setting[0], setting[1], setting[2]
    fixed = {"radius": 0.5, "reg": 0.1, "tol": 0.05}
    without = robustify(data, (images, labels), THREAT, **fixed)
    after = robustify(data, (images, labels), THREAT, rounds=1, **fixed)
    assert not torch.allclose(without(images), after(images), atol=1e-3)


def test_bad_settings_are_refused(setting):
    with pytest.raises(errors.InputError, match="'whiten' or 'scale'"):
        chosen(setting, standardise="zca")
    with pytest.raises(errors.InputError, match="rounds must be at least 0"):
        chosen(setting, rounds=-1)
    with pytest.raises(errors.InputError, match="validation_share"):
        chosen(setting, validation_share=1.0)
    with pytest.raises(errors.InputError, match="max_clean_drop must be in"):
        chosen(setting, max_clean_drop=-0.1)
    other = nn.Sequential(setting[0], nn.Linear(3, 5))
    with pytest.raises(errors.InputError, match="5 outputs and 3 classes"):
        chosen((other, *setting[1:]), max_clean_drop=0.1)
