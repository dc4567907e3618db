"""The training objective: the noise-prediction loss, its scheduler, and samples that fit the UNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from diffprune_plugin.adapters.table import Port, UNetAdapter
from diffprune_plugin.data import Samples
from diffprune_plugin.errors import BadInput
from diffprune_plugin.timesteps import min_snr


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
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return sample
    if kind == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(sample, noise, timesteps)
        return velocity
    raise BadInput(f"scheduler: prediction_type {kind!r} is none of epsilon, v_prediction, sample")


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, shape (batch,), in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def min_snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Weight of each sample's loss by `min_snr`, shape (batch,), float32, on the device of ``timesteps`` (batch,)."""
    alphas = np.asarray(scheduler.alphas_cumprod, dtype=np.float64)
    weights = min_snr(alphas, scheduler.config.get("prediction_type", "epsilon"), gamma)
    return torch.from_numpy(weights).float().to(timesteps.device)[timesteps]


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
    expected = tuple(adapter.flat_inputs(unet)["sample"].shape[1:])
    if samples.shape != expected:
        raise BadInput(
            f"data: samples are {samples.shape} (channels, height, width), the UNet takes {expected}; convert them"
        )
    ports = [port for port in adapter.ports(unet) if port.name not in ("sample", "timestep")]
    missing = [port.name for port in ports if port.name not in samples.extra]
    if missing:
        remedy = (
            "add metadata.jsonl with captions to the folder, or give" if "encoder_hidden_states" in missing else "give"
        )
        raise BadInput(
            f"data: the UNet needs {', '.join(missing)}, the data has {', '.join(sorted(samples.extra)) or 'none'}; "
            f"{remedy} {'them' if len(missing) > 1 else 'it'} by name in an .npz or .safetensors"
        )
    for port in ports:
        check_input(port, samples, unet, adapter)
    extra, null = (
        {port.name: typed(part[port.name], port) for port in ports if port.name in part}
        for part in (samples.extra, samples.null)
    )
    return replace(samples, extra=extra, null=null)


def typed(values: Tensor, port: Port) -> Tensor:
    """Indices as the embeddings take them; numbers as they are."""
    return values.to(port.dtype) if port.dtype is torch.int64 else values


def check_input(port: Port, samples: Samples, unet: nn.Module, adapter: UNetAdapter) -> None:
    """Raises BadInput unless a further input has the shape, and where it is an index the range, that the UNet takes."""
    values, shape = samples.extra[port.name], adapter.shapes(unet)[port.name]
    stated = " ".join(map(str, shape))
    fits = len(shape) == values.ndim and all(
        isinstance(size, str) or size == found for size, found in zip(shape, values.shape, strict=True)
    )
    if not fits or (port.dtype is torch.int64 and values.is_floating_point()):
        raise BadInput(
            f"data: {port.name} is {values.dtype} {tuple(values.shape)}, the UNet takes {port.dtype} ({stated}); "
            "convert it"
        )
    if port.integers_below:
        count = adapter.classes(unet, port)
        known = torch.cat([values, *([samples.null[port.name].to(values)] if port.name in samples.null else [])])
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= count:
            raise BadInput(f"data: {port.name} goes from {low} to {high}, the UNet knows 0 to {count - 1}; mend it")
        if samples.classes not in (None, count):
            raise BadInput(
                f"data: {samples.classes} class folders, but the UNet knows {count} classes; name the folders by class "
                "number (0, 1, ...)"
            )
