"""robustify: the choice of radius, shaping of the ellipsoid and the adversarial rounds."""

import copy
import re
import sys

import pytest
import torch
from torch import nn

from convex_head import errors
from convex_head.baselines import preact_resnet_small, train
from convex_head.displacement import MovedImages, attacked_images, whitening
from convex_head.features import extract_features
from convex_head.head import ConvexRobustHead
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
    with pytest.warns(errors.ChoiceWarning, match="no candidate keeps"):
        model = chosen(setting, max_clean_drop=0.0)
    assert model.head.radius == 0.5 and not any(one.allowed for one in model.path_)


@pytest.mark.parametrize("steps", [3, 10])
def test_attacked_images_stay_in_the_threat_set_and_hurt(setting, steps):
    model, images, labels = setting
    found = attacked_images(model, images, labels, THREAT, batch=32, steps=steps)
    assert float((found - images).abs().max()) <= 0.1 + 1e-6 and float(found.min()) >= 0 and float(found.max()) <= 1

    def margin(x):
        logits = model(x)
        return logits.gather(1, labels[:, None])[:, 0] - logits.scatter(1, labels[:, None], -torch.inf).amax(1)

    assert float((margin(images) - margin(found)).mean()) > 0.1


def test_whitening_is_of_l2_and_linf_threats(setting):
    model, images, labels = setting
    with pytest.raises(errors.InputError, match="Linf or L2; found L1"):
        robustify(model, (images, labels), ThreatModel("L1", 1.0), radius=1.0, reg=0.1)


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


def test_whitened_head_is_certified_in_the_ellipsoid_and_travels_alone(setting, tmp_path):
    model = chosen(setting)
    network, images, labels = setting
    head = model.head
    assert head.standardize and head.whitening is not None
    features = model.features(images)
    margins = head.worst_case_margin(features, labels)
    worst = head.worst_case_features(features, labels)
    logits = head(worst)
    attained = logits.gather(1, labels[:, None])[:, 0] - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    torch.testing.assert_close(attained.double(), margins, atol=1e-3, rtol=1e-3)
    steps = (worst - features).double() / head.scale.double() @ head.whitening.double()
    torch.testing.assert_close(steps.norm(dim=1), torch.full((90,), head.radius).double(), atol=1e-3, rtol=1e-3)
    assert model.head.problem(features, labels).objective(head.network()) == pytest.approx(
        head.result_.primal, rel=1e-9
    )
    loaded = ConvexRobustHead.load(head.save(tmp_path / "head.safetensors"))
    again = replace_head(network, loaded)
    torch.testing.assert_close(again(images), model(images))
    fresh = ConvexRobustHead(head.in_features, 3)
    fresh.load_state_dict(head.state_dict())
    torch.testing.assert_close(fresh(features), head(features))


@pytest.mark.parametrize(("best", "path"), [(2.0, [2.0, 2.8]), (1.0, []), (9.0, [2.0, 2.8, 4.0])])
def test_radii_grow_while_the_largest_is_the_best(setting, monkeypatch, capfd, best, path):
    """Validation accuracies are given: they rise up to ``best``, and reg 0.1 is better than 0.2."""
    model, images, labels = setting
    module = sys.modules["convex_head.robustify"]  # the package has a function of that name

    def score(spliced, *_):
        radius, reg = spliced.head.radius, spliced.head.reg
        return 0.9, 0.5 - 0.01 * abs(radius - best) - 0.1 * reg

    monkeypatch.setattr(module, "pgd_accuracy", score)
    settings = {"regs": (0.1, 0.2), "tol": 0.2, "shape_rounds": 0}
    found = robustify(model, (images, labels), THREAT, progress=True, **settings)
    usual = [(r, b) for b in (0.1, 0.2) for r in (0.5, 0.7, 1.0, 1.4)]
    assert [(one.radius, one.reg) for one in found.path_] == usual + [(r, 0.1) for r in path]
    assert found.head.radius == min(best, 4.0) and found.head.reg == 0.1
    lines = 3 + len(usual) + len(path)
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"[{lines}/{lines}] fitting radius")
    given = robustify(model, (images, labels), THREAT, radii=(0.5, 1.4), **settings)
    assert max(one.radius for one in given.path_) == 1.4


