"""The drop-in: where it cuts, what it refuses, what harnesses do to the model."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict

import pytest
import torch
from splice_cases import Small, tv, tv_vit
from torch import nn

from convex_head.errors import ClassifierNotFoundError, CutPointError, FeatureShapeError, InputError
from convex_head.splice import SplicedModel, find_classifier, replace_head


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    net = Small()
    net.bn.running_mean.uniform_(-1, 1)
    return net


@pytest.fixture
def images():
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_original_is_untouched(small, images):
    before = copy.deepcopy(small.state_dict())
    small.train()
    model = replace_head(small, nn.Linear(8, 2))
    assert small.training and isinstance(small.fc2, nn.Linear)
    assert all(parameter.requires_grad for parameter in small.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


# ---- what follows the classifier


@pytest.mark.parametrize("tail", [nn.LogSoftmax(1), nn.Softmax(1), nn.ReLU(), nn.Hardtanh(-0.01, 0.01, inplace=True)])
def test_what_runs_after_the_classifier_is_replaced_too(small, images, tail):
    """fc2 then softmax, or a write into fc2's output: an identity at fc2 would send features through it."""
    small.tail = tail
    small.eval()
    model = replace_head(small, copy.deepcopy(small.fc2))
    assert find_classifier(small) == "fc2"
    assert model.backbone.ends_early
    small.tail = nn.Identity()
    torch.testing.assert_close(model(images), small(images))


class Functional(Small):
    """Looks into its classifier instead of running it."""

    def forward(self, x):
        x = self.fc1(nn.functional.adaptive_avg_pool2d(self.conv(x), 2).flatten(1))
        return nn.functional.linear(x, self.fc2.weight)


def test_classifier_that_is_never_run(images):
    with pytest.raises(ClassifierNotFoundError, match=r"Functional must end in a linear classifier.*at="):
        replace_head(Functional(), nn.Linear(8, 2))
    with pytest.raises(CutPointError, match=r"'fc2' must be run once.*0 times"):
        replace_head(Functional(), nn.Linear(8, 2), at="fc2")


class Peeks(Small):
    """Runs its classifier last, but reads its shape on the way."""

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.conv(x), 2).flatten(1)
        return self.fc2(self.fc1(x)[:, : self.fc2.in_features])


def test_network_that_reads_the_classifiers_attributes_fails_loudly(images):
    model = replace_head(Peeks(), nn.Linear(8, 2))
    with pytest.raises(AttributeError, match="in_features"):
        model(images)


# ---- cutting deeper


def test_at_replaces_the_node_and_everything_behind(small, images):
    small.eval()
    tail = nn.Sequential(copy.deepcopy(small.fc1), nn.ReLU(), copy.deepcopy(small.fc2))
    tail.in_features = 16
    model = replace_head(small, tail, at="fc1")
    assert model.features(images).shape == (5, 16)
    assert model.backbone.ends_early
    torch.testing.assert_close(model(images), small(images))


def test_convolutional_features_are_flattened(small, images):
    small.eval()
    model = replace_head(small, nn.Linear(4 * 64, 2), at="bn", example_input=images)
    torch.testing.assert_close(model.features(images), small.conv(2 * images - 1).flatten(1))


def test_deeper_cut_of_torchvision():
    build = tv("resnet18")
    torch.manual_seed(0)
    net, images = build().eval(), torch.rand(2, 3, 64, 64)
    block = net.layer4[1]
    with torch.no_grad():
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        x = net.layer4[0](net.layer3(net.layer2(net.layer1(x))))
        expected = block.relu(block.bn1(block.conv1(x))).flatten(1)
        model = replace_head(net, nn.Linear(512 * 4, 2), at="layer4.1.conv2", example_input=images)
        torch.testing.assert_close(model.features(images), expected)


def test_cut_points_that_do_not_exist(small):
    with pytest.raises(CutPointError, match=r"no 'fc3'.*fc[12]"):
        replace_head(small, nn.Linear(8, 2), at="fc3")
    with pytest.raises(CutPointError, match=r"no 'zzz'.*conv, bn"):
        replace_head(small, nn.Linear(8, 2), at="zzz")
    with pytest.raises(CutPointError, match=r"'relu' must be run once.*2 times"):
        replace_head(small, nn.Linear(8, 2), at="relu")


