"""The bridge to RobustBench 1.1.1 (Croce et al. 2021): import it, enter a model, run it, exchange results.

RobustBench imports ``autoattack`` and ``pkg_resources``, which a fresh install does not have, calls AutoAttack by its
old signature, never seeds it, and cuts "module." and "model." out of the keys of a checkpoint wherever they stand.
:func:`import_robustbench` supplies what is missing and only that; :func:`register` writes keys that survive;
:func:`benchmark` seeds, takes local data, and refuses beforehand what would fail after the attack.

JSON entries carry RobustBench's fields exactly; ours do not fit there and stay in the :class:`EvalRecord`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from convex_head.attacks.isolation import evaluation_mode, frozen_parameters, process_state
from convex_head.data import as_pair
from convex_head.errors import InputError, MissingExtraError, WeightsNotFoundError
from convex_head.model_checks import check_logits, clean_logits

DATASETS = ("cifar10", "cifar100", "imagenet")
NORMS = ("Linf", "L2")
_LEAST_CLASSES = 10


def import_robustbench() -> ModuleType:
    """RobustBench, imported with stand-ins for the modules that are missing; they are taken away again.

    Raises:
        MissingExtraError: robustbench or pyautoattack is not installed, or the import fails for another reason.
    """
    if "robustbench" in sys.modules:
        return sys.modules["robustbench"]
    stand_ins: dict[str, ModuleType] = {}
    try:
        if importlib.util.find_spec("pkg_resources") is None:
            stand_ins["pkg_resources"] = _pkg_resources()
        if importlib.util.find_spec("autoattack") is None:
            stand_ins.update(_autoattack())
        sys.modules.update(stand_ins)
        return importlib.import_module("robustbench")
    except ImportError as problem:
        for name in [name for name in sys.modules if name.split(".")[0] == "robustbench"]:
            del sys.modules[name]
        raise MissingExtraError(
            f"RobustBench cannot be imported ({problem}); run: pip install '.[robustbench]' in the checkout."
        ) from problem
    finally:
        # RobustBench holds what it needs; other packages must not find half a pkg_resources.
        for name in stand_ins:
            sys.modules.pop(name, None)


def _pkg_resources() -> ModuleType:
    module = ModuleType("pkg_resources")

    def resource_filename(package: str, resource: str) -> str:
        origin = importlib.util.find_spec(package)
        return str(Path(str(origin and origin.origin)).parent / resource)

    module.resource_filename = resource_filename  # type: ignore[attr-defined]
    return module


def _autoattack() -> dict[str, ModuleType]:
    """pyautoattack behind the module names and the signature of AutoAttack's git version."""
    package = importlib.import_module("pyautoattack")

    class AutoAttack(package.AutoAttack):  # type: ignore[name-defined]
        """AutoAttack's old signature."""

        def __init__(
            self,
            model: nn.Module,
            norm: str = "Linf",
            eps: float = 0.3,
            seed: int | None = None,
            verbose: bool = True,
            attacks_to_run: list[str] | None = None,
            version: str = "standard",
            is_tf_model: bool = False,
            device: torch.device | str = "cpu",
            log_path: str | None = None,
        ) -> None:
            if is_tf_model:
                raise InputError("This AutoAttack takes PyTorch models; found is_tf_model=True.")
            super().__init__(
                model,
                attacks=attacks_to_run or None,
                device=device,
                eps=eps,
                norm=norm,
                seed=seed,
                version=version,
            )
            self.verbose, self._log_path = verbose, log_path

        def run_standard_evaluation(
            self,
            x_orig: Tensor,
            y_orig: Tensor,
            bs: int = 250,
            return_labels: bool = False,
            state_path: Path | None = None,
        ) -> Any:
            """x_adv alone, or (x_adv, y_adv) with ``return_labels``."""
            if state_path is not None:
                raise InputError("AutoAttack's own resume is broken; use convex_head.evaluate(..., state=path).")
            with _logged_to(self.logger, self._log_path):
                pair = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs)
            return pair if return_labels else pair[0]

    module = ModuleType("autoattack")
    module.AutoAttack = AutoAttack  # type: ignore[attr-defined]
    found = {"autoattack": module}
    for name in ("state", "checks"):
        part = importlib.import_module(f"pyautoattack.{name}")
        setattr(module, name, part)
        found[f"autoattack.{name}"] = part
    return found


