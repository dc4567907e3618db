"""Which blocks go so that a target costs least, and what is left of the target for the widths of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.costs import layer_costs
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.planning.blocks import choose_blocks
from diffprune_plugin.planning.plan import TARGETS, BlockChoice
from diffprune_plugin.planning.planner import material_of
from diffprune_plugin.planning.target import total
from diffprune_plugin.plugins import find_adapter, importance
from diffprune_plugin.sensitivity.blocks import lists_of, removable
from diffprune_plugin.sensitivity.stored import sensitivity_for
from diffprune_plugin.utils.distributed import Processes


def check_choosable(config: PruningConfig, model: nn.Module, adapter: ModelAdapter, scheduler: Any) -> None:
    """Raises BadInput where blocks are to be chosen and there are none, or not what it takes."""
    if Processes().count > 1:
        raise BadInput("depth: auto is chosen by one process; run it without accelerate launch, or name the blocks")
    if not removable(model, adapter):
        plans = ", ".join(plan.name for plan in adapter.depths)
        remedy = f"name a plan: {plans}" if plans else "drop it"
        raise BadInput(f"depth: auto chooses among blocks, a {adapter.model_class} has none that may go; {remedy}")
    if config.data is None or scheduler is None:
        raise BadInput("depth: auto needs 'data' and a pipeline directory as 'model'; add them or name the blocks")


def chosen_blocks(
    config: PruningConfig,
    criterion: Criterion,
    model: nn.Module,
    scheduler: Any,
    samples: Callable[[], Samples],
    compensating: bool,
    *,
    store: bool,
    progress_in: Path,
    progress: bool,
) -> BlockChoice:
    """The blocks of the dense model that go by the linear sensitivity, which also ranks the channels meanwhile: the
    ``criterion`` is asked where blocks are gone, and here only what groups of channels it wants."""
    given = config, model, scheduler, samples, Processes(next(model.parameters()).device)
    kept: dict[str, Any] = {"store": store, "progress_in": progress_in, "progress": progress}
    found = sensitivity_for(*given, compensating=compensating, **kept)
    assert found is not None
    adapter = find_adapter(model)
    if found.blocks.keys() != removable(model, adapter).keys():
        raise BadInput(f"{config.sensitivity}: was measured without the blocks; remove it or name another file")
    material = material_of(config, model, importance("output_error", sensitivity=found), adapter, samples().extra)
    return choose_blocks(material, lists_of(model, adapter), config.with_wishes_of(criterion), found)


def left_for_widths(
    config: PruningConfig, choice: BlockChoice, model: nn.Module, extra: Mapping[str, Any]
) -> PruningConfig:
    """The config of a model without the chosen blocks: targets are shares of what is left, and nothing is asked of its
    widths where the blocks were enough. The sensitivity that was stored is of the dense model."""
    size = total([cost.after(0, 0) for cost in layer_costs(model, find_adapter(model), extra).values()])
    shares = {
        key: share * getattr(choice, TARGETS[key]) / getattr(size, TARGETS[key]) for key, share in config.target.items()
    }
    open_ = {key: share for key, share in shares.items() if share < 1}
    none = {} if open_ else {"pruning_ratio": 0.0, "allocation": None, "importance": {"name": "magnitude"}}
    named: dict[str, Any] = {"depth": choice.gone, "sensitivity": None}
    return config.model_copy(update={**named, **{key: open_.get(key) for key in shares}, **none})
