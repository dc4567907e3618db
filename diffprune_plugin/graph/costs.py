"""What every layer costs: parameters and MACs, before and after channels are gone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from diffprune_plugin.adapters.state import check_own_forwards
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.graph.products import Products


class Size(NamedTuple):
    """Parameters, and multiply-accumulates for one sample."""

    params: int
    macs: int


@dataclass(frozen=True)
class LayerCost:
    """Channels and size of one layer, applied at so many positions.

    Of its ``params`` elements the ``weights`` have an input and an output side, the others (biases, norm affine) an
    output side only. ``products``: of how many attention products each of its output channels is a part.
    """

    channels_in: int
    channels_out: int
    params: int
    weights: int
    positions: int
    products: int = 0

    def after(self, removed_in: int, removed_out: int) -> Size:
        """Size of the layer when these many channels are gone."""
        left_in = 1 - removed_in / max(self.channels_in, 1)
        left_out = 1 - removed_out / max(self.channels_out, 1)
        params = round(self.weights * left_in * left_out) + round((self.params - self.weights) * left_out)
        return Size(params, params * self.positions + self.products * (self.channels_out - removed_out))


def layer_costs(
    model: nn.Module, adapter: ModelAdapter, extra: Mapping[str, Any] | None = None
) -> dict[str, LayerCost]:
    """The cost of every layer with parameters, for one sample of the config's size (`costs_of`), its prompts as long
    as those in ``extra``, inputs by name; else as the adapter's table says."""
    words = {word: size for word, size in adapter.lengths(model, extra or {}).items() if word in dict(adapter.words)}
    layers, found = adapter.multiplied(model), {}

    def forward(copied: nn.Module) -> None:
        with Products(copied, set(layers.values())) as products:
            copied(**adapter.example_inputs(copied, words=words))
        found.update(products.found)

    costs = costs_of(model, forward)
    return costs | {layer: replace(costs[layer], products=found.get(layers[layer], 0)) for layer in layers}


def costs_of(model: nn.Module, forward: Callable[[nn.Module], Any]) -> dict[str, LayerCost]:
    """The cost of every layer with parameters in one forward; nothing is computed (meta device).

    MACs count every parameter of a convolution, linear or norm layer once per position, as torch-pruning and with it
    the paper do; what has no parameters (activations, attention products, which `layer_costs` adds) is left out.
    """
    copied = meta_copy(model)
    positions: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            positions[name] = positions.get(name, 0) + output.numel() // layer_cost(modules[name], 0).channels_out

        return hook

    modules = {name: module for name, module in copied.named_modules() if own_parameters(module)}
    for name, module in modules.items():
        if not isinstance(module, nn.Embedding) and not any(module.children()):  # of a block they are tables, added
            module.register_forward_hook(count(name))
    with torch.no_grad():
        forward(copied)
    return {name: layer_cost(module, positions.get(name, 0)) for name, module in modules.items()}


def total_macs(model: nn.Module, adapter: ModelAdapter) -> int:
    """MACs of one sample of the config's size, counted as `layer_costs` does."""
    return macs_of(layer_costs(model, adapter))


def macs_of(costs: Mapping[str, LayerCost]) -> int:
    return sum(cost.after(0, 0).macs for cost in costs.values())


def layer_cost(module: nn.Module, positions: int) -> LayerCost:
    """The cost of one layer applied at so many positions."""
    params = own_parameters(module)
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        out, into = module.weight.shape[:2]
        return LayerCost(into, out, params, module.weight.numel(), positions)
    if isinstance(module, nn.Embedding):
        return LayerCost(0, module.embedding_dim, params, 0, 0)
    channels = next(module.parameters(recurse=False)).shape[0]
    return LayerCost(0, channels, params, 0, positions)


def can_narrow(module: nn.Module) -> bool:
    """Whether a layer with fewer channels is cut, counted and rebuilt as it should be."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    if isinstance(module, nn.LayerNorm):
        return module.elementwise_affine  # without, it is in no table of layers that say their width
    return isinstance(module, (nn.Linear, nn.GroupNorm, nn.Embedding))


def own_parameters(module: nn.Module) -> int:
    """Elements of the parameters that the module itself holds."""
    return sum(p.numel() for p in module.parameters(recurse=False))


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the structure without data: parameters and buffers of the same shapes on the meta device.

    Raises BadInput where the copy would not run.
    """
    check_own_forwards(model)
    memo: dict[int, Any] = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()}
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, memo).eval()
