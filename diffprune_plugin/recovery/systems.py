"""Which regressions a plan asks for: the layers behind the cuts, by the residual sum that their outputs go into."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.graph.groups import ChannelsToGo, removed_channels, trace_groups
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.pruning.removal import check_groups
from diffprune_plugin.recovery.residual import GATED, residual_sum, trace
from diffprune_plugin.recovery.ridge import Part, System, refusal

UNKNOWNS = 4_608  # of one system; a layer with more is solved in blocks of input channels


@dataclass(frozen=True)
class Layout:
    """Where layers stand: their sums' module and coefficient there, why others have none; the order of execution."""

    sums: Mapping[str, tuple[str, float]]
    left: Mapping[str, str]
    order: Mapping[str, int]


def find_systems(
    model: nn.Module, dense: nn.Module, plan: PruningPlan, adapter: ModelAdapter
) -> tuple[list[System], dict[str, str]]:
    """The regressions in order of execution, and the layers behind a cut that none fits, with the reason."""
    groups = trace_groups(dense, adapter)
    check_groups(groups, plan)
    gone = removed_channels(groups, plan.removed_units())
    layout = layout_of(model, (layer for layer, side in gone if side == "in"), adapter)
    return systems_of(model, dense, gone, layout, adapter), dict(layout.left)


def layout_of(model: nn.Module, layers: Iterable[str], adapter: ModelAdapter, gates: bool = False) -> Layout:
    """The sums of these layers, with ``gates`` those that they go into through one too; a model has those that it has
    after a removal too."""
    calls, repeated = trace(model, adapter)
    sums, left = {}, {}
    for name in layers:
        reason = "called repeatedly" if name in repeated else "" if name in calls else "not called"
        reason = reason or refusal(model.get_submodule(name), calls[name].output)
        if reason:
            left[name] = reason
        else:
            sums[name] = residual_sum(model, calls, name, gates)
    return Layout(sums, left, {name: place for place, name in enumerate(calls)})


def systems_of(
    model: nn.Module,
    dense: nn.Module,
    gone: ChannelsToGo,
    layout: Layout,
    adapter: ModelAdapter,
    only: Collection[str] | None = None,
) -> list[System]:
    """The regressions of the layers behind these cuts in order of execution; ``only``: of these layers alone."""
    behind = [layer for layer, side in gone if side == "in" and (only is None or layer in only)]
    factors, systems = softmax_factors(model, dense, adapter), []
    for block, coefficient, names in by_sum(behind, layout):
        channels = np.arange(len(dense.get_submodule(names[0]).weight))  # type: ignore[arg-type]
        kept = torch.from_numpy(np.setdiff1d(channels, gone.get((names[0], "out"), [])))
        for parts in split(model, names):
            systems.append(System(block, parts, kept, coefficient, factors.get(block, 1.0)))
    return systems


def by_sum(layers: Iterable[str], layout: Layout) -> list[tuple[str, float, list[str]]]:
    """The sums that layers go into, each with its module, their coefficient and them, all in order of execution; each
    layer that is gated by itself."""
    sums: dict[tuple[str, float, str], list[str]] = {}
    for name in layers:
        if name in layout.sums:
            block, coefficient = layout.sums[name]
            sums.setdefault((block, coefficient, name if coefficient == GATED else ""), []).append(name)
    order = layout.order
    found = sorted(sums.items(), key=lambda item: order[item[0][0]])
    return [(block, coefficient, sorted(names, key=order.__getitem__)) for (block, coefficient, _), names in found]


def softmax_factors(model: nn.Module, dense: nn.Module, adapter: ModelAdapter) -> dict[str, float]:
    """What `remove_` multiplied each query projection with, to keep the dense softmax scale."""
    before, after = adapter.head_sizes(dense), adapter.head_sizes(model)
    return {query: math.sqrt(after[name] / before[name]) for query, name in adapter.queries(model).items()}


def split(model: nn.Module, names: list[str]) -> Iterator[list[Part]]:
    """The input channels of some layers, in systems of at most UNKNOWNS unknowns."""
    parts: list[Part] = []
    room = UNKNOWNS
    for name in names:
        layer: Any = model.get_submodule(name)
        channels, each = layer.weight.shape[1], layer.weight[0, 0].numel()
        pieces = -(-channels // max(UNKNOWNS // each, 1))
        size = -(-channels // pieces)
        for first in range(0, channels, size):
            part = Part(name, layer, first, min(first + size, channels))
            if parts and part.weight()[0].numel() > room:
                yield parts
                parts, room = [], UNKNOWNS
            parts.append(part)
            room -= part.weight()[0].numel()
    yield parts
