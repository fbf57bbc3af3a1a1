"""The drop-in on real architectures with random weights.

The reference is the network itself: its own classifier applied to the backbone's features gives its logits.
"""

from __future__ import annotations

import pytest
import torch
from splice_cases import CLASSES, Small, tv, tv_vit
from torch import nn

from convex_head.splice import find_classifier, replace_head


def timm(name, **options):
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=CLASSES, **options)


def robustbench(build):
    def make():
        bridge = pytest.importorskip("convex_head.robust_bench")
        pytest.importorskip("pyautoattack")
        bridge.import_robustbench()
        return build(pytest.importorskip("robustbench.model_zoo.architectures"))

    return make


def architecture(module, name, **options):
    def build(package):
        found = __import__(f"{package.__name__}.{module}", fromlist=[name])
        return getattr(found, name)(**options)

    return robustbench(build)


def normalised_wide_resnet(package):
    tools = __import__(f"{package.__name__}.utils_architectures", fromlist=["normalize_model"])
    wide = __import__(f"{package.__name__}.wide_resnet", fromlist=["WideResNet"])
    net = wide.WideResNet(depth=10, widen_factor=1, num_classes=CLASSES)
    return tools.normalize_model(net, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


def dm_wide_resnet():
    return architecture("dm_wide_resnet", "DMWideResNet", num_classes=CLASSES, depth=10, width=1)()


ARCHITECTURES = {
    "torchvision resnet18": (tv("resnet18"), "fc", 32),
    "torchvision convnext_tiny": (tv("convnext_tiny"), "classifier.2", 32),
    "torchvision vit": (tv_vit, "heads.head", 32),
    "torchvision mobilenet_v3_small": (tv("mobilenet_v3_small"), "classifier.3", 32),
    "torchvision densenet121": (tv("densenet121"), "classifier", 32),
    "torchvision efficientnet_b0": (tv("efficientnet_b0"), "classifier.1", 32),
    "torchvision swin_t": (tv("swin_t"), "head", 32),
    "torchvision googlenet": (tv("googlenet", init_weights=False), "fc", 64),
    "timm resnet18": (timm("resnet18"), "fc", 32),
    "timm vit_tiny": (timm("vit_tiny_patch16_224", img_size=32, depth=2), "head", 32),
    "timm convnext_atto": (timm("convnext_atto"), "head.fc", 32),
    "timm mobilenetv3_small_050": (timm("mobilenetv3_small_050"), "classifier", 32),
    "timm efficientnet_b0": (timm("efficientnet_b0"), "classifier", 32),
    "timm resnetv2_50, a convolution": (timm("resnetv2_50", layers=(1, 1, 1, 1)), "head.fc", 32),
    "robustbench PreActResNet": (architecture("resnet", "PreActResNet18"), "linear", 32),
    "robustbench ResNet": (architecture("resnet", "ResNet18"), "linear", 32),
    "robustbench WideResNet in a wrapper": (robustbench(normalised_wide_resnet), "model.fc", 32),
    "robustbench DMWideResNet": (dm_wide_resnet, "logits", 32),
    "plain": (Small, "fc2", 8),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_own_classifier_on_the_features_gives_the_logits(case):
    build, expected, side = ARCHITECTURES[case]
    torch.manual_seed(0)
    net = build().eval()
    name = find_classifier(net)
    assert name == expected
    classifier = net.get_submodule(name)
    nn.init.normal_(classifier.weight)  # some start at zero, and then any features would do
    weight = classifier.weight.detach().flatten(1)
    model = replace_head(net, nn.Linear(weight.shape[1], 3))
    images = torch.rand(3, 3, side, side)
    with torch.no_grad():
        features = model.features(images)
        own = features @ weight.T + (0 if classifier.bias is None else classifier.bias)
        expected_logits = net(images)
    assert features.shape == (3, weight.shape[1])
    assert features.abs().max() > 0
    torch.testing.assert_close(own, expected_logits, rtol=1e-4, atol=1e-5 * expected_logits.abs().max().item())
    assert not model.backbone.ends_early  # nothing runs after these classifiers: an exportable backbone
    assert model(images).shape == (3, 3)