@contextmanager
def _logged_to(logger: logging.Logger, path: str | None) -> Iterator[None]:
    if path is None:
        yield
        return
    handler, level = logging.FileHandler(path), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


def _keys(dataset: str, threat_model: str) -> tuple[Any, Any]:
    """RobustBench's own enum members."""
    if dataset not in DATASETS or threat_model not in NORMS:
        raise InputError(
            f"RobustBench has the datasets {', '.join(DATASETS)} and the threat models {', '.join(NORMS)}; found "
            f"{dataset!r} and {threat_model!r}. Use convex_head.evaluate for others."
        )
    import_robustbench()
    enums = importlib.import_module("robustbench.model_zoo.enums")
    return enums.BenchmarkDataset(dataset), enums.ThreatModel(threat_model)


def _zoo(dataset: str, threat_model: str) -> dict[str, dict[str, Any]]:
    key, norm = _keys(dataset, threat_model)
    norms = importlib.import_module("robustbench.model_zoo").model_dicts[key]
    # ImageNet has no list for L2.
    zoo: dict[str, dict[str, Any]] = norms.setdefault(norm, OrderedDict())
    return zoo


def register(
    model: nn.Module,
    name: str,
    *,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    model_dir: str | os.PathLike[str] = "./models",
) -> Path:
    """Enter ``model`` in RobustBench's zoo, so that ``robustbench.utils.load_model(name, ...)`` returns it offline.

    Args:
        model: images in [0, 1] to logits, in any mode; a copy is kept.
        name: of the entry; not that of one of RobustBench's own models.
        dataset: "cifar10", "cifar100" or "imagenet".
        threat_model: "Linf" or "L2".
        model_dir: where RobustBench looks for checkpoints; pass the same to ``load_model``.

    Returns:
        the checkpoint that was written.

    Raises:
        InputError: RobustBench has no such dataset or threat model, or the name is taken.
        MissingExtraError: RobustBench is not installed.
    """
    zoo = _zoo(dataset, threat_model)
    if not name or os.sep in name or zoo.get(name, {}).get("gdrive_id", _OURS) != _OURS:
        raise InputError(f"An entry needs a name of its own; {name!r} is empty, a path or RobustBench's. Rename it.")
    template = copy.deepcopy(model).cpu().eval()
    path = Path(model_dir) / dataset / threat_model / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = OrderedDict((_encode(key), value.clone()) for key, value in template.state_dict().items())
    torch.save({"state_dict": state}, path)
    zoo[name] = {"model": partial(_fresh_copy, template), "gdrive_id": _OURS}
    return path


# RobustBench wants some identifier before it looks for the local file.
_OURS = "convex_head"


def _encode(key: str) -> str:
    # RobustBench cuts at "module." and "model."; without dots neither occurs.
    return key.replace(".", "/")


def _fresh_copy(template: nn.Module) -> nn.Module:
    """A copy whose next ``load_state_dict`` understands the encoded keys."""
    model = copy.deepcopy(template)

    def load_state_dict(state: Mapping[str, Tensor], strict: bool = True) -> Any:
        del model.__dict__["load_state_dict"]
        # For ImageNet RobustBench puts "model." before every key.
        decoded = {key.removeprefix("model.").replace("/", "."): value for key, value in state.items()}
        return model.load_state_dict(decoded, strict=strict)

    model.__dict__["load_state_dict"] = load_state_dict
    return model


