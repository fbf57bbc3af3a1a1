"""Files of features: when they may be used again, and how they are written.

The key of an entry is the SHA-256 of all that features depend on:

    images, device kind, parameters and buffers, the printed module (and so its cut), its hooks, and for every
    module in it the code of its class and the plain attributes it holds (constants of a normalisation, ...).

An entry is ``<key>.npy``, an ordinary float32 array that can be mapped into memory, and ``<key>.json`` with its
shape and digest, written last. Both are written under a temporary name and renamed, so that an interrupted run
leaves no entry; one whose file does not match its description is not valid, and is computed again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convex_head.json_files import write_json

FORMAT = "convex_head features 1"
_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def cache_key(backbone: nn.Module, data_digest: str, device: torch.device) -> str:
    """Hexadecimal key of the features that ``backbone`` on a kind of device gives for digested data."""
    fingerprint = _Fingerprint()
    printed = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(backbone))
    fingerprint.add([FORMAT, data_digest, device.type, printed])
    for name, module in backbone.named_modules():
        fingerprint.add(name)
        fingerprint.add_module(module)
    return fingerprint.hash.hexdigest()


def update_with_tensor(digest: Any, tensor: Tensor) -> None:
    """Feed a tensor's bytes to a hashlib object."""
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


class _Fingerprint:
    """SHA-256 of Python values by content: the same in every process, whatever addresses and hash seeds."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self._functions: dict[int, Any] = {}  # done; kept alive, so that no address is used twice
        self._open: set[int] = set()  # containers around the value at hand, against cycles

    def add_module(self, module: nn.Module) -> None:
        """Class code, parameters, buffers, hooks and attributes of one module, without its children."""
        for base in type(module).__mro__:
            if base not in (nn.Module, object):
                self.add([base.__module__, base.__qualname__, dict(vars(base))])
        self.add([module._parameters, module._buffers])
        self.add([list(module._forward_pre_hooks.values()), list(module._forward_hooks.values())])
        self.add({name: value for name, value in vars(module).items() if name not in _MODULE_INTERNALS})

    def add(self, value: Any) -> None:
        """One value; what is not understood counts by its name."""
        self.hash.update(f"<{type(value).__qualname__}>".encode())
        if isinstance(value, _PLAIN):
            self.hash.update(repr(value).encode())
        elif isinstance(value, (Tensor, np.ndarray)):
            tensor = torch.as_tensor(value)
            self.hash.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            update_with_tensor(self.hash, tensor)
        elif isinstance(value, types.FunctionType):
            if id(value) not in self._functions:
                self._functions[id(value)] = value
                self._add_all(_parts_of_function(value))
        elif not isinstance(value, nn.Module) and id(value) not in self._open:  # modules are walked by name
            self._open.add(id(value))
            self._add_all(_parts(value))
            self._open.discard(id(value))

    def _add_all(self, parts: list[Any]) -> None:
        self.hash.update(str(len(parts)).encode())
        for part in parts:
            self.add(part)


def _parts(value: Any) -> list[Any]:
    """What a value consists of, in an order that does not depend on the process."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, Mapping):
        return [part for key in sorted(value, key=repr) for part in (repr(key), value[key])]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(part) for part in value)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_consts, value.co_names]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, (types.MethodType, staticmethod, classmethod)):
        return [value.__func__]
    return [getattr(value, "__qualname__", "")]


def _parts_of_function(function: types.FunctionType) -> list[Any]:
    """Code, defaults, closure, and the constants and helpers of its own file that it names."""
    parts: list[Any] = [function.__code__, function.__defaults__, function.__kwdefaults__]
    for cell in function.__closure__ or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # a name that is not bound yet
            continue
    for name in function.__code__.co_names:
        named = function.__globals__.get(name)
        own_helper = isinstance(named, types.FunctionType) and named.__module__ == function.__module__
        if own_helper or isinstance(named, (*_PLAIN, tuple, list, dict, Tensor, np.ndarray)):
            parts.append(named)
    return parts


class CacheEntry:
    """The features of one key in a folder."""

    def __init__(self, folder: Path, key: str):
        self.array_path = folder / f"{key}.npy"
        self.meta_path = folder / f"{key}.json"

    def read(self) -> Tensor | None:
        """The features, (n, d) float32, privately mapped; None where there is no intact entry."""
        try:
            meta = json.loads(self.meta_path.read_text())
            array = np.load(self.array_path, mmap_mode="c")
        except (OSError, ValueError, EOFError):  # absent, cut short, or of another format
            return None
        described = [list(array.shape), str(array.dtype), hashlib.sha256(array).hexdigest()]
        if not isinstance(meta, dict) or described != [meta.get(name) for name in ("shape", "dtype", "sha256")]:
            return None
        return torch.from_numpy(array)

    def write(self, chunks: Iterable[Tensor], size: int) -> Tensor:
        """Write (k, d) chunks, ``size`` rows in all, as they come, and map the file.

        Whatever stops it, a full disk, an error or Ctrl-C in ``chunks``, no entry is left.
        """
        self.array_path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        shape = (size, 0)
        # One name a process, so that two that compute the same features do not share a half-written file.
        temporary = self.array_path.with_name(f".{self.array_path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                for chunk in chunks:
                    rows = np.ascontiguousarray(chunk.numpy(), dtype="<f4")
                    if not file.tell():
                        shape = (size, rows.shape[1])
                        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(rows.data)
                    digest.update(rows.data)
            os.replace(temporary, self.array_path)
        finally:
            temporary.unlink(missing_ok=True)
        write_json(self.meta_path, {"shape": list(shape), "dtype": "float32", "sha256": digest.hexdigest()})
        return torch.from_numpy(np.load(self.array_path, mmap_mode="c"))
