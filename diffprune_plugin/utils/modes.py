"""A model in another mode for a while: with gradients everywhere, or evaluating."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Autograd reaches every parameter, in eval mode, inside `torch.inference_mode` too; afterwards the UNet is as it
    was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        model.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models in eval mode; afterwards as they were."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Autograd reaches activations and no parameter, in eval mode; afterwards the model is as it was."""
    with differentiable(model):  # which remembers what required gradients, and puts it back
        model.requires_grad_(False)
        yield