@pytest.mark.parametrize(("loss", "path"), [(0.0095, [2.0, 2.8, 4.0]), (0.0105, [2.0]), (-0.1, [2.0, 2.8, 4.0])])
def test_a_wider_radius_wins_more_under_attack_than_it_loses_when_clean(setting, monkeypatch, loss, path):
    """Validation accuracies are given: 0.01 more under attack, ``loss`` less when clean, for a radius larger by 1."""
    model, images, labels = setting
    module = sys.modules["convex_head.robustify"]  # the package has a function of that name
    monkeypatch.setattr(
        module, "pgd_accuracy", lambda spliced, *_: (0.8 - loss * spliced.head.radius, 0.5 + 0.01 * spliced.head.radius)
    )
    found = robustify(model, (images, labels), THREAT, regs=(0.1,), tol=0.2, shape_rounds=0)
    usual = [0.5, 0.7, 1.0, 1.4]
    assert [one.radius for one in found.path_] == usual + path
    wider = found.path_[len(usual) :]
    assert [one.allowed for one in wider] == [loss < 0.01] * len(path)
    assert found.head.radius == (4.0 if loss < 0.01 else 1.4)
    assert next(one for one in found.path_ if one.chosen).radius == found.head.radius


@pytest.fixture
def shaping(setting, monkeypatch):
    """What attacks that shape an ellipsoid were asked: a list of (head, rows, images found), which calls add to."""
    _, images, labels = setting
    module = sys.modules["convex_head.robustify"]  # the package has a function of that name
    asked, attack = [], module.attacked_images

    def seen(spliced, x, y, threat, batch, **steps):
        rows = torch.cdist(x.flatten(1), images.flatten(1)).argmin(1)
        assert torch.equal(labels[rows], y) and steps == {"steps": module.SHAPE_STEPS}
        asked.append((spliced.head, rows, attack(spliced, x, y, threat, batch, **steps)))
        return asked[-1][-1]

    monkeypatch.setattr(module, "attacked_images", seen)
    monkeypatch.setattr(module, "SHAPE_IMAGES", 60)
    return asked


def test_shape_rounds_attack_a_head_that_has_not_seen_the_held_out_images(setting, shaping):
    model, images, labels = setting
    settings = {"radii": (1.6, 0.0, 0.45), "regs": (0.1, 0.2), "tol": 0.1}
    head = robustify(model, (images, labels), THREAT, shape_rounds=2, **settings).head
    rest, _ = _split(len(labels), 0.2, 0)
    probe = replace_head(model, nn.Identity()).backbone
    features = extract_features(probe, images)
    assert [(one.radius, one.reg) for one, _, _ in shaping] == [(1.6, 0.1)] * 2  # in ratio nearer to 1 than 0.45
    for one, _, _ in shaping:
        torch.testing.assert_close(one.mean, features[rest].mean(0), atol=1e-5, rtol=1e-5)
    drawn = shaping[0][1]  # sixty of the 72 that heads are fitted on
    assert len(set(drawn.tolist())) == 60 and set(drawn.tolist()) < set(rest.tolist())
    assert torch.equal(drawn, shaping[1][1]) and not torch.equal(shaping[0][2], shaping[1][2])
    sample = MovedImages(probe, images, features, THREAT)
    shift = sample.ascended()[1]
    attacked = [sample.shift(found, drawn) for _, _, found in shaping]
    sample.whitening(shift), sample.whitening(shift, attacked[:1])
    torch.testing.assert_close(head.whitening.double(), sample.whitening(shift, attacked), atol=1e-5, rtol=1e-5)
    plain = robustify(model, (images, labels), THREAT, shape_rounds=0, **settings).head
    assert len(shaping) == 2
    # What attacks found is shorter behind the matrix, where a ball goes as far in all directions.
    before, after = (float((attacked[0] @ one.whitening.double()).norm(dim=1).mean()) for one in (plain, head))
    assert after < 0.98 * before
    robustify(model, (images, labels), THREAT, seed=1, **settings)
    assert set(shaping[2][1].tolist()) != set(drawn.tolist())


