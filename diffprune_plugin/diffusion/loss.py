"""The training objective: the noise-prediction loss, its scheduler, and samples that fit the UNet."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from diffprune_plugin.adapters.table import Port, UNetAdapter
from diffprune_plugin.criteria.sweep import alphas_of, min_snr
from diffprune_plugin.data.loading import Samples
from diffprune_plugin.errors import BadInput

# What a scheduler's config says of the training.
TRAINED = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


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


def prediction_type(scheduler: Any) -> str:
    """What is predicted; raises BadInput for what is unknown."""
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise BadInput(f"scheduler: prediction_type {kind!r} is none of {', '.join(PREDICTION_TYPES)}")
    return str(kind)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, shape (batch,), in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def min_snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Weight of each sample's loss by `min_snr`, shape (batch,), float32, on the device of ``timesteps`` (batch,)."""
    weights = min_snr(alphas_of(scheduler), prediction_type(scheduler), gamma)
    return torch.from_numpy(weights).float().to(timesteps.device)[timesteps]


def training_scheduler(scheduler: Any) -> Any:
    """The scheduler whose add_noise is the training objective's: sqrt(alpha) sample + sqrt(1 - alpha) noise.

    Samplers (Euler, DPM, PNDM) share their betas with the DDPM scheduler and are replaced by it.

    Raises BadInput for a scheduler without alphas (variance exploding, flow matching), with other alphas than those of
    its betas, or of an unknown prediction_type.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise BadInput(
            f"scheduler: {type(scheduler).__name__} has no alphas_cumprod; save the pipeline with a DDPM or DDIM"
        )
    prediction_type(scheduler)
    if isinstance(scheduler, (DDPMScheduler, DDIMScheduler)):
        return scheduler
    same = DDPMScheduler.from_config(config_of(scheduler))
    if not same_noise(scheduler, same):
        raise BadInput(
            f"scheduler: {type(scheduler).__name__} has other alphas_cumprod than a DDPM makes of its config; save the "
            "pipeline with the DDPM or DDIM that the model was trained with"
        )
    return same


def same_noise(first: Any, second: Any) -> bool:
    """Whether two schedulers have the same alphas_cumprod at the same timesteps, to 1e-5."""
    mine, its = alphas_of(first), alphas_of(second)
    return mine.shape == its.shape and np.allclose(mine, its, atol=1e-5)


def trained_for(scheduler: Any) -> dict[str, Any]:
    """What a scheduler says of the training, as JSON has it: the noise, and what is predicted."""
    facts = {key: scheduler.config.get(key) for key in TRAINED}
    found: dict[str, Any] = json.loads(json.dumps(facts, default=lambda numbers: numbers.tolist()))
    return found


def config_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config that another one keeps.

    Made from it by diffusers alone, that one has its own defaults for whatever was not given by name: also for what was
    given by place, for what Stable Diffusion's pipelines mend in old configs (clip_sample, steps_offset), and for the
    noise that the model was trained with.
    """
    config, own = dict(scheduler.config), inspect.signature(type(scheduler).__init__).parameters
    unchanged = [key for key in config.get("_use_default_values", ()) if key in own and config[key] == own[key].default]
    return {**config, "_use_default_values": [key for key in unchanged if key not in TRAINED]}


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
