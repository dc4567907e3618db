"""The training objective: the noise-prediction loss, its scheduler, and samples that fit the UNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffprune_plugin.criteria.timestep_weights import alphas_of, min_snr
from diffprune_plugin.diffusion.schedulers import prediction_type


def noise_prediction_loss(
    unet: nn.Module, scheduler: Any, sample: Tensor, noise: Tensor, timesteps: Tensor, extra: Mapping[str, Any]
) -> Tensor:
    """Mean squared error of the UNet's prediction for each sample, shape (batch,), in float32.

    sample, noise: (batch, channels, height, width); timesteps: (batch,). What is predicted is the scheduler's
    prediction_type: the noise, the velocity, or the sample. Learned variances (twice the channels) are left out.
    """
    prediction, target = predicted(unet, scheduler, sample, noise, timesteps, extra)
    return squared_error(prediction, target)


def predicted(
    unet: nn.Module, scheduler: Any, sample: Tensor, noise: Tensor, timesteps: Tensor, extra: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The UNet's prediction for noisy samples and what it should be, both (batch, channels, height, width)."""
    noisy = scheduler.add_noise(sample, noise, timesteps)
    prediction = unet(noisy, timesteps, **extra, return_dict=False)[0][:, : sample.shape[1]]
    return prediction, target_of(scheduler, sample, noise, timesteps)


def target_of(scheduler: Any, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the scheduler's prediction_type says is predicted; raises BadInput for one that is unknown."""
    kind = prediction_type(scheduler)
    if kind == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(sample, noise, timesteps)
        return velocity
    return noise if kind == "epsilon" else sample


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, shape (batch,), in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def min_snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Weight of each sample's loss by `min_snr`, shape (batch,), float32, on the device of ``timesteps`` (batch,)."""
    weights = min_snr(alphas_of(scheduler), prediction_type(scheduler), gamma)
    return torch.from_numpy(weights).float().to(timesteps.device)[timesteps]
