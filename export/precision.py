"""Half precision that is right: layers that stay in fp32, by name or because their values have no place in fp16."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from diffprune_plugin.adapters.ports import config_of
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import CheckFailed
from diffprune_plugin.graph.patterns import layer_names, matching, outermost

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
TRIED = 50  # timesteps, half of them from each end
KEY = "--keep-fp32"


def mixed(model: nn.Module, dtype: str, patterns: Sequence[str]) -> tuple[nn.Module, list[str]]:
    """A copy in another dtype but for the modules that patterns mean, and their names, the outermost alone.

    A module that is kept takes what it gets in fp32 and gives what it computes in the other dtype, so that only what
    it does itself is exact. Raises BadInput for a pattern that matches nothing.
    """
    names = layer_names(model)
    kept = outermost(name for pattern in patterns for name in matching(pattern, names, KEY))
    half = copy.deepcopy(model)
    for name, module in half.named_modules():
        if not within(name, kept):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor.data
        if (own := next(module.parameters(recurse=False), None)) is not None:
            module.register_forward_pre_hook(taking(own.dtype), with_kwargs=True)
    for name in kept:
        module = half.get_submodule(name)
        module.register_forward_pre_hook(taking(torch.float32), with_kwargs=True, prepend=True)
        module.register_forward_hook(giving(DTYPES[dtype]))
    return half.eval(), kept


def within(name: str, outer: Iterable[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in outer)


def taking(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda module, args, kwargs: (cast(args, dtype), cast(kwargs, dtype))


def giving(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda module, args, output: cast(output, dtype)


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor in a nest of values in another dtype."""

    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tree_map(one, values)


@dataclass
class Seen:
    """Of each module, in the order in which they end: the largest output, and whether what it got was finite.

    Infinite where an output was not finite.
    """

    largest: dict[str, float] = field(default_factory=dict)
    got: dict[str, bool] = field(default_factory=dict)

    def first_overflow(self) -> str | None:
        """The first module to end whose outputs are not finite and whose inputs are."""
        return next((n for n, most in self.largest.items() if most == float("inf") and self.got[n]), None)


@contextmanager
def watched(model: nn.Module) -> Iterator[Seen]:
    """What all modules give, while this lasts."""
    seen, handles = Seen(), []
    for name, module in model.named_modules():

        def hook(_: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            seen.got[name] = seen.got.get(name, True) and largest([args, kwargs]) < float("inf")
            seen.largest[name] = max(largest(output), seen.largest.get(name, 0.0))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def largest(values: Any) -> float:
    """The largest absolute value; infinite where one is not finite."""
    tensors = [v for v in tree_leaves(values) if isinstance(v, torch.Tensor) and v.is_floating_point() and v.numel()]
    most = [float(tensor.abs().max()) for tensor in tensors]
    return max(most, default=0.0) if all(map(math.isfinite, most)) else float("inf")  # max may pass a NaN over


def ends(model: nn.Module, adapter: ModelAdapter) -> list[int]:
    """`TRIED` timesteps that the model takes, half of them the first and half the last."""
    steps = adapter.tried_timesteps(config_of(model))
    return sorted({*steps[: TRIED // 2], *steps[-(TRIED // 2) :]})


@torch.no_grad()
def tried(model: nn.Module, adapter: ModelAdapter, dtype: torch.dtype, timesteps: Sequence[int]) -> Seen:
    """What the modules give at each of these timesteps, for unit noise."""
    inputs, name = adapter.flat_inputs(model), adapter.timestep
    inputs = {port: value if port == name else cast(value, dtype) for port, value in inputs.items()}
    with watched(model) as seen:
        for step in timesteps:
            adapter.denoise(model, inputs | {name: torch.full_like(inputs[name], step * adapter.model_time)})
    return seen


def found_by_itself(
    model: nn.Module, adapter: ModelAdapter, dtype: str, patterns: Sequence[str], device: str = "cpu"
) -> list[str]:
    """The modules that have to stay in fp32, beside those of patterns, for every output to be finite: those around the
    first that overflow, up to where values fit the dtype again.

    Looked for at 50 timesteps from both ends, in PyTorch, in the dtype itself. Raises CheckFailed where nothing below
    the whole model has outputs that fit.
    """
    most, timesteps, kept = torch.finfo(DTYPES[dtype]).max, ends(model, adapter), list(patterns)
    model = copy.deepcopy(model).to(device)
    exact: Mapping[str, float] = {}
    while True:
        half, names = mixed(model, dtype, kept)
        culprit = tried(half, adapter, DTYPES[dtype], timesteps).first_overflow()
        if culprit is None:
            return outermost(names)
        exact = exact or tried(model, adapter, torch.float32, timesteps).largest
        around = enclosing(culprit, exact, most, names)
        if not around:
            told = f"--dtype {dtype}: {culprit or 'the model'} reaches {exact.get(culprit, float('inf')):.3g}"
            raise CheckFailed(f"{told}, and nothing around it comes back below {most:.5g}; use --dtype fp32")
        kept.append(around)


def enclosing(name: str, exact: Mapping[str, float], most: float, kept: Sequence[str]) -> str:
    """The module itself or the nearest around it whose outputs fit and that is not kept yet; nothing if none is."""
    while name and (exact.get(name, float("inf")) > most or within(name, kept)):
        name = name.rpartition(".")[0]
    return name
