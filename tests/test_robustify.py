"""robustify: the choice of radius, the ellipsoid and the adversarial rounds."""

import pytest
import torch
from torch import nn

from convex_head import errors
from convex_head.baselines import preact_resnet_small, train
from convex_head.displacement import attacked_images, displacement_map
from convex_head.features import extract_features
from convex_head.robustify import robustify
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


def test_attacked_images_stay_in_the_threat_set_and_hurt(setting):
    model, images, labels = setting
    found = attacked_images(model, images, labels, THREAT, batch=32)
    assert float((found - images).abs().max()) <= 0.1 + 1e-6 and float(found.min()) >= 0 and float(found.max()) <= 1

    def margin(x):
        logits = model(x)
        return logits.gather(1, labels[:, None])[:, 0] - logits.scatter(1, labels[:, None], -torch.inf).amax(1)

    assert float((margin(images) - margin(found)).mean()) > 0.1


def test_displacements_have_no_direction_behind_the_map(setting):
    model, images, labels = setting
    backbone = replace_head(model, nn.Identity(), at="fc").backbone
    linear = displacement_map(model, backbone, images, labels, THREAT)
    features = extract_features(backbone, images)
    shift = extract_features(backbone, attacked_images(model, images, labels, THREAT)) - features

    def spread(d):
        values = torch.linalg.eigvalsh(d.double().mT @ d.double())
        return float(values[-1] / values.sum())

    standardised = shift / features.std(0)
    mapped = shift @ linear.weight.mT
    assert spread(mapped) < 0.7 * spread(standardised)
    gain = linear.weight.double() * features.std(0).double()
    assert float(gain.square().sum() / len(gain)) == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(linear(features).mean(0), torch.zeros(features.shape[1]), atol=1e-4, rtol=0)


def test_whitened_model_is_certified_behind_the_map(setting):
    model = chosen(setting, standardise="whiten")
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
    with pytest.raises(errors.InputError, match="'scale' or 'whiten'"):
        chosen(setting, standardise="zca")
    with pytest.raises(errors.InputError, match="rounds must be at least 0"):
        chosen(setting, rounds=-1)
    with pytest.raises(errors.InputError, match="validation_share"):
        chosen(setting, validation_share=1.0)
