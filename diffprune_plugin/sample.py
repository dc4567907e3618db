"""Images from a pipeline, from a seed, with a deterministic sampler."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from PIL import Image

from diffprune_plugin.errors import BadInput, nearest
from diffprune_plugin.report import pil_images

SCHEDULERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "dpm": "DPMSolverMultistepScheduler"}


def sample_images(
    pipeline: Any, count: int = 16, *, seed: int = 0, steps: int = 50, scheduler: str = "ddim", progress: bool = True
) -> list[Image.Image]:
    """``count`` images; the same seed gives every model the same noise. DDIM without added noise unless told otherwise.

    Raises BadInput for an unknown scheduler, or a pipeline that needs more than a count (a prompt).
    """
    if scheduler not in SCHEDULERS:
        raise BadInput(f"--scheduler {scheduler!r}{nearest(scheduler, SCHEDULERS)}; known: {', '.join(SCHEDULERS)}")
    if "prompt" in inspect.signature(pipeline.__call__).parameters:
        raise BadInput(f"{type(pipeline).__name__} needs a prompt; sample it with diffusers")
    if count < 1 or steps < 1:
        raise BadInput(f"--count {count} and --steps {steps} have to be at least 1")
    before = pipeline.scheduler
    if steps > before.config.num_train_timesteps:
        raise BadInput(
            f"--steps {steps} is more than the {before.config.num_train_timesteps} the model was trained for"
        )
    pipeline.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(before.config)
    pipeline.set_progress_bar_config(disable=not progress)
    try:
        generator = torch.Generator().manual_seed(seed)
        result = pipeline(batch_size=count, generator=generator, num_inference_steps=steps, output_type="np")
    finally:
        pipeline.scheduler = before
    return pil_images(result.images)
