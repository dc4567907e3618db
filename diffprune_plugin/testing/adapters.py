"""Checks for the author of an adapter, to be called from tests; what does not hold is a CheckFailed."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffprune_plugin.adapters.ports import config_of, sized
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.graph.groups import CoupledGroup, trace_groups
from diffprune_plugin.planning.planner import make_plan
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.loading import load
from diffprune_plugin.pruning.removal import remove_
from diffprune_plugin.pruning.saving import save
from diffprune_plugin.testing.permute import NORMS, new_order, reorder_
from diffprune_plugin.testing.tiny import unsettled_

ROWS = ("inputs", "keep", "heads", "pairs", "mirrors", "words")


RATIOS = (0.3, 0.5)


def check_adapter(adapter: ModelAdapter, *unets: nn.Module, export: bool = True) -> None:
    """Test an adapter's table on tiny dense UNets of its class that between them use every row.

    Enough: coupled channels can change places, dead ones can be removed, without any effect on the output; at ratios
    0.3 and 0.5 the UNet runs, gives outputs of the shape that the table says, and is saved and loaded with
    difference 0; ``export``: the first one's ONNX file is verified. Needed: without any one row, some of this fails.

    Raises CheckFailed naming the UNet's fault or the row; BadInput without a UNet.
    """
    if not unets:
        raise BadInput("check_adapter: give at least one tiny UNet of the class")
    torch.manual_seed(0)
    unets = tuple(unsettled_(copy.deepcopy(model)).eval() for model in unets)
    for model in unets:
        check_enough(adapter, model)
        check_reload(adapter, model)
    if export:
        check_export(adapter, unets[0])
    for field in ROWS:
        for row in (row for row in getattr(adapter, field) if not getattr(row, "optional", False)):
            rest: Any = tuple(other for other in getattr(adapter, field) if other is not row)
            shorter = dataclasses.replace(adapter, **{field: rest})
            if not any(fails(shorter, model) for model in unets):
                raise CheckFailed(
                    f"{adapter.model_class}: nothing fails without {row!r} in {field}; drop it, or give a UNet with it"
                )


def fails(adapter: ModelAdapter, model: nn.Module) -> bool:
    try:
        check_enough(adapter, model)
    except CheckFailed:
        return True
    return False


def check_enough(adapter: ModelAdapter, model: nn.Module) -> None:
    """Raises CheckFailed for the first thing that the table does not say and the UNet needs."""
    for name, check in (
        ("a forward pass", check_shapes),
        ("channels that change places", check_coupling),
        ("the removal of dead channels", check_dead),
        ("pruning", check_pruned),
    ):
        try:
            check(adapter, model)
        except CheckFailed as error:
            raise CheckFailed(f"{adapter.model_class}: {name}: {error}") from None
        except Exception as error:  # whatever a wrong table leads to, in the model or in torch
            raise CheckFailed(f"{adapter.model_class}: {name}: {type(error).__name__}: {error}") from error


def check_shapes(adapter: ModelAdapter, model: nn.Module) -> None:
    """Raises CheckFailed unless the output has the shape that the table says."""
    batch = 2
    found = adapter.denoise(model, adapter.flat_inputs(model, batch))
    expected = tuple(sized(adapter.outputs[0].shape(config_of(model)), adapter.sizes(model, batch)))
    if tuple(found.shape) != expected:
        raise CheckFailed(f"the output has shape {tuple(found.shape)}, not {expected}; see outputs and keep")
    if not bool(torch.isfinite(found).all()):
        raise CheckFailed("the output is not finite")


def check_coupling(adapter: ModelAdapter, model: nn.Module) -> None:
    """Raises CheckFailed unless the units of each group can change places without any effect."""
    inputs, kept, moved = adapter.flat_inputs(model, 2), adapter.kept_layers(model), copy.deepcopy(model)
    expected, whole = adapter.denoise(model, inputs), adapter.head_layers(model, whole=True)
    for number, group in enumerate(trace_groups(model, adapter)):
        if kept.keys().isdisjoint(group.layers):
            weights = dict(model.state_dict())
            order = new_order(model, group, np.random.default_rng(number), group.root in whole)
            reorder_(weights, model, group, order)
            moved.load_state_dict(weights)
            compare(moved, adapter, inputs, expected, f"those of {group.root} have an effect")


def check_dead(adapter: ModelAdapter, model: nn.Module) -> None:
    """Raises CheckFailed unless dead units, in groups that no norm sees, can be removed without any effect."""
    inputs, kept, dead = adapter.flat_inputs(model, 2), adapter.kept_layers(model), copy.deepcopy(model)
    units, heads, whole = {}, {}, adapter.head_layers(model, whole=True)
    for group in trace_groups(model, adapter):
        normed = any(isinstance(model.get_submodule(member.layer), NORMS) for member in group.members)
        size, half = group.units // group.parts, group.parts // 2
        if normed or not kept.keys().isdisjoint(group.layers):
            continue
        if half and group.root in whole:
            units[group.root] = list(range(half * size))
            heads[whole[group.root]] = (group.parts, group.parts - half)
        elif size > 1 and group.root not in whole:
            units[group.root] = [part * size + i for part in range(group.parts) for i in range(size // 2, size)]
        kill_(dead, group, units.get(group.root, []))
    expected = adapter.denoise(dead, inputs)
    plan = make_plan(dead, "magnitude", pruning_ratio=0.0, adapter=adapter)
    chosen = tuple(g.model_copy(update={"removed": tuple(units.get(g.root, ()))}) for g in plan.groups)
    remove_(dead, plan.model_copy(update={"groups": chosen, "heads": heads}), adapter=adapter)
    compare(dead, adapter, inputs, expected, f"some of {', '.join(units)} has an effect (heads: query and scale?)")


@torch.no_grad()
def kill_(model: nn.Module, group: CoupledGroup, units: list[int]) -> None:
    """Set these units' own weights to zero, on the way in and out."""
    for member in group.members:
        channels = torch.from_numpy(member.channels[np.isin(member.roots % group.units, units)])
        layer = model.get_submodule(member.layer)
        for parameter in layer.parameters(recurse=False):
            if member.side == "out" and not isinstance(layer, nn.Embedding):
                parameter[channels] = 0
            elif parameter.dim() > 1:
                parameter[:, channels] = 0


