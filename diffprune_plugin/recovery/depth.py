"""After whole blocks are gone: the layers behind the gaps refitted to what the dense model computes there.

Each layer whose input changed is fitted to its own dense output, or, where that is added to the stream, to the stream.
The last block before a gap can take over what of the lost branch its layers can express: its writer to the stream is
fitted to what the dense model has behind the gap, through the gate if there is one (`System`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from diffprune_plugin.adapters.depth import Shallower
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.recovery.residual import GATED, Call, trace
from diffprune_plugin.recovery.ridge import System
from diffprune_plugin.recovery.systems import by_sum, layout_of, split


def depth_systems(
    model: nn.Module, dense: nn.Module, shallower: Shallower, adapter: ModelAdapter, gates: bool
) -> tuple[list[System], dict[str, str]]:
    """The regressions of a model without blocks in order of execution, by its own names, and the layers whose input
    changed and that none fits, with the reason. ``gates``: whether layers before a gap are fitted through gates."""
    moved, others = layers_there(model, dense, shallower, adapter)
    layout = layout_of(model, [*moved, *others], adapter, gates=gates)
    expected = Expected(shallower, tuple(row.path for row in adapter.blocks))
    sums = {}
    for name, (block, coefficient) in layout.sums.items():
        if expected(block) != shallower.dense_name(block):
            sums[name] = block, coefficient
        elif name in moved:  # a gate in a block that ends where it did: the layer's own output is as good, and exact
            sums[name] = (name, 1.0) if coefficient == GATED else (block, coefficient)
    systems = []
    for block, coefficient, names in by_sum(sums, replace(layout, sums=sums)):
        weight = model.get_submodule(names[0]).weight
        for parts in split(model, names):
            kept = torch.arange(len(weight))  # type: ignore[arg-type]
            systems.append(System(block, parts, kept, coefficient, 1.0, expected(block)))
    return systems, {name: why for name, why in layout.left.items() if name in moved}


class Expected:
    """Whose output the dense model has where a module of the smaller one ends: its own, or that of the last block that
    is missing behind it."""

    def __init__(self, shallower: Shallower, lists: tuple[str, ...]) -> None:
        self.shallower, self.lists = shallower, lists

    def __call__(self, name: str) -> str:
        dense = self.shallower.dense_name(name)
        path, _, number = dense.rpartition(".")
        if path not in self.lists:
            return dense
        last = int(number)
        while f"{path}.{last + 1}" in self.shallower.gone:
            last += 1
        return f"{path}.{last}"


def layers_there(
    model: nn.Module, dense: nn.Module, shallower: Shallower, adapter: ModelAdapter
) -> tuple[list[str], list[str]]:
    """The layers that get another input than in the dense model, and the others, of those that both have."""
    size = adapter.trace_size(dense)
    (before, _), (after, _) = trace(dense, adapter, size), trace(model, adapter, size)
    found: tuple[list[str], list[str]] = ([], [])
    for name, call in after.items():
        there = before.get(shallower.dense_name(name))
        layer = there is not None and isinstance(model.get_submodule(name), (nn.Linear, nn.Conv2d))
        # Stable Diffusion 3's last block is made anew: some of its layers have another shape.
        if layer and there is not None and there.output.shape == call.output.shape:
            found[0 if changed(call, there) else 1].append(name)
    return found


def changed(call: Call, other: Call) -> bool:
    """Whether a layer is given something else."""
    first, second = call.args[0], other.args[0]
    return first.shape != second.shape or not torch.equal(first, second)
