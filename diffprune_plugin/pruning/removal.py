"""Removal: the channels of a plan physically gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch_pruning import ops
from torch_pruning.pruner.function import PrunerBox

from diffprune_plugin.adapters.state import check_hooks
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.costs import meta_copy
from diffprune_plugin.graph.groups import ChannelsToGo, CoupledGroup, removed_channels, trace_groups
from diffprune_plugin.graph.running import smallest_output
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.masked_layers import stocked
from diffprune_plugin.pruning.pruned_class import as_pruned_, check_architecture
from diffprune_plugin.pruning.skipped import skipped_in, skipping


@dataclass(frozen=True)
class RemovalReport:
    """What a removal did: how many layers shrank, parameters and MACs before and after, groups that fell short."""

    layers: int
    params: tuple[int, int]
    macs: tuple[int, int]
    shortfalls: tuple[str, ...]


def remove_(model: nn.Module, plan: PruningPlan, *, adapter: ModelAdapter | None = None) -> RemovalReport:
    """Remove the plan's channels from the UNet in place, and make it a class that saves and loads with its plan.

    Every attribute that repeats a size is mended; attention keeps the dense softmax scale (the query weights are
    multiplied by sqrt(new / old head size)).

    Raises BadInput, before anything is changed, if the plan belongs to another architecture, the UNet was pruned before
    or is masked, or would not run afterwards.
    """
    adapter = adapter or find_adapter(model)
    check_hooks(model)
    check_architecture(model, plan, type(model).__name__)
    with stocked(model), skipping(model, plan.skipped, adapter):
        gone = channels_to_go(model, plan, adapter)
        check_trial(model, gone, plan, adapter)
    shrink_(model, gone, plan.heads, adapter)
    as_pruned_(model, plan)
    return RemovalReport(len(plan.layers), plan.params, plan.macs, tuple(plan.shortfalls()))


def check_trial(model: nn.Module, gone: ChannelsToGo, plan: PruningPlan, adapter: ModelAdapter) -> None:
    """Raises BadInput, naming the layer, unless a copy without data (meta device) runs after the removal, and its
    output has the dense one's shape."""
    trial = meta_copy(model)
    dense = smallest_output(trial, adapter)
    shrink_(trial, gone, plan.heads, adapter)
    kind = type(model).__name__
    try:
        found = smallest_output(trial, adapter)
    except BadInput as error:
        raise BadInput(f"after the removal this {kind} would not run: {error}; its adapter misses something") from error
    if found != dense:
        raise BadInput(
            f"after the removal this {kind} would give an output of shape {found}, not {dense}: its adapter has to "
            "keep the last layer"
        )


def shrink_(model: nn.Module, gone: ChannelsToGo, heads: Mapping[str, tuple[int, int]], adapter: ModelAdapter) -> None:
    """Take the channels away, and set right what depends on sizes: attributes, the softmax scale, and ``heads``."""
    sizes = adapter.head_sizes(model)
    remove_channels_(model, gone)
    adapter.set_heads_(model, heads)
    adapter.mend_(model)
    adapter.keep_softmax_scale_(model, sizes)


def channels_to_go(model: nn.Module, plan: PruningPlan, adapter: ModelAdapter) -> ChannelsToGo:
    """For each side of each layer that shrinks, the channels that go; raises BadInput for another UNet's plan."""
    check_architecture(model, plan, type(model).__name__)
    if blocks := sorted(set(plan.skipped) - skipped_in(model)):
        raise BadInput(f"the plan takes whole blocks too ({', '.join(blocks)}), which are there yet; use remove_")
    groups = trace_groups(model, adapter)
    check_groups(groups, plan)
    return removed_channels(groups, plan.removed_units())


@torch.inference_mode(False)
@torch.no_grad()
def remove_channels_(model: nn.Module, gone: ChannelsToGo) -> None:
    """Slice every layer with torch-pruning's own function for its type; what was frozen stays so."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    for (name, side), channels in gone.items():
        layer = model.get_submodule(name)
        pruner = PrunerBox[ops.module2type(layer)]
        slice_ = pruner.prune_out_channels if side == "out" else pruner.prune_in_channels
        slice_(layer, channels.tolist())
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)


def check_groups(groups: list[CoupledGroup], plan: PruningPlan) -> None:
    """Raises BadInput unless the plan's groups are this UNet's."""
    found = {group.root: group.units for group in groups}
    for group in plan.groups:
        if found.get(group.root) != group.units:
            raise BadInput(
                f"the plan has {group.units} units at {group.root}, this UNet {found.get(group.root, 'none')}"
            )
        if group.removed and not 0 <= group.removed[0] <= group.removed[-1] < group.units:
            raise BadInput(f"the plan removes unit {group.removed[-1]} of {group.units} at {group.root}")
