"""Schedulers: the noise and the prediction that a model was trained for."""

from __future__ import annotations

import inspect
import json
from typing import Any

import numpy as np
from diffusers import DDIMScheduler, DDPMScheduler

from diffprune_plugin.criteria.timestep_weights import alphas_of
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


def prediction_type(scheduler: Any) -> str:
    """What is predicted; raises BadInput for what is unknown."""
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        flow = "; flow matching is not supported yet" if kind == "flow_prediction" else ""
        raise BadInput(f"scheduler: prediction_type {kind!r} is none of {', '.join(PREDICTION_TYPES)}{flow}")
    return str(kind)


def training_scheduler(scheduler: Any) -> Any:
    """The scheduler whose add_noise is the training objective's: sqrt(alpha) sample + sqrt(1 - alpha) noise.

    Samplers (Euler, DPM, PNDM) share their betas with the DDPM scheduler and are replaced by it.

    Raises BadInput for a scheduler without alphas (variance exploding, flow matching), with other alphas than those of
    its betas, or of an unknown prediction_type.
    """
    check_no_flow(scheduler)
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


def check_no_flow(scheduler: Any) -> None:
    """Raises BadInput for a scheduler that is, or is set, for flow matching."""
    name = type(scheduler).__name__
    signs = {"no alphas_cumprod": "Flow" in name, "use_flow_sigmas": scheduler.config.get("use_flow_sigmas")}
    for sign in (sign for sign, there in signs.items() if there):
        raise BadInput(f"scheduler: {name} has {sign}: it is for flow matching, which is not supported yet")


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
