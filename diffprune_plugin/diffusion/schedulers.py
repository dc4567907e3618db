"""Schedulers: the noise and the prediction that a model was trained for."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.criteria.timestep_weights import FLOW, Weights, alphas_of, sigmas_of, signal_to_noise
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
TRAINED_BY_FLOW = ("num_train_timesteps", "shift", "use_dynamic_shifting")
OBJECTIVE_NAMES = {True: "flow_matching", False: "noise_prediction"}  # of a scheduler that is for flow matching, or not

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# By what is predicted, what its loss is multiplied by to be that of the noise: in words, and of a scheduler.
NOISE_FORMS: dict[str, tuple[str, Callable[[Any], Weights]]] = {
    "epsilon": ("1", lambda scheduler: np.ones_like(alphas_of(scheduler))),
    "v_prediction": ("alpha_t", lambda scheduler: alphas_of(scheduler)),
    "sample": ("alpha_t / (1 - alpha_t)", lambda scheduler: signal_to_noise(alphas_of(scheduler))),
    FLOW: ("(1 - sigma_t) ** 2", lambda scheduler: (1 - sigmas_of(scheduler)) ** 2),
}


def prediction_type(scheduler: Any) -> str:
    """What is predicted; raises BadInput for what is unknown."""
    kind = FLOW if flow_sign(scheduler) else scheduler.config.get("prediction_type", "epsilon")
    if kind not in (*PREDICTION_TYPES, FLOW):
        raise BadInput(f"scheduler: prediction_type {kind!r} is none of {', '.join(PREDICTION_TYPES)}")
    return str(kind)


def training_scheduler(scheduler: Any) -> Any:
    """The scheduler whose add_noise is the training objective's: sqrt(alpha) sample + sqrt(1 - alpha) noise; for flow
    matching one whose sigmas are those of the training, whatever it was set to.

    Samplers (Euler, DPM, PNDM) share their betas with the DDPM scheduler and are replaced by it.

    Raises BadInput for a scheduler without alphas or sigmas of flow (variance exploding), with other alphas than those
    of its betas, or of an unknown prediction_type.
    """
    if flow_sign(scheduler):
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise BadInput(
                f"scheduler: {type(scheduler).__name__} is a sampler for flow matching; save the pipeline with the "
                "FlowMatchEulerDiscreteScheduler that the model was trained with"
            )
        return made_like(scheduler, FlowMatchEulerDiscreteScheduler)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise BadInput(
            f"scheduler: {type(scheduler).__name__} has no alphas_cumprod; save the pipeline with a DDPM or DDIM"
        )
    prediction_type(scheduler)
    if isinstance(scheduler, (DDPMScheduler, DDIMScheduler)):
        return scheduler
    try:
        same = made_like(scheduler, DDPMScheduler)
    except NotImplementedError:  # a schedule of betas that DDPM does not know
        same = None
    if same is None or not same_noise(scheduler, same):
        raise BadInput(
            f"scheduler: {type(scheduler).__name__} has other alphas_cumprod than a DDPM makes of its config; save the "
            "pipeline with the DDPM or DDIM that the model was trained with"
        )
    return same


def flow_sign(scheduler: Any) -> str:
    """By what a scheduler tells that it is, or is set, for flow matching; nothing if it is not."""
    signs = {
        "no alphas_cumprod": "Flow" in type(scheduler).__name__,
        "use_flow_sigmas": scheduler.config.get("use_flow_sigmas"),
        "prediction_type flow_prediction": scheduler.config.get("prediction_type") == FLOW,
    }
    return next((sign for sign, there in signs.items() if there), "")


def check_objective(scheduler: Any, adapter: ModelAdapter) -> None:
    """Raises BadInput for a scheduler for flow matching beside a model that predicts noise, or the reverse."""
    sign = flow_sign(scheduler)
    if adapter.objective in OBJECTIVE_NAMES.values() and OBJECTIVE_NAMES[bool(sign)] != adapter.objective:
        name, sort = type(scheduler).__name__, "flow matching" if sign else "noise prediction"
        has = f"has {sign}: it" if sign else "has alphas_cumprod: it"
        raise BadInput(
            f"scheduler: {name} {has} is for {sort}, and a {adapter.model_class} is trained by "
            f"{adapter.objective.replace('_', ' ')}; save the pipeline with the scheduler that it was trained with"
        )


def noise_form(scheduler: Any) -> Weights:
    """What the loss at each training timestep, shape (timesteps,), is multiplied by before the threshold is applied.

    The threshold (arXiv 2305.10924) assumes a loss of the predicted noise, which falls as noise grows. With a = alpha_t
    noise = sqrt(a) v + sqrt(1 - a) x of the velocity v, (x - sqrt(a) sample) / sqrt(1 - a) of the sample, and
    x + (1 - sigma) v of flow matching's velocity: the factors are the squares of what the prediction is times.
    """
    return NOISE_FORMS[prediction_type(scheduler)][1](scheduler)


def same_noise(first: Any, second: Any) -> bool:
    """Whether two schedulers have the same alphas_cumprod at the same timesteps, to 1e-5."""
    mine, its = alphas_of(first), alphas_of(second)
    return mine.shape == its.shape and np.allclose(mine, its, atol=1e-5)


def trained_for(scheduler: Any) -> dict[str, Any]:
    """What a scheduler says of the training, as JSON has it: the noise, and what is predicted."""
    flow = bool(flow_sign(scheduler))
    facts = {key: scheduler.config.get(key) for key in (TRAINED_BY_FLOW if flow else TRAINED)}
    facts |= {"prediction_type": FLOW} if flow else {}
    found: dict[str, Any] = json.loads(json.dumps(facts, default=lambda numbers: numbers.tolist()))
    return found


def settings_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config without what diffusers notes of its making, in an order that differs between processes."""
    return {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}


def made_like(scheduler: Any, kind: Any) -> Any:
    """A scheduler of another kind (a class) for the same model: it clips samples only where the scheduler did, and
    is told of learned variances only where it reads them by the sample's channels."""
    config, takes = config_of(scheduler), inspect.signature(kind.__init__).parameters
    if "clip_sample" in takes:  # by default it does, which latents do not outlive
        config = {"clip_sample": False, **config}
    if "variance_type" in takes and kind is not DDPMScheduler:  # DPM takes them for what follows three channels
        config["variance_type"] = None
    return kind.from_config(config)


def config_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config that another one keeps.

    Made from it by diffusers alone, that one has its own defaults for whatever was not given by name: also for what was
    given by place, for what Stable Diffusion's pipelines mend in old configs (clip_sample, steps_offset), and for the
    noise that the model was trained with.
    """
    config, own = dict(scheduler.config), inspect.signature(type(scheduler).__init__).parameters
    unchanged = [key for key in config.get("_use_default_values", ()) if key in own and config[key] == own[key].default]
    return {**config, "_use_default_values": [key for key in unchanged if key not in TRAINED]}