def test_a_cut_that_the_run_misses_is_reported_without_a_trial_run(images):
    """A network no guess fits: the fault shows at the first real run, and is never silent."""

    class Picky(Small):
        def forward(self, x):
            if x.shape[-1] != 17:
                raise ValueError("17 pixels only")
            return super().forward(x)

    net = Picky()
    net.spare = nn.Linear(3, 3)
    model = replace_head(net, nn.Linear(3, 2), at="spare")
    with pytest.raises(CutPointError, match=r"'spare' is not run"):
        model(torch.rand(2, 3, 17, 17))
    # Without a run, the name decides; with an example the order of execution does.
    net.head = nn.Linear(5, 5)
    assert find_classifier(net) == "head"
    assert find_classifier(net, example_input=torch.rand(1, 3, 17, 17)) == "fc2"
    assert replace_head(net, nn.Linear(8, 2), at="fc2")(torch.rand(2, 3, 17, 17)).shape == (2, 2)
    with pytest.raises(InputError, match=r"\(2, 3, 8, 8\).*17 pixels"):
        replace_head(net, nn.Linear(8, 2), example_input=images[:2])


# ---- no classifier, wrong head


def test_networks_without_a_classifier():
    models = pytest.importorskip("torchvision.models")
    for name, attribute in (
        ("resnet18", "fc"),
        ("convnext_tiny", "classifier"),
        ("mobilenet_v3_small", "classifier"),
    ):
        net = models.get_model(name, weights=None)
        setattr(net, attribute, nn.Flatten())
        with pytest.raises(ClassifierNotFoundError, match=r"none was found.*at="):
            find_classifier(net)
    vit = tv_vit()
    vit.heads = nn.Identity()
    with pytest.raises(ClassifierNotFoundError, match="none was found"):
        find_classifier(vit)


def test_timm_without_or_with_two_classifiers():
    create = pytest.importorskip("timm").create_model
    with pytest.raises(ClassifierNotFoundError, match=r"Identity.*num_classes"):
        find_classifier(create("resnet18", num_classes=0))
    distilled = create("deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    with pytest.raises(ClassifierNotFoundError, match=r"it has head, head_dist; choose one"):
        replace_head(distilled, nn.Linear(192, 2))
    assert replace_head(distilled, nn.Linear(192, 2), at="head")(torch.rand(2, 3, 32, 32)).shape == (2, 2)


def test_head_of_another_width(small, images):
    with pytest.raises(FeatureShapeError, match=r"in_features=9, the backbone gives 8"):
        replace_head(small, nn.Linear(9, 2))
    with pytest.raises(FeatureShapeError, match=r"in_features=9, the backbone gives 256"):
        replace_head(small, nn.Linear(9, 2), at="bn", example_input=images)
    # Without an example the width of feature maps is not known before the first run.
    model = replace_head(small, nn.Linear(9, 2), at="bn")
    with pytest.raises(FeatureShapeError, match=r"in_features=9, the backbone gives 256"):
        model(images)


@pytest.mark.parametrize("wrong", [None, "resnet18", lambda x: x])
def test_arguments_that_are_no_modules(small, wrong):
    with pytest.raises(InputError, match=r"model must be an nn\.Module"):
        replace_head(wrong, nn.Linear(8, 2))
    with pytest.raises(InputError, match=r"head must be an nn\.Module"):
        replace_head(small, wrong)


# ---- other forms of model


def test_sequential_linear_and_wrapped_models(small, images):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 2))
    assert find_classifier(flat) == "3"
    torch.testing.assert_close(replace_head(flat, flat[3])(images), flat(images))
    linear = nn.Linear(4, 2)
    assert torch.equal(replace_head(linear, nn.Linear(4, 3)).features(torch.eye(4)), torch.eye(4))
    named = nn.Sequential(OrderedDict(normalise=nn.BatchNorm2d(3), model=small.eval())).eval()
    assert find_classifier(named) == "model.fc2"
    torch.testing.assert_close(replace_head(named, small.fc2)(images), named(images))
    for wrapped in (nn.DataParallel(small), torch.compile(small, backend="eager")):
        model = replace_head(wrapped, small.fc2)
        assert model.backbone.cut == "fc2"
        torch.testing.assert_close(model(images), small(images))


