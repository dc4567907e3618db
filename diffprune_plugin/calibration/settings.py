"""What a calibration is of: the model, the samples and every number that its result depends on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.calibration.parts import parts_of
from diffprune_plugin.calibration.timesteps import strata
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.batches import Draw, batch_of, draw, settled_dropout
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.diffusion.loss import noise_prediction_loss
from diffprune_plugin.diffusion.schedulers import noise_form, settings_of, training_scheduler
from diffprune_plugin.errors import BadInput
from diffprune_plugin.plugins import weights_of_timesteps
from diffprune_plugin.utils.hashes import json_hash
from diffprune_plugin.utils.tensors import weights_hash


@dataclass(frozen=True, eq=False)
class Settings:
    """All that a calibration's result depends on, as `settle` makes it.

    points: the timesteps of each point of the curve. timestep_weights: of each training timestep's loss, float32, shape
        (timesteps,). parts: of the model, by their parameters' names, whose gradients are summed one after another.
    """

    model: nn.Module
    scheduler: Any
    samples: Samples
    sweep: Sweep
    points: Sequence[npt.NDArray[np.int64]]
    timestep_weights: Tensor
    batch_size: int
    seed: int
    adapter: ModelAdapter
    autocast: bool
    parts: Sequence[frozenset[str]]

    @property
    def stratified(self) -> bool:
        return self.sweep.sampling == "stratified"

    @functools.cached_property
    def shown(self) -> npt.NDArray[np.int64]:
        """The timestep that stands for each point of the curve."""
        return np.array([part[len(part) // 2] if self.stratified else part[0] for part in self.points])

    @functools.cached_property
    def scale(self) -> npt.NDArray[np.float64] | None:
        """What the threshold's loss is multiplied by, of each point; None where that is the loss itself."""
        factors = noise_form(self.scheduler)[self.shown]
        return None if (factors == 1).all() else factors

    @property
    def rule(self) -> str:
        """SHA-256 of the weights of the timesteps: a plugin's rule may be another by tomorrow."""
        return rule_hash(self.sweep, self.scheduler)

    @property
    def parameter(self) -> Tensor:
        """One of the model's, for its device and dtype."""
        return next(self.model.parameters())

    @functools.cached_property
    def weights(self) -> str:
        """SHA-256 of the model's parameters."""
        return weights_hash(self.model)

    def draw(self, stage: int, index: int, timesteps: npt.NDArray[np.int64]) -> Draw:
        return draw(self.samples, self.seed, stage, index, timesteps, self.sweep.condition_dropout or 0.0)

    def loss(self, draws: Sequence[Draw]) -> Tensor:
        """Loss of each sample, shape (len(draws),)."""
        parameter = self.parameter
        batch = batch_of(self.samples, draws).to(parameter)
        with torch.autocast(parameter.device.type, torch.bfloat16, enabled=self.autocast):
            given = self.scheduler, batch.sample, batch.noise, batch.timesteps, batch.extra, self.adapter
            return noise_prediction_loss(self.model, *given)

    def fingerprint(self) -> str:
        """SHA-256 of all of it and of where it is computed: progress of other settings is never taken up."""
        parameter = self.parameter
        facts = [
            [parameter.device.type, str(parameter.dtype), self.autocast, torch.__version__],
            self.sweep.as_dict(),
            self.batch_size,
            self.seed,
            len(self.points),
            settings_of(self.scheduler),
            self.rule,
            self.weights,
            self.samples.sha256,
            [len(part) for part in self.parts],
        ]
        return json_hash(facts)


def settle(
    model: nn.Module,
    scheduler: Any,
    samples: Samples,
    sweep: Sweep,
    *,
    timesteps: int | None,
    batch_size: int,
    seed: int,
    adapter: ModelAdapter,
    autocast: bool = False,
    blocks_at_once: int | None = None,
) -> Settings:
    """The settings with what was left open filled in; raises BadInput for what does not fit together."""
    samples, scheduler = fitting(samples, model, adapter, scheduler), training_scheduler(scheduler)
    sweep = replace(sweep, condition_dropout=settled_dropout(sweep.condition_dropout, samples, "importance"))
    total = int(scheduler.config.num_train_timesteps)
    points = timesteps if timesteps is not None else default_points(sweep, total)
    if not 1 <= points <= total:
        raise BadInput(f"timesteps: {points} is outside 1..{total}, the scheduler's num_train_timesteps")
    if batch_size < 1:
        raise BadInput(f"batch_size: {batch_size} is below 1")
    if blocks_at_once is not None and sweep.sampling != "stratified":
        raise BadInput(f"blocks_at_once: {blocks_at_once}: the authors' loop takes all gradients at once; leave it out")
    weights = torch.from_numpy(weights_of_timesteps(sweep.timestep_weights, scheduler)).float()
    parts = strata(total, points)
    blocks = parts_of(model, blocks_at_once)
    return Settings(model, scheduler, samples, sweep, parts, weights, batch_size, seed, adapter, autocast, blocks)


def rule_hash(sweep: Sweep, scheduler: Any) -> str:
    return json_hash(weights_of_timesteps(sweep.timestep_weights, scheduler).tolist())


def default_points(sweep: Sweep, total: int) -> int:
    """A hundred points of the loss curve, or every timestep for the authors' loop."""
    return min(100, total) if sweep.sampling == "stratified" else total
