"""Whether a pruned model is repaired, and in which way, as its config asks."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput, DiffPruneError
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.plugins import compensation, faults
from diffprune_plugin.pruning.depth import Cut
from diffprune_plugin.pruning.directory import progress_directory
from diffprune_plugin.recovery.compensate import (
    CompensationReport,
    compensate_,
    compensate_depth_,
    passes_that_fit,
)
from diffprune_plugin.utils.out_of_memory import within_memory

REMEDY = (
    "while compensating; set 'compensate: false' and fine-tune (what was measured is kept for the same settings), or "
    "use a machine with more"
)


def wants_compensation(config: PruningConfig, loaded: Any) -> bool:
    """Whether to compensate: as asked, or where there is what it takes.

    Raises BadInput if it is asked for and there are no images or there is no scheduler, or for an unknown way.
    """
    possible = config.data is not None and isinstance(loaded, DiffusionPipeline)
    if config.compensate and not possible:
        asked = str(config.compensate).lower()
        raise BadInput(
            f"compensate: {asked} needs 'data' and a pipeline directory as 'model'; add them or set it to false"
        )
    if isinstance(config.compensate, str):
        compensation(config.compensate)
    return possible if config.compensate is None else bool(config.compensate)


def compensate(
    model: nn.Module,
    dense: nn.Module,
    plan: PruningPlan,
    scheduler: Any,
    samples: Samples,
    config: PruningConfig,
    progress: bool,
) -> CompensationReport:
    """Refit the pruned UNet's layers to the dense one's outputs; raises BadInput if memory does not suffice."""
    given: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "progress": progress}
    with within_memory(REMEDY):
        if isinstance(config.compensate, str):
            return in_the_way_of(config.compensate, model, dense, plan, scheduler, samples, **given)
        given |= {"passes": passes_that_fit(dense), "checkpoint": progress_directory(config.output)}
        return compensate_(model, dense, plan, scheduler, samples, **given)


def compensate_depth(
    cut: Cut, model: nn.Module, scheduler: Any, samples: Samples, config: PruningConfig, store: bool, progress: bool
) -> CompensationReport:
    """Refit the layers around blocks that went, in the way of this package; raises as `compensate` does.

    ``store``: whether what an interrupted call has is kept.
    """
    given: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "progress": progress}
    with within_memory(REMEDY):
        given |= {"passes": passes_that_fit(cut.dense)}
        given |= {"checkpoint": progress_directory(config.output) if store else None}
        return compensate_depth_(model, cut.dense, cut.shallower, scheduler, samples, **given)


def in_the_way_of(name: str, *models: Any, **given: Any) -> CompensationReport:
    """What a plugin's way of this name says that it did; raises BadInput, with the plugin, for one that fails."""
    way, report = compensation(name), None
    with faults(DiffPruneError, MemoryError) as failures:
        report = way.value(*models, **given)
    if not isinstance(report, CompensationReport):
        why = f"fails: {failures[0]}" if failures else f"gives {type(report).__name__}, not a CompensationReport"
        raise BadInput(f"compensate: {name!r} of {way.plugin} {why}; mend the plugin")
    return report