def test_a_spliced_model_is_given_another_head(small, images):
    first = replace_head(small, nn.Linear(8, 2))
    second = replace_head(first, nn.Linear(8, 4))
    assert torch.equal(first.features(images), second.features(images))
    assert second(images).shape == (5, 4) and first(images).shape == (5, 2)
    deeper = replace_head(first, nn.Linear(16, 4), at="fc1")
    torch.testing.assert_close(
        deeper.features(images), replace_head(small, nn.Linear(16, 4), at="fc1").features(images)
    )


# ---- what harnesses do to a model; an ordinary backbone and one that ends early


@pytest.fixture(params=["identity", "early"])
def spliced(request, small) -> SplicedModel:
    if request.param == "identity":
        model = replace_head(small, nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3)))
    else:
        model = replace_head(small, nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 3)), at="fc1")
    assert model.backbone.ends_early is (request.param == "early")
    return model


def test_backbone_stays_in_evaluation_mode(spliced, images):
    expected = spliced.features(images)
    state = copy.deepcopy(spliced.state_dict())
    spliced.train()
    assert spliced.training and spliced.head.training and not any(m.training for m in spliced.backbone.modules())
    spliced.backbone.train()
    assert torch.equal(spliced.features(images), expected)
    for module in spliced.modules():  # behind its back
        module.train()
    spliced.backbone.net.train()
    assert torch.equal(spliced.features(images), expected)
    assert all(torch.equal(value, state[key]) for key, value in spliced.state_dict().items())
    assert not spliced.eval().head.training


def test_frozen_backbone_lets_image_gradients_through(spliced, images):
    assert not any(parameter.requires_grad for parameter in spliced.backbone.parameters())
    assert all(parameter.requires_grad for parameter in spliced.head.parameters())
    inputs = images.double().requires_grad_()
    spliced.double()
    assert torch.autograd.gradcheck(lambda x: spliced(x).sum(), inputs[:1, :, :2, :2].detach().requires_grad_())
    spliced(inputs).sum().backward()
    assert inputs.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in spliced.backbone.parameters())
    with torch.no_grad():
        assert not spliced(images.double()).requires_grad


def test_copies_and_files(spliced, images):
    expected = spliced(images)
    assert torch.equal(copy.deepcopy(spliced)(images), expected)
    buffer = io.BytesIO()
    torch.save(spliced, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(images), expected)
    blank = copy.deepcopy(spliced)
    for value in blank.state_dict().values():
        value.zero_()
    assert not torch.equal(blank(images), expected)
    blank.load_state_dict(spliced.state_dict())
    assert torch.equal(blank(images), expected)


def test_no_child_is_named_model_or_module(spliced):
    """RobustBench cuts leading characters off keys that hold "model." or "module."."""
    assert not any("model." in key or "module." in key for key in spliced.state_dict())


def test_devices_dtypes_and_parallel(spliced, images):
    expected = spliced(images)
    torch.testing.assert_close(nn.DataParallel(spliced)(images), expected)
    half = copy.deepcopy(spliced).half()
    assert half(images.half()).dtype == torch.float16
    assert next(spliced.parameters()).device.type == "cpu"
    moved = copy.deepcopy(spliced).to("meta")
    assert moved(images.to("meta")).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_head_follows_the_model_to_its_device(small, images):
    model = replace_head(small.cuda(), nn.Linear(8, 2))
    assert model(images.cuda()).device.type == "cuda"


def test_compile(spliced, images):
    torch._dynamo.reset()
    compiled = torch.compile(spliced, backend="eager")
    torch.testing.assert_close(compiled(images), spliced(images))
    torch.testing.assert_close(compiled(images[:2]), spliced(images[:2]))


def test_ordinary_backbone_exports(small, images):
    model = replace_head(small, nn.Linear(8, 3))
    exported = torch.export.export(model, (images,))
    torch.testing.assert_close(exported.module()(images), model(images))


def test_torchattacks_runs_on_a_spliced_model(spliced, images):
    torchattacks = pytest.importorskip("torchattacks")
    expected = spliced.features(images)
    adversarial = torchattacks.PGD(spliced, eps=8 / 255, steps=2)(images, torch.tensor([0, 1, 2, 0, 1]))
    assert 0 < (adversarial - images).abs().max() <= 8 / 255 + 1e-6
    assert torch.equal(spliced.features(images), expected)
