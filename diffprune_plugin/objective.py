"""The training objective: the noise-prediction loss, its scheduler, and samples that fit the UNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor, nn

from diffprune_plugin.adapters.table import UNetAdapter
from diffprune_plugin.data import Samples
from diffprune_plugin.errors import BadInput


def noise_prediction_loss(
    unet: nn.Module, scheduler: Any, sample: Tensor, noise: Tensor, timesteps: Tensor, extra: Mapping[str, Any]
) -> Tensor:
    """Mean squared error of the UNet's prediction for each sample, shape (batch,), in float32.

    sample, noise: (batch, channels, height, width); timesteps: (batch,). What is predicted is the scheduler's
    prediction_type: the noise, the velocity, or the sample. Learned variances (twice the channels) are left out.
    """
    noisy = scheduler.add_noise(sample, noise, timesteps)
    prediction = unet(noisy, timesteps, **extra, return_dict=False)[0][:, : sample.shape[1]]
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        target = noise
    elif kind == "sample":
        target = sample
    elif kind == "v_prediction":
        target = scheduler.get_velocity(sample, noise, timesteps)
    else:
        raise BadInput(f"scheduler: prediction_type {kind!r} is none of epsilon, v_prediction, sample")
    loss: Tensor = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return loss


def training_scheduler(scheduler: Any) -> Any:
    """The scheduler whose add_noise is the training objective's: sqrt(alpha) sample + sqrt(1 - alpha) noise.

    Samplers that work in sigmas (Euler, DPM) share their betas with the DDPM scheduler and are replaced by it.

    Raises BadInput for a scheduler without alphas (variance exploding, flow matching).
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise BadInput(
            f"scheduler: {type(scheduler).__name__} has no alphas_cumprod; save the pipeline with a DDPM or DDIM"
        )
    return DDPMScheduler.from_config(scheduler.config) if hasattr(scheduler, "sigmas") else scheduler


def fitting(samples: Samples, unet: nn.Module, adapter: UNetAdapter) -> Samples:
    """The samples with just the further inputs that the UNet takes.

    Raises BadInput for samples of another size than the UNet takes, or without an input that it needs.
    """
    example = adapter.flat_inputs(unet)
    expected = tuple(example["sample"].shape[1:])
    if samples.shape != expected:
        raise BadInput(
            f"data: samples are {samples.shape} (channels, height, width), the UNet takes {expected}; convert them"
        )
    needed = set(example) - {"sample", "timestep"}
    if needed - set(samples.extra):
        raise BadInput(
            f"data: the UNet needs {sorted(needed - set(samples.extra))}; add an array of that name to the .npz"
        )
    return replace(samples, extra={key: samples.extra[key] for key in needed})
