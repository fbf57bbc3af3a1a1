"""Baseline recipes against their definitions, and the training loop's promises."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from torch import nn

from convex_head import errors
from convex_head.baselines import (
    SAM,
    MLPHead,
    PGDAdversarialTraining,
    PreActResNet,
    Standard,
    Trades,
    channel_statistics,
    linear_head,
    preact_resnet18,
    preact_resnet_small,
    preact_resnet_tiny,
    train,
)
from convex_head.baselines.modes import evaluation_mode, set_training_mode
from convex_head.baselines.pgd import maximise, pgd_accuracy, random_start
from convex_head.splice import replace_head
from convex_head.threat import ThreatModel

THREATS = [ThreatModel("Linf", "8/255"), ThreatModel("L2", 0.5)]
RECIPES = ["standard", "sam", "pgd_at", "trades"]


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 3
    images = 0.3 * torch.rand(48, 1, 8, 8, generator=generator)
    for k in range(3):
        images[labels == k, :, 2 * k : 2 * k + 3] += 0.6
    return images, labels


def network(seed: int = 0) -> PreActResNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return preact_resnet_small(3, widths=(4, 8))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns(recipe, data):
    model = network()
    record = train(model, *data, recipe=recipe, threat=THREATS[0], epochs=8, batch_size=16, lr=0.1)
    assert not model.training
    assert (model(data[0]).argmax(1) == data[1]).float().mean() > 0.9
    assert record.history[-1].loss < record.history[0].loss
    assert len(record.history) == 8 and record.seconds > 0


@pytest.mark.parametrize(
    ("recipe", "forwards", "backwards"),
    [("standard", 1, 1), ("sam", 2, 2), ("pgd_at", 8, 8), ("trades", 13, 12)],
)
def test_cost_is_counted_in_examples(recipe, forwards, backwards, data):
    record = train(network(), *data, recipe=recipe, threat=THREATS[0], epochs=2, batch_size=20)
    assert (record.forwards, record.backwards) == (forwards * 96, backwards * 96)


def test_sam_without_radius_is_sgd(data):
    plain, sharp, wide = network(), network(), network()
    for model, recipe in [(plain, Standard()), (sharp, SAM(rho=0.0)), (wide, SAM(rho=0.05))]:
        train(model, *data, recipe=recipe, epochs=3, batch_size=16)
    running = [n for n in weights(plain) if "num_batches" not in n]
    assert_same({n: weights(plain)[n] for n in running}, {n: weights(sharp)[n] for n in running})
    assert not torch.equal(plain.fc.weight, wide.fc.weight)


def test_sam_takes_its_gradient_at_the_perturbed_weights(data):
    """One step against equation 2 of the paper, by hand."""
    images, labels = data
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
    x, rho, lr = images.double(), 0.3, 0.1
    by_hand = copy.deepcopy(model)
    grads = torch.autograd.grad(F.cross_entropy(by_hand(x), labels), list(by_hand.parameters()))
    norm = torch.sqrt(sum(g.square().sum() for g in grads))
    moved = copy.deepcopy(by_hand)
    with torch.no_grad():
        for p, g in zip(moved.parameters(), grads, strict=True):
            p.add_(rho * g / norm)
    sharp = torch.autograd.grad(F.cross_entropy(moved(x), labels), list(moved.parameters()))
    recipe = SAM(rho=rho, momentum=0.0, weight_decay=0.0)
    recipe.step(model, recipe.optimizer(model.parameters(), lr), x, labels, None)
    for p, before, g in zip(model.parameters(), by_hand.parameters(), sharp, strict=True):
        torch.testing.assert_close(p, before - lr * g, rtol=1e-6, atol=1e-8)  # the library's norm is float32


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_adversarial_examples_stay_in_the_ball_and_the_box(threat, data):
    images, labels = data
    model = network()

    def loss(logits):
        return F.cross_entropy(logits, labels, reduction="sum")

    start = random_start(images, threat)
    found = maximise(model, images, threat, loss, start=start, steps=5, step_size=threat.eps)
    order = float("inf") if threat.norm == "Linf" else 2
    for points in (start, found):
        assert (points - images).flatten(1).norm(order, dim=1).max() <= threat.eps * (1 + 1e-5)
        assert points.min() >= 0 and points.max() <= 1
    assert loss(model.eval()(found)) > loss(model(images))
    assert all(p.grad is None for p in model.parameters())


def test_linear_ascent_reaches_the_closed_form():
    """On a linear objective the Linf maximum is x + eps sign(w), the L2 maximum x + eps w/|w|."""
    torch.manual_seed(0)
    w = torch.randn(6)
    x = torch.full((2, 6), 0.5)
    for threat, best in [
        (ThreatModel("Linf", 0.1), 0.1 * w.sign()),
        (ThreatModel("L2", 0.2), 0.2 * w / w.norm()),
    ]:
        found = maximise(nn.Identity(), x, threat, lambda z: (z @ w).sum(), start=x, steps=4, step_size=0.1)
        torch.testing.assert_close(found, x + best)


def test_validation_accuracy_of_a_linear_model_is_exact():
    """For two classes and a linear margin, PGD finds the worst case: right iff y w'x > eps |w|_1."""
    torch.manual_seed(0)
    images, model = 0.3 + 0.4 * torch.rand(200, 6), nn.Linear(6, 2)
    with torch.no_grad():
        model.bias.copy_(-0.5 * model.weight.sum(dim=1))  # the boundary passes through the middle of the images
    labels = (model(images).argmax(1) + (torch.rand(200) < 0.1)) % 2
    clean, robust = pgd_accuracy(model, images, labels, ThreatModel("Linf", 0.02))
    w = model.weight[1] - model.weight[0]
    margin = (2 * labels - 1) * (images @ w + model.bias[1] - model.bias[0])
    assert clean == pytest.approx((margin > 0).double().mean().item())
    assert robust == pytest.approx((margin > 0.02 * w.abs().sum()).double().mean().item())
    assert 0 < robust < clean


