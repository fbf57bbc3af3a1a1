"""Where a network can be cut: find its classifier, try a cut on an example.

:func:`find_classifier` needs no list of architectures. timm's networks say which layer it is; any other
network is run once, and the classifier is the last layer that

    takes one vector an image and gives as many numbers an image as the network,

a linear layer, or a convolution whose output is the network's. Tokens and feature maps do not pass for one
vector, so that a network without a classifier is recognised as such.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from convex_head.errors import ClassifierNotFoundError, CutPointError, InputError

# Where architectures keep their classifier, for networks that do not run on a guessed input.
USUAL_NAMES = ("fc", "classifier", "head", "heads", "linear", "logits", "last_linear", "output")


def find_classifier(model: nn.Module, *, example_input: Tensor | None = None) -> str:
    """Name of the final classifier, the node that ``replace_head`` replaces by default.

    Args:
        model: images to logits.
        example_input: a batch of images to run the model on; None to guess its shape. Where no guess fits,
            the classifier is the last linear layer under a usual name, else the last one registered.

    Raises:
        ClassifierNotFoundError: there is none, or there are several side by side.
        InputError: the model does not take ``example_input``.
    """
    net = copy.deepcopy(unwrap(model)).eval()
    return search(net, find_example(net, example_input))


def search(net: nn.Module, example: Tensor | None) -> str:
    """:func:`find_classifier` for a network in evaluation mode and an input that it takes."""
    for module in net.modules():
        declare: Any = getattr(module, "get_classifier", None)
        if callable(declare):
            return _declared(declare(), {part: name for name, part in net.named_modules()})
    candidates = _usual_candidates(net) if example is None else _run_candidates(net, example)
    if not candidates:
        raise ClassifierNotFoundError(
            f"{type(net).__name__} must end in a linear classifier, none was found; name the node to replace "
            "by at=..., or pass example_input if the network takes unusual inputs"
        )
    return candidates[-1]


def _declared(classifier: Any, names: dict[nn.Module, str]) -> str:
    """The name of what timm's get_classifier() returned."""
    parts = list(classifier) if isinstance(classifier, (tuple, list, nn.ModuleList)) else [classifier]
    if len(parts) != 1:
        raise ClassifierNotFoundError(
            f"the network must have one classifier, it has {', '.join(names[part] for part in parts)}; "
            "choose one by at=..."
        )
    layers = [module for module in parts[0].modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if not layers:
        raise ClassifierNotFoundError(
            f"the network must end in a classifier, its own is {type(parts[0]).__name__}; build it with "
            "num_classes > 0 or name the node to replace by at=..."
        )
    return names[layers[-1]]


def _run_candidates(net: nn.Module, example: Tensor) -> list[str]:
    """Names of the layers of the module docstring, in the order in which they are run."""
    seen: list[tuple[str, nn.Module, Tensor]] = []

    def record(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((name, layer, output))

        return hook

    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(record(name)) for name, layer in layers]
    try:
        result = _run(net, example)
    finally:
        for handle in handles:
            handle.remove()
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if not isinstance(logits, Tensor):
        return []

    def is_classifier(layer: nn.Module, output: Tensor) -> bool:
        # A small example shrinks feature maps to one pixel, so that they look like vectors: a convolution
        # has to give the very numbers of the network, a linear layer a matrix of as many.
        if isinstance(layer, nn.Conv2d):
            return output.data_ptr() == logits.data_ptr() and output.numel() == logits.numel()
        return output.ndim == 2 and output.numel() == logits.numel()

    return [name for name, layer, output in seen if is_classifier(layer, output)]


def _usual_candidates(net: nn.Module) -> list[str]:
    """Names of linear layers; those at or below the outermost node with a usual name, if there is one."""
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    nodes = [name for name, _ in net.named_modules() if name.rpartition(".")[2] in USUAL_NAMES]
    for node in sorted(nodes, key=lambda name: name.count(".")):
        inside = [name for name in linear if name == node or name.startswith(f"{node}.")]
        if inside:
            return inside
    return linear


def find_example(net: nn.Module, example_input: Tensor | None) -> Tensor | None:
    """Images that the network takes, on its device: the given ones, or a guess; None where no guess fits.

    Raises:
        InputError: the network does not take ``example_input``.
    """
    reference = next((p for p in net.parameters() if p.is_floating_point()), torch.zeros(()))
    if example_input is not None:
        example = torch.as_tensor(example_input).to(reference)
        try:
            _run(net, example)
        except Exception as error:
            raise InputError(
                f"the model must take example_input, it fails on shape {tuple(example.shape)}: {error}; "
                "pass a batch of images"
            ) from error
        return example
    for shape in _plausible_shapes(net):
        guess = torch.linspace(0, 1, 2 * math.prod(shape)).reshape(2, *shape).to(reference)
        try:
            _run(net, guess)
        except Exception:  # a wrong guess may fail in any way
            continue
        return guess
    return None


def _plausible_shapes(net: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes (c, h, w) or (d,) to try: what the network declares, then what its first layer takes."""
    for module in net.modules():
        declared = getattr(module, "default_cfg", None)
        if isinstance(declared, dict) and "input_size" in declared:
            yield tuple(declared["input_size"])
    convolution = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is not None:
        yield from ((convolution.in_channels, side, side) for side in (32, 224, 28, 8))
    linear = next((m for m in net.modules() if isinstance(m, nn.Linear)), None)
    if linear is not None:
        yield (linear.in_features,)


def try_cut(net: nn.Module, at: str, example: Tensor) -> tuple[Tensor, bool]:
    """Run the network with a cut before the node ``at``.

    Returns:
        The input of the node for ``example`` (N, ...), and whether the run has to end there: False if the
        network with an identity in the node's place returns just that.

    Raises:
        CutPointError: the node is not run, or more than once.
    """
    inputs: list[Tensor] = []
    outputs: list[tuple[Any, Any]] = []
    node = net.get_submodule(at)
    # Copies, since layers behind may write into these tensors.
    before = node.register_forward_pre_hook(lambda _, args: inputs.append(_copy(*args[:1])))
    after = node.register_forward_hook(lambda _, args, output: outputs.append((output, _copy(output))))
    try:
        final = _run(net, example)
    finally:
        before.remove()
        after.remove()
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise CutPointError(
            f"the node {at!r} must be run once in a forward pass, on a tensor; it is run {len(inputs)} "
            "times; cut at another node"
        )
    output, kept = outputs[0]
    is_last = (
        isinstance(final, Tensor)
        and isinstance(output, Tensor)
        and final.data_ptr() == output.data_ptr()
        and final.shape.numel() == output.shape.numel()
        and torch.equal(output, kept)
    )
    return inputs[0], not (is_last and (at == "" or _identity_works(net, at, example, inputs[0])))


def _identity_works(net: nn.Module, at: str, example: Tensor, features: Tensor) -> bool:
    """Whether the network with an identity at the cut returns the features."""
    node = net.get_submodule(at)
    net.set_submodule(at, nn.Identity())
    try:
        result = _run(net, example)
    except Exception:  # the forward pass looks into the node: any failure is possible
        return False
    finally:
        net.set_submodule(at, node)
    return torch.equal(result.flatten(1), features.flatten(1))


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and torch.compile's wrapper."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@torch.no_grad()
def _run(net: nn.Module, images: Tensor) -> Any:
    return net(images)


def _copy(value: Any = None) -> Any:
    return value.clone() if isinstance(value, Tensor) else None
