"""Where a number comes from: fingerprints of model and data, versions, hardware, revision."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_PACKAGES = ("torch", "numpy", "pyautoattack", "torchattacks", "robustbench", "foolbox")


def tensor_fingerprint(*tensors: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of the tensors, in this order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        _update(digest, tensor)
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the printed structure and every parameter and buffer of ``model``."""
    # Functions print their address, which differs between processes.
    structure = re.sub(r" at 0x[0-9a-f]+", "", str(model))
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}\n{structure}".encode())
    # Not state_dict(): buffers that are not persistent change predictions too.
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            digest.update(name.encode())
            _update(digest, tensor)
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    # Viewed as bytes, since numpy knows no bfloat16.
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")


def model_description(model: nn.Module, fingerprint: str) -> dict[str, Any]:
    """Class name, parameter count and fingerprint."""
    return {
        "class": type(model).__qualname__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fingerprint": fingerprint,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a result."""
    return dict(_installed())


@functools.cache
def _installed() -> dict[str, str]:
    # Here and not at the top, because the package imports this module.
    from convex_head import __version__

    found = {"python": platform.python_version(), "convex-head": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Machine type, processor and device; nothing that names the machine itself."""
    found: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        found["device_name"] = torch.cuda.get_device_name(device)
    return found


@functools.cache
def _processor() -> str | None:
    """Model of the processor, where the system tells: rounding, and so what training ends in, depends on it."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return None
    names = [line.partition(":")[2].strip() for line in information.read_text().splitlines() if "model name" in line]
    return names[0] if names else None


@functools.cache
def commit() -> str | None:
    """Revision of the checkout that holds this package, with "+" if it is modified; None outside one."""
    package = Path(__file__).parent
    if not (package.parent / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
