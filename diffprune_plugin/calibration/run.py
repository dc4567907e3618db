"""How a calibration is made: the sweep over timesteps, resumable to identical bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.calibration.batches import Batches
from diffprune_plugin.calibration.calibration import Calibration, Curve
from diffprune_plugin.calibration.gradients import gradients_of
from diffprune_plugin.calibration.loops import measure_curve, run_loops
from diffprune_plugin.calibration.progress import Progress
from diffprune_plugin.calibration.settings import Settings, settle
from diffprune_plugin.calibration.timesteps import counts
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.schedulers import trained_for
from diffprune_plugin.errors import BadInput
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.utils.device import say_if_emulated
from diffprune_plugin.utils.distributed import Processes
from diffprune_plugin.utils.memory import checkpointing
from diffprune_plugin.utils.modes import evaluating
from diffprune_plugin.utils.progress import progress_bar


def calibrate(
    model: nn.Module,
    scheduler: Any,
    images: Any,
    sweep: Sweep | None = None,
    *,
    batch_size: int = 32,
    timesteps: int | None = None,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    autocast: bool = False,
    blocks_at_once: int | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 15.0,
    keep_progress: bool = False,
    progress: bool = True,
    adapter: ModelAdapter | None = None,
) -> Calibration:
    """Measure the model's loss over timesteps and sum its gradients over those that count.

    What is summed, and with which weights, the sweep says: `Sweep.accumulate`, `Sweep.timestep_weights`.

    ``scheduler`` is the pipeline's own (epsilon, v_prediction, sample, flow matching); ``images`` whatever
    `load_samples` takes.
    ``timesteps`` is the number of points of the loss curve, spread evenly (100; all of them for ``reference``).
    With stratified sampling each sample has its own seed, so that ``batch_size`` changes no result beyond float
    rounding; gradients add up in float32. Where memory runs out, half as many samples go through the UNet at once, with
    the same result. ``gradient_checkpointing`` trades time for memory; ``autocast`` computes in bfloat16.
    ``blocks_at_once`` sums the gradients of so many blocks in a sweep of their own, one after another: the device holds
    the weights and those gradients, for as many backward passes more; the result is the same.
    With ``checkpoint`` (a directory) an interrupted call goes on where it was and gives identical bits; its
    progress is cleared at the end unless ``keep_progress``. Where torch.distributed is initialized (by Accelerate, say)
    all processes have to make the same call: each takes its part of every batch, and all get the whole result. What
    fails on one of them fails on all. The UNet is left as it was.

    Raises BadInput for images that do not fit the UNet, an unknown prediction type, too little memory for a single
    sample, or processes that were not given the same; CheckFailed for a loss that is not finite.
    """
    adapter = adapter or find_adapter(model)
    for key, number in {"batch_size": batch_size, "timesteps": timesteps, "blocks_at_once": blocks_at_once}.items():
        if number is not None and (type(number) is not int or (key == "blocks_at_once" and number < 1)):
            raise BadInput(f"calibration: {key} {number!r} is no whole number of at least 1")
    settings = Processes(next(model.parameters()).device).on_all(
        lambda: settle(
            model,
            scheduler,
            load_samples(images),
            sweep or Sweep(),
            timesteps=timesteps,
            batch_size=batch_size,
            seed=seed,
            adapter=adapter,
            autocast=autocast,
            blocks_at_once=blocks_at_once,
        )
    )
    state = Progress.start(settings)
    if autocast and state.processes.is_first:
        say_if_emulated(settings.parameter.device.type, "autocast: true")
    fingerprint = settings.fingerprint()
    if not state.processes.same(int(fingerprint[:15], 16)):
        raise BadInput("calibration: the model, the data or the settings are not the same for all processes")
    if checkpoint is not None:
        state.resume(Path(checkpoint), checkpoint_seconds, fingerprint)
    with (
        gradients_of(model),
        state.sums.collecting(),
        checkpointing(model, gradient_checkpointing),
        progress_bar(progress and state.processes.is_first) as bar,
    ):
        run_loops(settings, state, bar)
        calibration = result(settings, state)
        state.save(now=keep_progress)
    if not keep_progress:
        state.forget()
    return calibration


def loss_curve(
    model: nn.Module,
    scheduler: Any,
    samples: Samples,
    count: int,
    *,
    timesteps: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
    adapter: ModelAdapter | None = None,
) -> Curve:
    """A calibration's loss curve alone: noise-prediction losses (points, count), each sample with a seed of its own.

    Image, timestep and noise depend on the seed alone; no condition is dropped. Raises what `calibrate` raises.
    """
    sweep = Sweep(threshold=0.0, curve_samples=count, condition_dropout=0.0)
    adapter = adapter or find_adapter(model)
    settings = settle(
        model, scheduler, samples, sweep, timesteps=timesteps, batch_size=batch_size, seed=seed, adapter=adapter
    )
    state = Progress.start(settings)
    with evaluating(model), progress_bar(progress) as bar:
        measure_curve(settings, state, Batches(settings, state), bar)
    return state.losses


def result(settings: Settings, progress: Progress) -> Calibration:
    """The calibration that a run at its end has found."""
    sweep, stratified = settings.sweep, settings.stratified
    measured = ~np.isnan(progress.losses).any(axis=1)
    losses = progress.losses[measured]
    columns = losses.shape[1]
    counting = counts(progress.losses, sweep, settings.scale)
    return Calibration(
        sweep=sweep,
        timesteps=settings.shown[measured],
        loss=losses.mean(axis=1),
        stderr=losses.std(axis=1, ddof=1) / math.sqrt(columns) if columns > 1 else np.full(len(losses), np.nan),
        counts=counting[measured],
        gradients={name: total.contiguous() for name, total in progress.sums.of_all(progress.processes).items()},
        forward=int(losses.size) + (sweep.drawn if stratified else 0),
        backward=sweep.drawn * len(settings.parts) if stratified else int(counting.sum()) * settings.batch_size,
        seed=settings.seed,
        batch_size=settings.batch_size,
        autocast=settings.autocast,
        scheduler=trained_for(settings.scheduler),
        scale=None if settings.scale is None else settings.scale[measured],
        points=len(settings.points),
        weights=settings.weights,
        images=settings.samples.sha256,
        rule=settings.rule,
    )
