"""Models from text, for the command line.

    module:factory       any callable of an importable module that returns an nn.Module
    torchvision:name     torchvision.models.get_model(name), ImageNet normalisation inside
    timm:name            timm.create_model(name), its own normalisation inside
    robustbench:name     a model of RobustBench's zoo

Files are read with weights_only: a checkpoint can hold weights, never code.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convex_head.baselines.preact_resnet import Normalize
from convex_head.errors import CheckpointError, MissingExtraError, ModelSpecError
from convex_head.threat import ThreatModel

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_LIBRARIES = ("torchvision", "timm")
_KEYS = ("state_dict", "model_state_dict", "model")


def build_model(
    spec: str,
    *,
    num_classes: int,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    dataset: str = "cifar10",
    threat: ThreatModel | None = None,
    model_dir: str | Path = "models",
) -> nn.Module:
    """The model that ``spec`` names, in evaluation mode.

    Args:
        spec: as in the module's docstring.
        num_classes: outputs of torchvision and timm models, and of factories that take ``num_classes``.
        checkpoint: file of weights, loaded strictly; of torchvision and timm models those of the bare network.
        pretrained: let torchvision or timm download their weights (classes as they come).
        dataset, threat, model_dir: where RobustBench looks.

    Raises:
        ModelSpecError: the spec cannot be read, or what it names does not exist or is no module.
        MissingExtraError: the package that it needs is not installed.
        CheckpointError: the file is missing, damaged, or for another architecture.
    """
    source, colon, name = spec.partition(":")
    if not colon or not source or not name:
        raise ModelSpecError(
            f"a model is written module:factory, torchvision:name, timm:name or robustbench:name; found {spec!r}."
        )
    if source == "torchvision":
        model = _torchvision(name, num_classes, pretrained)
    elif source == "timm":
        model = _timm(name, num_classes, pretrained)
    elif source == "robustbench":
        zoo = importlib.import_module("convex_head.robust_bench").zoo_model
        norm = "Linf" if threat is None else threat.norm
        model = zoo(name, dataset=dataset, threat_model=norm, model_dir=model_dir, pretrained=checkpoint is None)
    else:
        model = _factory(source, name, num_classes)
    if checkpoint is not None:
        # Files of weights are those of the network as its library makes it, without the normalisation in front.
        load_weights(model[1] if isinstance(model, nn.Sequential) and source in _LIBRARIES else model, checkpoint)
    return model.eval()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict, bare or under "state_dict" or "model", with or without DataParallel's prefix.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, or its names or shapes differ.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}; give the path of a file of weights.") from error
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a file of weights that torch.load(weights_only=True) reads ({type(error).__name__}); "
            "save it again with torch.save(model.state_dict(), path)."
        ) from error
    for key in _KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no state dict; save it with torch.save(model.state_dict(), path).")
    state = {str(name).removeprefix("module."): value for name, value in content.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{path} does not fit this model: {first}. Name the architecture it was saved from."
        ) from error


def _factory(module: str, name: str, num_classes: int) -> nn.Module:
    try:
        target: Any = importlib.import_module(module)
        for part in name.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise ModelSpecError(
            f"{module}:{name} cannot be found ({error}); the module must be importable from here "
            "(set PYTHONPATH, or install it)."
        ) from error
    model = target if isinstance(target, nn.Module) else _call(target, num_classes)
    if not isinstance(model, nn.Module):
        raise ModelSpecError(f"{module}:{name} gives a {type(model).__name__}; it must return an nn.Module.")
    return model


def _call(factory: Any, num_classes: int) -> Any:
    if not callable(factory):
        raise ModelSpecError(f"{factory!r} is neither a module nor a function that returns one.")
    try:
        takes_classes = "num_classes" in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        takes_classes = False
    return factory(num_classes=num_classes) if takes_classes else factory()


def _torchvision(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    models = _import("torchvision.models", "vision")
    options = {"weights": "DEFAULT"} if pretrained else {"weights": None, "num_classes": num_classes}
    net = _known(lambda: models.get_model(name, **options), f"torchvision:{name}")
    return nn.Sequential(Normalize(*_IMAGENET), net)


def _timm(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    timm = _import("timm", "vision")
    options: dict[str, Any] = {"pretrained": True} if pretrained else {"num_classes": num_classes}
    net = _known(lambda: timm.create_model(name, **options), f"timm:{name}")
    config: Any = net.pretrained_cfg
    return nn.Sequential(Normalize(config["mean"], config["std"]), net)


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module.partition('.')[0]} is not installed; pip install '.[{extra}]' in the checkout."
        ) from error


def _known(build: Callable[[], nn.Module], spec: str) -> nn.Module:
    """Unknown names and failed downloads become one named error."""
    try:
        return build()
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelSpecError(f"{spec} cannot be built: {' '.join(str(error).split())[:300]}.") from error