def check_pruned(adapter: ModelAdapter, model: nn.Module) -> None:
    """Raises CheckFailed unless the pruned UNet runs with outputs of the right shape."""
    for ratio in RATIOS:
        check_shapes(adapter, pruned(adapter, model, ratio))


def check_reload(adapter: ModelAdapter, model: nn.Module) -> None:
    """Raises CheckFailed unless the registered adapter is this one and a pruned UNet is loaded with difference 0."""
    try:
        registered = find_adapter(model)
    except BadInput as error:
        raise CheckFailed(f"{adapter.model_class} is not registered: {error}") from None
    if registered != adapter:
        raise CheckFailed(f"{adapter.model_class}: another adapter is registered for {type(model).__name__}")
    small, inputs = pruned(adapter, model, RATIOS[-1]), adapter.flat_inputs(model, 2)
    with tempfile.TemporaryDirectory() as folder:
        try:
            loaded = load(save(small, Path(folder) / "pruned"))
        except BadInput as error:
            raise CheckFailed(f"{adapter.model_class}: saved, but not loaded: {error}") from error
    compare(loaded, adapter, inputs, adapter.denoise(small, inputs), "the reloaded model gives other outputs", 0.0)


def check_export(adapter: ModelAdapter, model: nn.Module) -> None:
    """Raises CheckFailed unless the pruned UNet's ONNX file gives its outputs; MissingExtra without ONNX Runtime."""
    from diffprune_plugin.export import to_onnx, verify_onnx

    small = pruned(adapter, model, RATIOS[-1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        to_onnx(small, path)
        result = verify_onnx(path, small, batches=(1, 2))
    if not result.passed:
        raise CheckFailed(f"{adapter.model_class}: the ONNX file misses: {result.worst}")


def pruned(adapter: ModelAdapter, model: nn.Module, ratio: float) -> nn.Module:
    small = copy.deepcopy(model)
    remove_(small, make_plan(small, "magnitude", pruning_ratio=ratio, adapter=adapter), adapter=adapter)
    return small


@torch.no_grad()
def compare(
    model: nn.Module,
    adapter: ModelAdapter,
    inputs: Mapping[str, Tensor],
    expected: Tensor,
    words: str,
    relative: float = 1e-4,
) -> None:
    """Raises CheckFailed, in these words, if the UNet's output is not the expected one."""
    worst = float((adapter.denoise(model, inputs) - expected).abs().max())
    if worst > relative * float(expected.abs().max()):
        raise CheckFailed(f"{words}: {worst:.2g}")