def zoo_model(
    name: str,
    *,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    model_dir: str | os.PathLike[str] = "./models",
    pretrained: bool = True,
) -> nn.Module:
    """A model of RobustBench's zoo, images in [0, 1] to logits, in eval mode; a backbone for ``replace_head``.

    Args:
        name, dataset, threat_model, model_dir: as in :func:`register`.
        pretrained: False gives the architecture with random weights, without a download.

    Raises:
        InputError: the zoo has no such model.
        WeightsNotFoundError: the weights are neither in ``model_dir`` nor could they be downloaded.
    """
    zoo = _zoo(dataset, threat_model)
    if name not in zoo:
        raise InputError(
            f"RobustBench has no {name!r} for {dataset} and {threat_model}; it has {', '.join(sorted(zoo))}."
        )
    if not pretrained:
        fresh: nn.Module = zoo[name]["model"]()
        fresh.__dict__.pop("load_state_dict", None)
        return fresh.eval()
    load_model = importlib.import_module("robustbench.utils").load_model
    try:
        loaded: nn.Module = load_model(name, model_dir=str(model_dir), dataset=dataset, threat_model=threat_model)
    except (OSError, RuntimeError, ValueError) as problem:
        raise WeightsNotFoundError(
            f"The weights of {name} are not in {os.fspath(model_dir)} and could not be downloaded: {problem}. "
            f"Put {name}.pt into {Path(model_dir) / dataset / threat_model}, or use pretrained=False."
        ) from problem
    return loaded.eval()


def benchmark(
    model: nn.Module,
    *,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    eps: float,
    n_examples: int | None = None,
    data: Any = None,
    batch_size: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    data_dir: str = "./data",
) -> tuple[float, float]:
    """``robustbench.benchmark`` itself, seeded, on local data, with everything restored afterwards.

    Args:
        model: images in [0, 1] to at least ten logits.
        dataset, threat_model: names of RobustBench.
        eps: radius in pixel space.
        n_examples: first examples to use; all of ``data``, else 10,000, if None.
        data: (images, labels), a DataLoader or a name of :func:`load_dataset`, in place of RobustBench's download.
        batch_size, seed: with the same, ``evaluate`` gives the same numbers.
        device: where to run.
        data_dir: where RobustBench looks for its data, if ``data`` is None.

    Returns:
        clean and robust accuracy, fractions.

    Raises:
        InputError: RobustBench has no such dataset or threat model.
        ModelContractError: the model is refused, or has fewer classes than RobustBench's AutoAttack needs.
    """
    key, _ = _keys(dataset, threat_model)
    package: Any = importlib.import_module("robustbench.eval")
    loaders = importlib.import_module("robustbench.data")._clean_dataset_loaders
    original_attack, original_loader = package.AutoAttack, loaders[key]
    package.AutoAttack = partial(original_attack, seed=seed)
    if data is not None:
        images, labels = as_pair(data, n=n_examples)
        n_examples = len(images)
        loaders[key] = lambda n, folder, transform: (images[:n], labels[:n])
    try:
        with evaluation_mode(model), frozen_parameters(model), process_state():
            if data is not None:
                _check_for_robustbench(model.to(device), images, labels, batch_size, torch.device(device))
            clean, robust = package.benchmark(
                model,
                n_examples=10_000 if n_examples is None else n_examples,
                dataset=dataset,
                threat_model=threat_model,
                eps=eps,
                batch_size=batch_size,
                device=torch.device(device),
                data_dir=data_dir,
            )
    finally:
        package.AutoAttack, loaders[key] = original_attack, original_loader
    return float(clean), float(robust)


def _check_for_robustbench(
    model: nn.Module, images: Tensor, labels: Tensor, batch_size: int, device: torch.device
) -> None:
    logits = clean_logits(model, images, batch_size, device)
    check_logits(logits, labels)
    if logits.shape[1] < _LEAST_CLASSES:
        raise InputError(
            f"RobustBench runs AutoAttack's standard version, which needs {_LEAST_CLASSES} classes; the model has "
            f"{logits.shape[1]}. Use convex_head.evaluate, which fits the attack to the number of classes."
        )
