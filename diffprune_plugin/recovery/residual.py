"""Residual sums: which module's output a layer's output is added to, found by running the UNet, not by its classes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.recovery.ridge import by_position


@dataclass(frozen=True)
class Call:
    """One call of a module while the UNet was traced."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def trace(model: nn.Module, adapter: ModelAdapter) -> tuple[dict[str, Call], set[str]]:
    """The call of each module on small inputs, in the order in which they ended, and the modules called repeatedly."""
    calls: dict[str, Call] = {}
    repeated: set[str] = set()

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name in calls:
                repeated.add(name)
            calls[name] = Call(args, kwargs, unpacked(output))

        return hook

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(record(name), with_kwargs=True))
        model(**adapter.example_inputs(model, size=adapter.trace_size(model)))
    return calls, repeated


def unpacked(output: Any) -> Any:
    """The output of a module, taken out of a tuple of one, as diffusers returns with ``return_dict=False``."""
    return output[0] if isinstance(output, tuple) and len(output) == 1 else output


def residual_sum(model: nn.Module, calls: Mapping[str, Call], layer: str) -> tuple[str, float]:
    """The outermost module whose output is a sum that the layer's output is added to, and its coefficient there.

    The layer itself and 1 where there is none, or where nothing but the layer's output is in the sum.
    """
    found, coefficient = layer, 1.0
    for depth in range(layer.count("."), 0, -1):
        block = ".".join(layer.split(".")[:depth])
        if block not in calls:  # a list of modules is never called
            continue
        added = coefficient_in(model.get_submodule(block), calls[block], model.get_submodule(layer))
        if added is None:
            break
        same = torch.equal(by_position(calls[block].output), by_position(calls[found].output))
        if not same:
            found, coefficient = block, added
    return found, coefficient


def coefficient_in(block: nn.Module, call: Call, layer: nn.Module) -> float | None:
    """How often a layer's output is contained in a block's, found by shifting it at random; None if not linearly."""
    shifts: list[Tensor] = []

    def shift(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shifts.append(torch.randn(output.shape, generator=generator).to(output))
        return output + shifts[0]

    if not isinstance(call.output, Tensor):
        return None
    with layer.register_forward_hook(shift):
        moved = unpacked(block(*call.args, **call.kwargs))
    change, given = by_position(moved - call.output).double(), by_position(shifts[0]).double()
    if change.shape != given.shape:
        return None
    coefficient = round(float((change * given).sum() / given.square().sum()), 6)  # float noise must not tell sums apart
    linear = bool((change - coefficient * given).norm() <= 1e-3 * abs(coefficient) * given.norm())
    return coefficient if linear and coefficient else None
