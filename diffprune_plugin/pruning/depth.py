"""Depth: whole blocks gone. What is left is a model of diffusers' own class with a smaller config, saved as that."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from diffprune_plugin.adapters.depth import Blocks, DepthPlan, Shallower
from diffprune_plugin.adapters.ports import config_of
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.patterns import matching
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.pruned_class import PrunedModelMixin
from diffprune_plugin.pruning.skipped import skip_

SHOWN = 3  # of the blocks that may go, in an error


@dataclass(frozen=True)
class Cut:
    """A dense model, and one of the same class without some blocks, whose weights are the dense model's own tensors."""

    dense: nn.Module
    model: Any
    shallower: Shallower


def without_blocks(
    model: nn.Module, blocks: str | Sequence[str], *, adapter: ModelAdapter | None = None
) -> tuple[Any, tuple[str, ...]]:
    """A model of the same class without some blocks, and their names; the weights are the dense model's own tensors.

    Takes and raises what `cut_out` does.
    """
    cut = cut_out(model, blocks, adapter=adapter)
    return cut.model, cut.shallower.gone


def cut_out(model: nn.Module, blocks: str | Sequence[str], *, adapter: ModelAdapter | None = None) -> Cut:
    """The model without some blocks, beside the dense one.

    ``blocks``: the name of a published plan (bk-sdm-base, -small, -tiny), or patterns of the blocks that go. Blocks
    keep the shape of what goes through them, so that those on both sides of a gap fit each other; Stable Diffusion 3's
    last block is made of one that was not the last, with the same output. A UNet's resnets, attentions and transformer
    blocks that add to their input go without a config that says so (`skipped`).

    Raises BadInput for a plan that the class or its config does not have, patterns that match no block, or a list
    of which none is left.
    """
    adapter = adapter or find_adapter(model)
    adapter.check(model)
    if isinstance(model, PrunedModelMixin):
        raise BadInput("depth: the model is pruned already; start from the dense one")
    patterns = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    plan = next((plan for plan in adapter.depths if (plan.name,) == patterns), None)
    chosen = by_number if adapter.blocks else by_name
    shallower = named_plan(plan, model) if plan else chosen(patterns, model, adapter)
    cls: Any = type(model)
    # Without the list of values that were not given, which from_config would reset.
    config = {key: value for key, value in dict(config_of(model)).items() if not key.startswith("_")}
    with init_empty_weights():
        smaller = cls.from_config({**config, **shallower.changes})
    skip_(smaller, shallower.skipped, adapter)
    dense, left = dict(model.state_dict()), smaller.state_dict()
    for row in adapter.blocks:
        if row.mend is not None:
            dense = row.mend(dense, shallower.dense_name(f"{row.path}.{shallower.changes[row.count] - 1}"))
    smaller.load_state_dict({name: dense[shallower.dense_name(name)] for name in left}, assign=True)
    smaller.train(model.training)
    device = next(model.parameters()).device
    smaller = smaller if device.type == "meta" else smaller.to(device)  # buffers that are not among the weights
    return Cut(model, smaller, shallower)


def named_plan(plan: DepthPlan, model: nn.Module) -> Shallower:
    """What a published plan makes of a model; raises BadInput where that is of another shape."""
    try:
        return plan.of(config_of(model))
    except (LookupError, ValueError) as error:
        raise BadInput.of("depth", plan.name, f"does not fit: {error}; it is for Stable Diffusion 1 and 2") from None


def by_name(patterns: Sequence[str], model: nn.Module, adapter: ModelAdapter) -> Shallower:
    """The same config, and the blocks to skip."""
    names = dict.fromkeys(adapter.residual_modules(model), ())
    known = ", ".join(plan.name for plan in adapter.depths) or "none"
    gone = []
    for pattern in patterns:
        try:
            gone += matching(pattern, names, "depth")
        except BadInput as error:
            such = f"; blocks that may go: {', '.join(list(names)[:SHOWN])} ..." if names else ""
            raise BadInput(f"{error}, and is no plan for a {adapter.model_class} (plans: {known}){such}") from None
    gone = [name for name in names if name in gone]
    return Shallower({}, lambda name: name, tuple(gone), tuple(gone))


def by_number(patterns: Sequence[str], model: nn.Module, adapter: ModelAdapter) -> Shallower:
    """The smaller config of a model without the blocks that the patterns match."""
    config, changes, gone = config_of(model), dict[str, Any](), list[str]()
    names = {f"{row.path}.{i}": () for row in adapter.blocks for i in range(len(model.get_submodule(row.path)))}  # type: ignore[arg-type]
    chosen = {name for pattern in patterns for name in matching(pattern, names, "depth")}
    kept: dict[str, list[int]] = {}
    for row in adapter.blocks:
        mine = [name for name in names if name.rpartition(".")[0] == row.path]
        kept[row.path] = [number for number, name in enumerate(mine) if name not in chosen]
        if not kept[row.path]:
            raise BadInput(f"depth: no block of {row.path} would be left; leave one")
        gone += [name for name in mine if name in chosen]
        changes |= renumbered(row, kept[row.path], config)

    def dense_name(name: str) -> str:
        for path, numbers in kept.items():
            if found := re.match(rf"{re.escape(path)}\.(\d+)(?=\.|$)", name):
                return f"{path}.{numbers[int(found[1])]}{name[found.end() :]}"
        return name

    return Shallower(changes, dense_name, tuple(gone))


def renumbered(row: Blocks, kept: Sequence[int], config: Any) -> dict[str, Any]:
    """What the config says of a list of which these blocks are left."""
    lists = {key: [kept.index(i) for i in config.get(key) or () if i in kept] for key in row.numbered}
    return {row.count: len(kept), **{key: tuple(numbers) for key, numbers in lists.items()}}
