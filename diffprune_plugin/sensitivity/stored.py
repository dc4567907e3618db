"""The sensitivity that a budget is spent by: the stored one if it fits, else a new one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.data.samples import Samples, drawn_hash
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.diffusion.schedulers import trained_for, training_scheduler
from diffprune_plugin.errors import BadInput
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.sensitivity.linear import measure_sensitivity
from diffprune_plugin.sensitivity.sensitivity import ESTIMATE, Sensitivity
from diffprune_plugin.utils.distributed import Processes
from diffprune_plugin.utils.tensors import weights_hash


def is_allocated(config: PruningConfig, scheduler: Any) -> bool:
    """Whether a target is spent by a sensitivity: as asked, or where there is what it takes.

    Raises BadInput if it is asked for and there are no images or there is no scheduler, or it is to be measured after a
    compensation that is switched off.
    """
    way, possible = config.allocation, config.data is not None and scheduler is not None
    if config.spends and not possible:
        raise BadInput(f"allocation: {way} needs 'data' and a pipeline directory as 'model'; add them or say uniform")
    if way == "measured" and config.compensate is False:
        raise BadInput("allocation: measured compares compensated models; drop 'compensate: false' or say linear")
    if way is not None:
        return config.spends
    return possible and (bool(config.target) or config.timed) and not config.global_pruning


def wants_sensitivity(config: PruningConfig, scheduler: Any, scoring: bool = False) -> bool:
    """Whether a target is allocated, or channels are scored by a sensitivity; raises BadInput as `is_allocated` does,
    and for scores without images or scheduler."""
    if scoring and (config.data is None or scheduler is None):
        raise BadInput("importance: it needs 'data' and a pipeline directory as 'model'; add them or take magnitude")
    return is_allocated(config, scheduler) or scoring


def sensitivity_for(
    config: PruningConfig,
    model: nn.Module,
    scheduler: Any,
    samples: Callable[[], Samples],
    processes: Processes,
    *,
    store: bool,
    progress_in: Path,
    progress: bool,
    scoring: bool = False,
    compensating: bool = True,
) -> Sensitivity | None:
    """What a config's target is spent by: the stored sensitivity if it fits, else a new one; None if it needs none.

    ``scheduler``: the pipeline's, None for a bare model. ``store``: whether the result, and in ``progress_in`` what an
    interrupted call has, is written. All processes make a new one together; a stored one the first process alone reads,
    and the others get None. ``scoring``: whether the criterion needs it; ``compensating``: whether what it is spent on
    is refitted.
    """
    if not processes.on_all(lambda: wants_sensitivity(config, scheduler, scoring)):
        return None
    file = Path(config.sensitivity) if config.sensitivity else None
    found: Sensitivity | None
    if file is not None and processes.broadcast(file.exists()):
        found = processes.on_first(lambda: stored_sensitivity(file, config, model, scheduler, samples))
    else:
        found = new = measure_sensitivity(
            model,
            scheduler,
            processes.on_all(samples),
            samples=config.sensitivity_samples,
            probes=config.sensitivity_probes,
            batch_size=min(config.batch_size, config.sensitivity_samples),
            seed=config.seed,
            checkpoint=progress_in if store else None,
            keep_progress=store,
            progress=progress,
        )
        if file is not None and store:
            processes.on_first(lambda: new.save(file))
    return found if compensating or found is None else found.unrefitted()


def stored_sensitivity(
    file: Path, config: PruningConfig, model: nn.Module, scheduler: Any, samples: Callable[[], Samples]
) -> Sensitivity:
    """A sensitivity from disk; raises BadInput if it is not what the config asks for."""
    found = Sensitivity.load(file)
    if found.estimate != ESTIMATE:
        raise BadInput(f"{file}: by the formulas of another version; remove it or name another file")
    same = {
        "model": found.weights == weights_hash(model),
        "data": found.images == drawn_hash(fitting(samples(), model, find_adapter(model), scheduler)),
        "scheduler": found.scheduler == trained_for(training_scheduler(scheduler)),
        "seed": found.seed == config.seed,
        "sensitivity_samples": found.samples == config.sensitivity_samples,
        "sensitivity_probes": found.probes == config.sensitivity_probes,
    }
    for key, fits in same.items():
        if not fits:
            raise BadInput(f"{file}: measured with other {key}; remove it or name another file")
    return found
