"""The calibration that a criterion needs: the stored one if it fits, else a new one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.calibration.run import calibrate
from diffprune_plugin.calibration.settings import default_points, rule_hash
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.diffusion.schedulers import noise_form, trained_for, training_scheduler
from diffprune_plugin.errors import BadInput
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.utils.distributed import Processes
from diffprune_plugin.utils.tensors import weights_hash


def calibration_for(
    config: PruningConfig,
    sweep: Sweep | None,
    model: nn.Module,
    scheduler: Any,
    samples: Callable[[], Samples],
    processes: Processes,
    *,
    store: bool,
    progress_in: Path,
    progress: bool,
) -> Calibration | None:
    """The calibration that a sweep needs: the stored one if it fits, else a new one; None if there is no sweep.

    ``scheduler``: the pipeline's, None for a bare UNet. ``store``: whether the result, and in ``progress_in`` what an
    interrupted call has, is written. All processes make a new one together; a stored one the first process alone reads,
    and the others get None.
    """
    if sweep is None:
        return None
    stored = Path(config.calibration) if config.calibration else None
    if stored is not None and processes.broadcast(stored.exists()):
        return processes.on_first(lambda: stored_calibration(stored, config, sweep, model, scheduler, samples))
    processes.on_all(lambda: check_given(config, scheduler))
    calibration = calibrate(
        model,
        scheduler,
        processes.on_all(samples),
        sweep,
        batch_size=config.batch_size,
        timesteps=config.timesteps,
        seed=config.seed,
        gradient_checkpointing=config.gradient_checkpointing,
        autocast=config.autocast,
        blocks_at_once=config.blocks_at_once,
        checkpoint=progress_in if store else None,
        keep_progress=store,
        progress=progress,
    )
    if stored is not None and store:
        processes.on_first(lambda: calibration.save(stored))
    return calibration


def check_given(config: PruningConfig, scheduler: Any) -> None:
    """Raises BadInput without images, or without a scheduler."""
    if config.data is None:
        raise BadInput(f"data is missing: {config.importance['name']} needs images; add 'data: FOLDER' or an .npz")
    if scheduler is None:
        raise BadInput(
            f"{config.model}: a UNet without a scheduler; {config.importance['name']} needs the pipeline's; "
            "give the pipeline directory"
        )


def stored_calibration(
    directory: Path,
    config: PruningConfig,
    sweep: Sweep,
    model: nn.Module,
    scheduler: Any,
    samples: Callable[[], Samples],
) -> Calibration:
    """A calibration from disk; raises BadInput if it is not what the config asks for, or not of its images."""
    known = config.data is not None and scheduler is not None
    images = fitting(samples(), model, find_adapter(model), scheduler).sha256 if known else None
    calibration = Calibration.load(directory)
    scheduler = training_scheduler(scheduler) if known else None
    points = config.timesteps
    if scheduler is not None:
        points = points or default_points(sweep, int(scheduler.config.num_train_timesteps))
    same = {
        "weights": calibration.weights == weights_hash(model),
        "data": images is None or calibration.images == images,
        "seed": calibration.seed == config.seed,
        "autocast": calibration.autocast == config.autocast,
        "scheduler": scheduler is None or calibration.scheduler == trained_for(scheduler),
        "timesteps": points in (None, calibration.points),
        "timestep_weights": scheduler is None or calibration.rule in ("", rule_hash(sweep, scheduler)),
        "factors of the loss": scheduler is None or same_form(calibration, scheduler),
        "batch_size": sweep.sampling == "stratified" or calibration.batch_size == config.batch_size,
    }
    for key, fits in same.items():
        if not fits:
            raise BadInput(f"{directory}: calibrated with other {key}; remove it or name another calibration directory")
    calibration = calibration.with_threshold(sweep.threshold)
    if not calibration.answers(sweep):
        raise BadInput(f"{directory}: calibrated with {calibration.sweep}, asked is {sweep}; name another directory")
    return calibration


def same_form(calibration: Calibration, scheduler: Any) -> bool:
    """Whether the threshold was applied to the loss as that of the noise; older versions did so for flow alone."""
    stated = 1.0 if calibration.scale is None else calibration.scale
    return bool(np.allclose(noise_form(scheduler)[calibration.timesteps], stated))
