"""Nothing that an attack does to the process or to the model outlives it.

Attack libraries reseed the global generators (AutoAttack), switch modules to training mode (torchattacks),
leave gradients on parameters (FAB), end the running trace function (AutoAttack's dynamic check) and count
calls in module-level dictionaries that are never reset. :func:`isolated` puts all of it back.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

# AutoAttack's dynamic check counts calls here and never resets them.
_LEAKED_COUNTERS = ("pyautoattack.checks", "autoattack.checks")
_LOGGERS = ("auto-attack", "")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` inside; every module's own training flag is put back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Parameters ask for no gradient inside; flags and gradients are put back after."""
    saved = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in saved:
        parameter.requires_grad_(False)
        # Taken away rather than kept, so that zero_grad() inside cannot write into it.
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, requires_grad, gradient in saved:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


@contextmanager
def process_state() -> Iterator[None]:
    """Random generators, trace function, leaked counters and log handlers are put back after."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    trace = sys.gettrace()
    counters = [
        (table, dict(table))
        for table in (getattr(sys.modules.get(name), "funcs", None) for name in _LEAKED_COUNTERS)
        if table is not None
    ]
    logs = [(log, list(log.handlers), log.level) for log in (logging.getLogger(name) for name in _LOGGERS)]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    # Grad mode too: attacks need it on, callers may have it off.
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            sys.settrace(trace)
            for table, values in counters:
                table.clear()
                table.update(values)
            for log, handlers, level in logs:
                log.handlers[:] = handlers
                log.setLevel(level)


@contextmanager
def isolated(model: nn.Module, seed: int) -> Iterator[None]:
    """All of the above for one call of an attack, whose global generators start from ``seed``."""
    with evaluation_mode(model), frozen_parameters(model), process_state():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