def test_a_single_candidate_is_shaped_once_on_all_images_whatever_their_order(setting, shaping, monkeypatch):
    model, images, labels = setting
    order = labels.argsort(stable=True)
    settings = {"radius": 0.5, "reg": 0.1, "tol": 1e-3}
    asked, fit = [], ConvexRobustHead.fit
    monkeypatch.setattr(ConvexRobustHead, "fit", lambda self, *a, **k: (asked.append(k["tol"]), fit(self, *a, **k))[1])
    head = robustify(model, (images[order], labels[order]), THREAT, **settings).head
    ((shaped, drawn, _),) = shaping
    assert (shaped.radius, shaped.reg) == (0.5, 0.1) and asked == [5e-3, 1e-3]
    torch.testing.assert_close(shaped.mean, head.mean)  # of the same rows
    assert len(drawn) == 60 and len(labels[drawn].unique()) == 3
    monkeypatch.setattr(sys.modules["convex_head.robustify"], "SHAPE_IMAGES", 2000)
    robustify(model, (images, labels), THREAT, **settings)
    assert sorted(shaping[1][1].tolist()) == list(range(len(labels)))


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({"radius": 0.5, "reg": 0.1}, 4),
        ({"radius": 0.5, "reg": 0.1, "shape_rounds": 0}, 3),
        ({"radius": 0.5, "reg": 0.1, "standardise": "scale"}, 2),
        ({"radii": (0.25, 0.5), "regs": (0.1,), "shape_rounds": 2, "rounds": 1, "max_clean_drop": 0.9}, 9),
    ],
)
def test_progress_says_how_many_lines_there_will_be(setting, settings, lines, capfd):
    model, images, labels = setting
    robustify(model, (images, labels), THREAT, tol=0.1, progress=True, **settings)
    assert re.findall(r"\[(\d+)/(\d+)\]", capfd.readouterr().err) == [(str(k), str(lines)) for k in range(1, lines + 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_other_dtypes_get_heads(setting, dtype):
    model, images, labels = setting
    found = chosen((copy.deepcopy(model).to(dtype), images, labels))
    assert len(found.path_) == 2 and found.head.is_fitted


def test_unscaled_features_have_an_ellipsoid_of_their_own(setting):
    model, images, _ = setting
    head = chosen(setting, standardize=False, shape_rounds=0).head
    probe = replace_head(model, nn.Identity()).backbone
    found = whitening(probe, images, extract_features(probe, images), THREAT, standardize=False)
    torch.testing.assert_close(head.whitening.double(), found, atol=1e-5, rtol=1e-5)


def test_rounds_are_validated_and_change_the_head(setting):
    model = chosen(setting, rounds=2)
    assert [one.round for one in model.path_] == [0, 0, 1, 2]
    data, images, labels = setting[0], setting[1], setting[2]
    fixed = {"radius": 0.5, "reg": 0.1, "tol": 0.05}
    without = robustify(data, (images, labels), THREAT, **fixed)
    after = robustify(data, (images, labels), THREAT, rounds=1, **fixed)
    assert not torch.allclose(without(images), after(images), atol=1e-3)


def test_rounds_add_the_features_of_attacked_images(setting, monkeypatch):
    model, images, labels = setting
    seen, fit = [], ConvexRobustHead.fit
    monkeypatch.setattr(
        ConvexRobustHead, "fit", lambda self, x, *a, **k: (seen.append(x.clone()), fit(self, x, *a, **k))[1]
    )
    settings = {"radius": 0.5, "reg": 0.1, "tol": 0.05, "shape_rounds": 0}
    robustify(model, (images, labels), THREAT, rounds=1, **settings)
    plain, more = seen
    assert torch.equal(more[:90], plain) and more.shape == (180, plain.shape[1])
    one = robustify(model, (images, labels), THREAT, **settings)
    found = attacked_images(one, images, labels, THREAT)
    torch.testing.assert_close(more[90:], one.features(found), atol=1e-4, rtol=1e-4)


def test_bad_settings_are_refused(setting):
    with pytest.raises(errors.InputError, match="'whiten' or 'scale'"):
        chosen(setting, standardise="zca")
    for name in ("rounds", "shape_rounds"):
        for value in (-1, 1.5):
            with pytest.raises(errors.InputError, match=f"^{name} must be a whole number of at least 0; found {value}"):
                chosen(setting, **{name: value})
    with pytest.raises(errors.InputError, match="validation_share"):
        chosen(setting, validation_share=1.0)
    with pytest.raises(errors.InputError, match="max_clean_drop must be in"):
        chosen(setting, max_clean_drop=-0.1)
    with pytest.raises(errors.InputError, match="chooses among candidates; found one"):
        chosen(setting, radius=1.0, max_clean_drop=0.1)
    other = nn.Sequential(setting[0], nn.Linear(3, 5))
    with pytest.raises(errors.InputError, match="5 outputs and 3 classes"):
        chosen((other, *setting[1:]), max_clean_drop=0.1)


def test_candidates_start_from_their_neighbours(setting, monkeypatch):
    """From the radius before; the first of a reg from the same radius at the reg before."""
    begun, fit = {}, ConvexRobustHead.fit

    def noted(head, *data, start, **more):
        done = fit(head, *data, start=start, **more)
        begun.setdefault((head.radius, head.reg), (start, done.result_))
        return done

    monkeypatch.setattr(ConvexRobustHead, "fit", noted)
    model, images, labels = setting
    robustify(model, (images, labels), THREAT, radii=(0.25, 0.5), regs=(0.1, 0.03, 0.01), tol=0.1)
    before = {(0.5, 0.1): (0.25, 0.1), (0.25, 0.03): (0.25, 0.1), (0.5, 0.03): (0.25, 0.03), (0.25, 0.01): (0.25, 0.03)}
    assert begun[0.25, 0.1][0] is None
    assert all(begun[one][0] is begun[other][1] for one, other in before.items())
