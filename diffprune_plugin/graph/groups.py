"""Coupled groups: which channels of which layers have to go together, and what every layer costs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch_pruning as tp
from torch import nn
from torch_pruning import ops
from torch_pruning.dependency import index_mapping

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.axes import feature_axes
from diffprune_plugin.utils.modes import differentiable

Channels = npt.NDArray[np.int64]
Side = Literal["out", "in"]
ChannelsToGo = dict[tuple[str, Side], Channels]


@dataclass(frozen=True)
class Member:
    """Channels of one side of a layer, in its own numbering, and the root channel that each belongs to."""

    layer: str
    side: Side
    channels: Channels
    roots: Channels


@dataclass(frozen=True)
class CoupledGroup:
    """All channels that a removal of the root layer's output channels drags along.

    The root's ``channels`` fall into ``pairs`` halves that live and die together (GEGLU), leaving ``units``; those fall
    into ``parts`` equal runs (norm groups, heads) that must lose equally many. ``graph_group`` is torch-pruning's own
    group over all channels: what a criterion scores.
    """

    root: str
    channels: int
    pairs: int
    parts: int
    members: tuple[Member, ...]
    graph_group: Any = field(repr=False, compare=False)

    @property
    def units(self) -> int:
        return self.channels // self.pairs

    @property
    def family(self) -> tuple[Any, ...]:
        """What makes groups alike: the kinds of their layers, in the graph's order, and how their units are tied."""
        kinds = ((type(i.dep.target.module).__name__, i.dep.handler.__name__) for i in self.graph_group.items)
        return (self.pairs, self.parts, *kinds)

    @property
    def normed(self) -> bool:
        """Whether group norms are among its layers, whose groups ``parts`` then counts; otherwise it counts heads."""
        return any(isinstance(item.dep.target.module, nn.GroupNorm) for item in self.graph_group.items)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose output channels are coupled, the root first."""
        return tuple(dict.fromkeys(m.layer for m in self.members if m.side == "out"))

    def closed(self, units: Iterable[int]) -> Channels:
        """The root channels of these units, sorted: each with its twin in every other half."""
        return self.rooted(np.asarray(sorted(units), dtype=np.int64))

    def rooted(self, first: Channels) -> Channels:
        """The root channels of units, half by half in the order given."""
        return np.concatenate([first + half * self.units for half in range(self.pairs)])


class Settled(dict[Any, Any]):
    """The nodes of a finished dependency graph, which has no index mappings left to update.

    torch-pruning goes through ``items()`` before it makes any group, to update the mapping of every concatenation and
    reshape: half the time of a Stable Diffusion UNet. Nothing changes while groups are listed, so here it finds none.
    """

    def items(self) -> Any:
        return ()


def trace_groups(model: nn.Module, adapter: ModelAdapter) -> list[CoupledGroup]:
    """The model's coupled groups, found by torch-pruning's dependency graph; every output channel is in at most one.

    Raises BadInput where the graph couples root channels that the adapter's table does not pair, or for a masked model.
    """
    adapter.check(model)
    alone = [model.get_parameter(name) for name in adapter.uncoupled(model)]
    # torch-pruning traces through autograd: a frozen layer would be invisible to it.
    with differentiable(model), feature_axes():
        example = adapter.trace_inputs(model)
        graph = tp.DependencyGraph().build_dependency(model, example, ignored_params=alone, verbose=False)
        return groups_of(graph, model, adapter)


def groups_of(
    graph: Any,
    model: nn.Module,
    adapter: ModelAdapter,
    parts: Mapping[str, int] | None = None,
    root_types: Sequence[type] = (ops.TORCH_CONV, ops.TORCH_LINEAR),
) -> list[CoupledGroup]:
    """The coupled groups of a dependency graph; ``parts``: equal parts by layer, by default those of the adapter."""
    names = {module: name for name, module in model.named_modules()}
    parts, paired = adapter.equal_parts(model) if parts is None else parts, adapter.paired(model)
    kept, groups = adapter.kept_layers(model), []
    with settled(graph):
        for group in graph.get_all_groups(root_module_types=root_types):
            stays = any(names.get(item.dep.target.module) in kept for item in group.items)
            members = tuple(members_of(group, graph, names, stays))
            root = names[group[0].dep.target.module]
            pairs = paired.get(root, 1)
            if not stays:  # how its channels are tied matters to nobody
                check_pairs(group, graph, root, pairs, adapter)
            equal = (parts.get(m.layer, 1) for m in members if m.side == "out")
            groups.append(CoupledGroup(root, len(group[0].idxs), pairs, math.lcm(*equal), members, group))
    return groups


@contextlib.contextmanager
def settled(graph: Any) -> Iterator[None]:
    """Groups are listed without updating index mappings each time: they are brought up to date once."""
    index_mapping.update_index_mapping(graph)
    nodes = graph.module2node
    graph.module2node = Settled(nodes)
    try:
        yield
    finally:
        graph.module2node = nodes


def members_of(group: Any, graph: Any, names: dict[nn.Module, str], stays: bool) -> Iterable[Member]:
    """The layers of a torch-pruning group with their channels; operations without weights are left out.

    Raises BadInput for a parameter outside any layer, unless the group ``stays``.
    """
    for item in group.items:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter) and not stays:
            raise BadInput(f"{graph._param_to_name[module]}: a parameter outside any layer is coupled: not supported")
        if module in names:
            side: Side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            yield Member(names[module], side, np.asarray(item.idxs), np.asarray(item.root_idxs))


def check_pairs(group: Any, graph: Any, root: str, pairs: int, adapter: ModelAdapter) -> None:
    """Raises BadInput unless removing root channel 0 takes exactly its twins in the other halves."""
    dep, channels = group[0].dep, len(group[0].idxs)
    coupled = sorted(graph.get_pruning_group(dep.target.module, dep.handler, [0])[0].idxs)
    if coupled != [half * channels // pairs for half in range(pairs)]:
        raise BadInput(
            f"{root}: channels {coupled} live and die together, which no Pairs row of the adapter for "
            f"{adapter.model_class} says; add one to its table"
        )


def removed_channels(groups: Iterable[CoupledGroup], units: dict[str, list[int]]) -> ChannelsToGo:
    """For each side of each layer that shrinks, the channels that go, when these units (by root layer) go."""
    removed: dict[tuple[str, Side], list[Channels]] = {}
    for group in groups:
        roots = group.closed(units.get(group.root, []))
        for member in group.members if len(roots) else ():
            gone = member.channels[np.isin(member.roots, roots)]
            removed.setdefault((member.layer, member.side), []).append(gone)
    return {key: np.unique(np.concatenate(parts)) for key, parts in removed.items()}
