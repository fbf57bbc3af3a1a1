"""The drop-in: a pretrained network whose last layers are replaced by another head.

    SplicedModel(images) = head(phi(images)),    phi(images) = the input of the node ``at``, as (N, d).

The node named by ``at`` *and everything that runs after it* is what is replaced; the default is the final
classifier, which :func:`~convex_head.cut_points.find_classifier` looks for. So at="fc" replaces the last
layer of a ResNet, at="classifier.0" the two-layer classifier of a MobileNetV3, at="layer4.1.conv2" the last
convolution of a ResNet-18 and all behind. Feature maps (N, c, h, w) are flattened.

How the network is cut. The node is exchanged in a copy of the network; the given one is never touched. Where
a trial run shows that the node's output *is* the network's output, the node becomes an identity, and the
backbone stays an ordinary module that can be exported. Else it becomes a node that ends the run there and
hands its input back.
"""

from __future__ import annotations

import copy
import difflib
import math
from typing import Any

import torch
from torch import Tensor, nn

from convex_head.cut_points import find_classifier, find_example, search, try_cut, unwrap
from convex_head.errors import CutPointError, FeatureShapeError, InputError

__all__ = ["Backbone", "SplicedModel", "find_classifier", "replace_head"]


class SplicedModel(nn.Module):
    """A frozen backbone and a head; images (N, c, h, w) in [0, 1] to logits (N, C).

    Attributes:
        backbone: images to features (N, d); no parameter requires a gradient, always in evaluation mode
            whatever ``train()`` says; gradients with respect to the images flow.
        head: features to logits; follows ``train()`` and ``eval()`` as usual.
        path_: what ``robustify`` tried before it chose this head; empty otherwise.
    """

    path_: tuple[Any, ...] = ()

    def __init__(self, backbone: Backbone, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def features(self, images: Tensor) -> Tensor:
        """Features (N, d) that the head sees."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C).

        Raises:
            FeatureShapeError: images of this size give features of another width than the head's.
        """
        features = self.backbone(images)
        _check_width(self.head, features.shape[1])
        return self.head(features)


class Backbone(nn.Module):
    """A network up to a cut; images to features (N, d).

    Args:
        net: the network; it is changed, frozen and kept.
        cut: name of the node whose input the features are; "" for the network itself.
        ends_early: end the run at the node, rather than let the features pass through what follows it.

    Attributes:
        net: the network with the node ``cut`` exchanged.
        cut, ends_early: as above.
    """

    def __init__(self, net: nn.Module, cut: str, *, ends_early: bool):
        super().__init__()
        node = _Stop() if ends_early else nn.Identity()
        if cut:
            net.set_submodule(cut, node)
        self.net = net if cut else node
        self.cut = cut
        self.ends_early = ends_early
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, d).

        Raises:
            CutPointError: the network does not run the node ``cut``.
        """
        if self.net.training:  # somebody walked over the modules and set each to train
            self.net.eval()
        if not self.ends_early:
            return self.net(images).flatten(1)
        try:
            self.net(images)
        except _Reached as reached:
            return reached.features.flatten(1)
        raise CutPointError(f"the node {self.cut!r} is not run in the forward pass; cut at another node")

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode: batch statistics and dropout would change the features."""
        return super().train(False)

    def extra_repr(self) -> str:
        return f"cut={self.cut!r}, ends_early={self.ends_early}"


class _Reached(Exception):
    """Carries the features out of the network's forward pass."""

    def __init__(self, features: Tensor):
        super().__init__("the cut point was reached outside of Backbone.forward")
        self.features = features


class _Stop(nn.Module):
    """Ends the forward pass with its input."""

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise _Reached(features)


def replace_head(
    model: nn.Module, head: nn.Module, at: str | None = None, *, example_input: Tensor | None = None
) -> SplicedModel:
    """Replace the classifier of ``model``, or everything from the node ``at`` on, by ``head``.

    Args:
        model: images in [0, 1] to logits, normalisation inside; a torchvision, timm or RobustBench network or
            any other module. It is copied, never changed. DataParallel and torch.compile wrappers are taken
            off. A SplicedModel is given another head.
        head: features (N, d) to logits (N, C), for example a ConvexRobustHead or an ``nn.Linear``. It is not
            copied, and moved to the device of ``model``.
        at: name of a node as in ``model.named_modules()``; None for the final classifier.
        example_input: a batch of images to try the network on; None to guess its shape. Needed only where the
            guess fails, or to have the width of convolutional features checked at once.

    Returns:
        The spliced model in evaluation mode, with a frozen backbone.

    Raises:
        CutPointError: there is no node ``at``, or it is run never or more than once in a forward pass.
        ClassifierNotFoundError: ``at`` is None and no final classifier was found.
        FeatureShapeError: the head is for features of another width.
        InputError: an argument is not a module, or the model does not take ``example_input``.
    """
    for name, module in (("model", model), ("head", head)):
        if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{name} must be an nn.Module, not scripted, is {type(module).__name__}; pass an eager one"
            )
    net = unwrap(model)
    if isinstance(net, SplicedModel):
        if at is None:
            return _assemble(copy.deepcopy(net.backbone), head)
        net = net.backbone.net
    net = copy.deepcopy(net).eval()
    example = find_example(net, example_input)
    if at is None:
        at = search(net, example)
    elif at not in dict(net.named_modules()):
        raise CutPointError(_no_such_node(net, at))
    ends_early = True
    if example is not None:
        features, ends_early = try_cut(net, at, example)
        # The width of feature maps depends on the size of the images, and that may be a guess.
        if example_input is not None or features.ndim == 2:
            _check_width(head, math.prod(features.shape[1:]))
    return _assemble(Backbone(net, at, ends_early=ends_early), head)


def _assemble(backbone: Backbone, head: nn.Module) -> SplicedModel:
    parameter = next(backbone.parameters(), None)
    model = SplicedModel(backbone, head if parameter is None else head.to(parameter.device))
    return model.eval()


def _check_width(head: nn.Module, width: int) -> None:
    expected = getattr(head, "in_features", None)
    if isinstance(expected, int) and expected != width:
        raise FeatureShapeError(
            f"the head must take the backbone's features: it has in_features={expected}, the backbone gives "
            f"{width}; build the head with in_features={width} or cut elsewhere"
        )


def _no_such_node(net: nn.Module, at: str) -> str:
    names = [name for name, _ in net.named_modules() if name]
    close = difflib.get_close_matches(at, names, n=5) or [name for name, _ in net.named_children()]
    return f"at must name a node of the model, it has no {at!r}; use a close or outer one: {', '.join(close)}"
