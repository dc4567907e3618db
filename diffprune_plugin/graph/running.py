"""A forward pass whose failure names the layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.graph.costs import meta_copy


@torch.no_grad()
def smallest_output(model: nn.Module, adapter: ModelAdapter) -> tuple[int, ...]:
    """The shape that the smallest forward gives; raises BadInput, naming the layer, where the model fails."""
    with failures_named(model):
        output: torch.Tensor = model(**adapter.trace_inputs(model), return_dict=False)[0]
    return tuple(output.shape)


@torch.no_grad()
def execution_order(model: nn.Module, adapter: ModelAdapter) -> list[str]:
    """Names of the modules in the order in which the smallest forward first enters them; nothing is computed."""
    copied, order = meta_copy(model), dict[str, None]()

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: order.setdefault(name)

    for name, module in copied.named_modules():
        module.register_forward_pre_hook(enter(name))
    copied(**adapter.trace_inputs(copied), return_dict=False)
    return list(order)


@contextlib.contextmanager
def failures_named(model: nn.Module) -> Iterator[None]:
    """What a forward raises inside becomes a BadInput that names the innermost module under way."""
    under_way: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: under_way.append(name)

    def leave(*_: Any) -> None:
        under_way.pop()

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(enter(name)).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        try:
            yield
        except Exception as error:  # whatever layers that do not fit each other lead to, in torch or in the model
            where = under_way[-1] if under_way else ""
            what = first_line(error) or type(error).__name__
            raise BadInput(f"{where or type(model).__name__}: {what}") from error
