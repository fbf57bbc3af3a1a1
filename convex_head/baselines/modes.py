"""Which modules train and which stand still: parameters decide, batch norm and dropout follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def set_training_mode(model: nn.Module) -> None:
    """Training mode for the modules that own trainable parameters, evaluation mode for frozen ones.

    A subtree that has parameters of which none requires a gradient is frozen: its batch-norm statistics and
    dropout stand still. A subtree without parameters behaves as its parent does.
    """
    model.training = True
    for child in model.children():
        parameters = list(child.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            child.eval()
        elif parameters:
            set_training_mode(child)
        else:
            child.train()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode; every module's own mode is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training
