"""Residual sums: which module's output a layer's output is added to, found by running the UNet, not by its classes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.graph.patterns import around
from diffprune_plugin.recovery.ridge import by_position

GATED = 0.0  # a coefficient: no one number


@dataclass(frozen=True)
class Call:
    """One call of a module while the UNet was traced."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def trace(
    model: nn.Module, adapter: ModelAdapter, size: tuple[int, int] | None = None
) -> tuple[dict[str, Call], set[str]]:
    """The call of each module on small inputs, of ``size`` (height, width) if it is given, in the order in which they
    ended, and the modules called repeatedly."""
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
        model(**adapter.example_inputs(model, size=size or adapter.trace_size(model)))
    return calls, repeated


def unpacked(output: Any) -> Any:
    """The output of a module, taken out of a tuple of one, as diffusers returns with ``return_dict=False``."""
    return output[0] if isinstance(output, tuple) and len(output) == 1 else output


def residual_sum(model: nn.Module, calls: Mapping[str, Call], layer: str, gates: bool = False) -> tuple[str, float]:
    """The outermost module whose output is a sum that the layer's output is added to, and its coefficient there: with
    ``gates`` also `GATED`, where each channel has its own, of each sample.

    The layer itself and 1 where there is none, or where nothing but the layer's output is in the sum.
    """
    found, coefficient = layer, 1.0
    for block in around(layer)[:-1]:
        if block not in calls:  # a list of modules is never called
            continue
        added = coefficient_in(model.get_submodule(block), calls[block], layer[len(block) + 1 :])
        if added is None or (added == GATED and not gates):
            break
        same = torch.equal(by_position(calls[block].output), by_position(calls[found].output))
        if not same:
            found, coefficient = block, added
    return found, coefficient


def coefficient_in(block: nn.Module, call: Call, layer: str) -> float | None:
    """How often the output of the layer of this name in a block is contained in the block's; None if not linearly.

    Found by shifting it at random; in float32, since half precision rounds sums by more than what tells them apart.
    """
    if not isinstance(call.output, Tensor):
        return None
    block, call = in_single(block, call)
    found = shifted(
        block, call, layer, lambda like: torch.randn(like.shape, generator=torch.Generator().manual_seed(0))
    )
    if found is None:
        return None
    change, given = found
    coefficient = round(float((change * given).sum() / given.square().sum()), 6)  # float noise must not tell sums apart
    if bool((change - coefficient * given).norm() <= 1e-3 * abs(coefficient) * given.norm()):
        return coefficient or None
    gate = (change * given).sum(1, keepdim=True) / given.square().sum(1, keepdim=True)
    if bool((change - gate * given).norm() > 1e-3 * change.norm()):
        return None
    again = gate_in(block, call, layer)  # at one position everything looks like a gate
    return GATED if again is not None and bool((again - gate).norm() <= 1e-3 * gate.norm()) else None


def gate_in(block: nn.Module, call: Call, layer: str) -> Tensor | None:
    """What each channel of a layer's output is multiplied with in the block's: (batch, 1, channels), in float64; the
    mean over positions, of which a gate is the same at all. In float32, as `coefficient_in`."""
    found = shifted(*in_single(block, call), layer, torch.ones_like)
    return None if found is None else found[0].mean(1, keepdim=True)


def shifted(
    block: nn.Module, call: Call, layer: str, shift: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor] | None:
    """How a block's output changes when something is added to a layer's in it, and what was, both (batch, positions,
    channels) in float64; None where they are of other shapes."""
    shifts: list[Tensor] = []

    def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        shifts.append(shift(output).to(output))
        return output + shifts[0]

    with block.get_submodule(layer).register_forward_hook(add):
        moved = unpacked(block(*call.args, **call.kwargs))
    change, given = by_position(moved - call.output).double(), by_position(shifts[0]).double()
    return (change, given) if change.shape == given.shape else None


def in_single(block: nn.Module, call: Call) -> tuple[nn.Module, Call]:
    """A block and a call of it in float32; the same ones if they are."""
    if call.output.element_size() >= 4:
        return block, call
    block, args, kwargs = copy.deepcopy(block).float(), widened(call.args), widened(call.kwargs)
    return block, Call(args, kwargs, unpacked(block(*args, **kwargs)))


def widened(value: Any) -> Any:
    """What a module is called with, its half-precision tensors in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(widened, value))
    return {key: widened(each) for key, each in value.items()} if isinstance(value, dict) else value
