"""The arguments of torch-pruning's BasePruner: which are honoured, which refused, and what they mean for a UNet."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch_pruning as tp
from torch import nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import BadInput, nearest
from diffprune_plugin.graph.patterns import layer_names, matching

SIGNATURE = inspect.signature(tp.pruner.BasePruner)
HONOURED = (
    *("model", "example_inputs", "importance", "global_pruning", "pruning_ratio", "pruning_ratio_dict"),
    *("max_pruning_ratio", "iterative_steps", "iterative_pruning_ratio_scheduler", "ignored_layers", "round_to"),
    *("isomorphic", "out_channel_groups", "num_heads", "prune_num_heads", "prune_head_dims", "head_pruning_ratio"),
    *("root_module_types", "forward_fn", "output_transform"),
)
RENAMED = {
    "channel_groups": "out_channel_groups",
    "ch_sparsity": "pruning_ratio",
    "ch_sparsity_dict": "pruning_ratio_dict",
}
REFUSED = {
    "head_pruning_ratio_dict": "every attention loses the same share of its heads; use head_pruning_ratio",
    "in_channel_groups": "the adapter's table says which channels go together; leave it out",
    "customized_pruners": "a pruned UNet is rebuilt from convolutions, linear, norm and embedding layers only; "
    "use torch_pruning's own BasePruner with **adapter.torch_pruning_kwargs(model)",
    "unwrapped_parameters": "parameters outside layers are not pruned; leave it out",
}
Key = nn.Module | type | str | tuple[Any, ...]


def arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """BasePruner's arguments by their present names, with its defaults.

    Raises BadInput for one that it does not have, or that is not honoured here.
    """
    try:
        bound = SIGNATURE.bind(*args, **kwargs)
    except TypeError as error:
        unknown = next((key for key in kwargs if key not in SIGNATURE.parameters), "")
        raise BadInput(f"Pruner: {error}{nearest(unknown, SIGNATURE.parameters)}") from None
    for old, new in RENAMED.items():
        if old in bound.arguments:
            warnings.warn(f"{old} is deprecated; it is called {new}", stacklevel=3)
            bound.arguments[new] = bound.arguments.pop(old)
    defaults = {key: parameter.default for key, parameter in SIGNATURE.parameters.items()}
    for key, value in bound.arguments.items():
        if key not in HONOURED and value not in (defaults[key], None, {}):
            raise BadInput(f"{key}: {REFUSED.get(key, 'not known to this version; leave it out')}")
    given = {key: bound.arguments.get(key, defaults[key]) for key in HONOURED}
    ratios = given["pruning_ratio_dict"] or {}
    if not isinstance(ratios, Mapping) or not all(isinstance(ratio, (int, float)) for ratio in ratios.values()):
        raise BadInput(f"pruning_ratio_dict: {ratios!r}: give a ratio for each layer, as in {{'mid_block': 0.3}}")
    if not isinstance(given["head_pruning_ratio"], (int, float)):
        raise BadInput(f"head_pruning_ratio: {given['head_pruning_ratio']!r} is no ratio; leave it out, or give one")
    if given["isomorphic"] and not given["global_pruning"]:
        raise BadInput("isomorphic: ranks groups of one shape together, which needs global_pruning=True; add it")
    if given["prune_num_heads"] is not (given["head_pruning_ratio"] > 0):
        raise BadInput("prune_num_heads, head_pruning_ratio: one has no effect without the other; give both or none")
    if given["prune_num_heads"] and (given["prune_head_dims"] or given["global_pruning"]):
        raise BadInput(
            "prune_num_heads: an attention loses whole heads, ranked among its own; add prune_head_dims=False and "
            "leave out global_pruning"
        )
    if not isinstance(given["iterative_steps"], int) or given["iterative_steps"] < 1:
        raise BadInput(f"iterative_steps: {given['iterative_steps']!r} is no whole number from 1 on")
    return given


def layers_of(model: nn.Module, key: Key, argument: str) -> frozenset[str]:
    """Names of the layers that a module, a type, a pattern of names or a tuple of those means, with all inside them.

    Raises BadInput for what means no layer of the model.
    """
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    if isinstance(key, tuple):
        return frozenset().union(*(layers_of(model, part, argument) for part in key))
    if isinstance(key, str):
        return frozenset(matching(key, layer_names(model), argument))
    if not isinstance(key, (type, nn.Module)):
        raise BadInput(f"{argument}: a {type(key).__name__} is no layer; give the module, a type or a name")
    found = [module for module in names if (isinstance(module, key) if isinstance(key, type) else module is key)]
    if not found:
        raise BadInput(f"{argument}: {key if isinstance(key, type) else type(key)}: the model has no such layer")
    return frozenset(names[inside] for module in found for inside in module.modules())


def stays(model: nn.Module, adapter: ModelAdapter, given: Mapping[str, Any]) -> dict[str, str]:
    """The layers that stay as they are, and why."""
    found = adapter.kept_layers(model)
    if not given["prune_head_dims"] and not given["prune_num_heads"]:
        found |= dict.fromkeys(adapter.head_counts(model), "prune_head_dims is False")
    ignored = given["ignored_layers"] or ()
    for key in [ignored] if isinstance(ignored, str) else ignored:
        found |= dict.fromkeys(layers_of(model, key, "ignored_layers"), "ignored_layers")
    return found


def check_heads(model: nn.Module, adapter: ModelAdapter, stated: Mapping[nn.Module, int]) -> None:
    """Raises BadInput where the caller states other heads than the model has."""
    names, heads = {module: name for name, module in model.named_modules()}, adapter.head_counts(model)
    for layer, count in stated.items():
        name = names.get(layer, f"a {type(layer).__name__} outside the model")
        if heads.get(name) != count:
            raise BadInput(f"{count} heads asked for {name}, which has {heads.get(name, 'none')}; leave it out")


def equal_parts(model: nn.Module, adapter: ModelAdapter, stated: Mapping[nn.Module, int]) -> dict[str, int]:
    """For each layer, into how many parts that lose equally many it falls, by the adapter and by the caller.

    Raises BadInput where the caller names no layer of the model.
    """
    names = {module: name for name, module in model.named_modules()}
    parts, paired, heads = adapter.equal_parts(model), adapter.paired(model), adapter.head_counts(model)
    for layer, count in stated.items():
        if layer not in names:
            raise BadInput(f"out_channel_groups: a {type(layer).__name__} outside the model; leave it out")
        name = names[layer]
        if name in heads:
            check_heads(model, adapter, {layer: count})
        elif paired.get(name) != count:
            parts[name] = math.lcm(parts.get(name, 1), count)
    return parts