def test_trades_without_penalty_is_cross_entropy(data):
    images, labels = data
    model = network().eval()
    loss, logits = Trades(beta=0.0).loss(model, images, labels, THREATS[0])
    assert loss == F.cross_entropy(model(images), labels)
    torch.testing.assert_close(logits, model(images))
    penalised, _ = Trades(beta=6.0).loss(model, images, labels, THREATS[0])
    assert penalised > loss


def test_pgd_at_without_steps_and_eps_zero_is_standard(data):
    plain, adversarial = network(), network()
    train(plain, *data, epochs=2, batch_size=16)
    train(
        adversarial,
        *data,
        recipe=PGDAdversarialTraining(steps=0),
        threat=ThreatModel("L2", 1e-30),
        epochs=2,
        batch_size=48 // 3,
    )
    for a, b in zip(plain.parameters(), adversarial.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_resume_equals_uninterrupted(recipe, data, tmp_path):
    options = {"recipe": recipe, "threat": THREATS[0], "epochs": 4, "batch_size": 20}
    whole = network()
    reference = train(whole, *data, **options)

    def interrupt(done, total):
        if done == 8:  # in the middle of the third epoch
            raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(network(), *data, **options, checkpoint=path, progress=interrupt)
    steps = []
    resumed = network()
    record = train(resumed, *data, **options, checkpoint=path, progress=lambda *s: steps.append(s))
    assert_same(weights(whole), weights(resumed))
    assert steps[0] == (7, 12) and steps[-1] == (12, 12)
    assert (record.forwards, record.backwards) == (reference.forwards, reference.backwards)
    assert [line.loss for line in record.history] == [line.loss for line in reference.history]
    finished = network()
    train(finished, *data, **options, checkpoint=path, progress=interrupt)
    assert_same(weights(whole), weights(finished))


def test_a_checkpoint_of_another_training_is_refused(data, tmp_path):
    path = tmp_path / "run.pt"
    train(network(), *data, epochs=1, checkpoint=path)
    with pytest.raises(errors.ResumeMismatchError, match="lr differ"):
        train(network(), *data, epochs=1, lr=0.2, checkpoint=path)
    with pytest.raises(errors.ResumeMismatchError, match="initial model differ"):
        train(network(1), *data, epochs=1, checkpoint=path)
    with pytest.raises(errors.ResumeMismatchError, match="data differ"):
        train(network(), data[0] * 0.5, data[1], epochs=1, checkpoint=path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(errors.ResumeMismatchError, match="not a readable"):
        train(network(), *data, epochs=1, checkpoint=path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_frozen_backbone_is_left_alone(recipe, data):
    model = replace_head(network(), MLPHead(8, 3, hidden=16))
    before, head = weights(model.backbone), weights(model.head)
    record = train(model, *data, recipe=recipe, threat=THREATS[0], epochs=2, batch_size=16)
    assert_same(before, weights(model.backbone))
    assert not torch.equal(head["hidden.weight"], model.head.hidden.weight)
    attack_steps = {"standard": 0, "sam": 0, "pgd_at": 7, "trades": 10}[recipe]
    assert record.backwards == attack_steps * 96  # the update itself never enters the backbone


def test_modes_follow_the_parameters():
    frozen = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout()).requires_grad_(False)
    model = nn.Sequential(frozen, nn.Flatten(), nn.Linear(2, 2), nn.Dropout()).eval()
    set_training_mode(model)
    assert [m.training for m in frozen.modules()] == [False] * 4
    assert model[2].training and model[3].training
    with evaluation_mode(model):
        assert not any(m.training for m in model.modules())
    assert model[3].training and not frozen[1].training


def test_seeds_decide_and_the_global_state_is_restored(data):
    torch.manual_seed(7)
    expected = torch.rand(3)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(7)
        model = network()
        train(model, *data, recipe="pgd_at", threat=THREATS[0], epochs=1, batch_size=16, seed=seed)
        results.append(model.fc.weight)
        torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_linear_head_is_multinomial_logistic_regression():
    raw, labels = load_iris(return_X_y=True)
    x = np.column_stack([raw * [1, 100, 0.01, 1] + 5, np.full(len(raw), 3.0)])  # scales, and a constant feature
    n, reg = len(x), 1e-2
    z = (raw - raw.mean(0)) / raw.std(0)
    reference = LogisticRegression(C=1 / (n * reg), tol=1e-10, max_iter=5000).fit(z, labels)
    head = linear_head(torch.tensor(x), torch.tensor(labels), reg=reg)
    ours = F.softmax(head(torch.tensor(x)), dim=1).detach().numpy()
    np.testing.assert_allclose(ours, reference.predict_proba(z), atol=1e-5)


def test_linear_head_of_features_refuses_bad_input():
    x, y = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    with pytest.raises(errors.NonFiniteFeaturesError, match="NaN or infinity"):
        linear_head(x / 0, y)
    with pytest.raises(errors.LabelRangeError, match=r"0\.\.1; found 0\.\.2"):
        linear_head(x, y + (y == 1).long(), 2)
    with pytest.raises(errors.ClassCountError, match="at least two"):
        linear_head(x, y * 0)
    with pytest.raises(errors.FeatureShapeError, match=r"\(6, 2\)"):
        linear_head(x, y[:3])
    with pytest.raises(errors.EmptyDataError, match="none"):
        linear_head(x[:0], y[:0])
    with pytest.raises(errors.RegularisationError, match="positive"):
        linear_head(x, y, reg=0.0)


def test_mlp_head_standardises():
    x = torch.randn(50, 4) * 7 + 3
    head = MLPHead(4, 2, hidden=8, features=x)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    torch.testing.assert_close(head(x), MLPHead.forward(_identity_copy(head), z), rtol=1e-4, atol=1e-5)
    with pytest.raises(errors.FeatureShapeError, match=r"\(n, 4\)"):
        MLPHead(4, 2, features=x[:, :3])


def _identity_copy(head: MLPHead) -> MLPHead:
    plain = copy.deepcopy(head)
    plain.mean.zero_()
    plain.std.fill_(1)
    return plain


def test_train_refuses_bad_input(data):
    images, labels = data
    with pytest.raises(errors.EmptyDataError, match="none"):
        train(network(), images[:0], labels[:0])
    with pytest.raises(errors.LabelShapeError, match=r"\(48,\)"):
        train(network(), images, labels[:5])
    with pytest.raises(errors.LabelTypeError, match="float32"):
        train(network(), images, labels.float())
    with pytest.raises(errors.InputError, match="'adam'"):
        train(network(), images, labels, recipe="adam")
    with pytest.raises(errors.InputError, match="epochs must be positive; got 0"):
        train(network(), images, labels, epochs=0)
    with pytest.raises(errors.ThreatModelError, match="got none"):
        train(network(), images, labels, recipe="trades")
    with pytest.raises(errors.ThreatModelError, match="L1"):
        train(network(), images, labels, recipe="pgd_at", threat=ThreatModel("L1", 1.0))
    with pytest.raises(errors.InputError, match="nothing to train"):
        train(network().requires_grad_(False), images, labels)


def test_preact_resnet_shapes_and_cut_points():
    model = preact_resnet18(10).eval()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(11.17e6, rel=2e-3)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    small = preact_resnet_small(5, 1).eval()
    nodes = {}
    for name in ("act", "flatten"):
        small.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: nodes.update({name: o}))
    assert small(torch.rand(2, 1, 28, 28)).shape == (2, 5)
    assert nodes["act"].shape == (2, 64, 7, 7) and nodes["flatten"].shape == (2, 64)
    with pytest.raises(errors.InputError, match="at least one block"):
        PreActResNet((1, 1), (8,))
    with pytest.raises(errors.InputError, match="positive std"):
        PreActResNet((1,), (8,), std=(0.0,))


def test_patch_stem_is_a_strided_convolution():
    model = preact_resnet_tiny(10).eval()
    images = torch.rand(3, 1, 28, 28)
    weight = model.stem[1].weight.view(16, 1, 4, 4)
    torch.testing.assert_close(model.stem(images), F.conv2d(images, weight, stride=4))
    assert model(images).shape == (3, 10) and model.fc.in_features == 32
    assert sum(p.numel() for p in model.parameters()) < 20_000
    with pytest.raises(errors.InputError, match="patch"):
        PreActResNet((1,), (8,), patch=0)


def test_preact_resnet_normalises_inside():
    images = torch.rand(20, 2, 4, 4) * torch.tensor([1.0, 0.2]).view(1, 2, 1, 1)
    model = PreActResNet((1,), (4,), 2, 3, **channel_statistics(images))
    z = model.normalize(images)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(2), atol=1e-5, rtol=0)
    assert {"normalize.mean", "normalize.std"} <= set(model.state_dict())
