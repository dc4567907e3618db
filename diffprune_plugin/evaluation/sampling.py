"""Images from a pipeline, from a seed, with any sampler and spacing of the timesteps."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image

from diffprune_plugin.diffusion.inputs import check_time_table
from diffprune_plugin.diffusion.schedulers import check_objective, flow_sign, made_like, training_scheduler
from diffprune_plugin.errors import BadInput, CheckFailed, first_line, nearest
from diffprune_plugin.evaluation.prompts import call_arguments, check_drawable, check_fitting, scales_noise
from diffprune_plugin.evaluation.settings import SamplingSettings
from diffprune_plugin.plugins import denoiser_of, find_adapter
from diffprune_plugin.pruning.building import foreign_errors
from diffprune_plugin.utils.images import pil_images
from diffprune_plugin.utils.progress import progress_bar

SCHEDULERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "dpm": "DPMSolverMultistepScheduler"}
SKIPS = ("uniform", "quad")
DISTILLED = ("LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler")  # of models that draw in a few steps


def sample_images(
    pipeline: Any, settings: SamplingSettings | None = None, *, progress: bool = True
) -> list[Image.Image]:
    """Images as `SamplingSettings` says.

    Raises BadInput for an unknown scheduler or spacing, a pipeline that needs prompts and has none, or the reverse;
    CheckFailed for an image that is not finite.
    """
    asked = settings or SamplingSettings()
    check_fitting(pipeline, asked.prompts, asked.guidance_scale, asked.size)
    check_drawable(pipeline, asked.prompts)
    before, (_, model) = pipeline.scheduler, denoiser_of(pipeline)
    bar_before = getattr(pipeline, "_progress_bar_config", {})
    check_objective(before, find_adapter(model))
    check_time_table(model, find_adapter(model), before)
    pipeline.scheduler = sampler(before, asked.scheduler, asked.steps, asked.skip, scales_noise(pipeline))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(asked.seed)
    common = {"generator": generator, "num_inference_steps": asked.steps, "output_type": "np"}
    starts = range(0, asked.count, asked.batch_size)
    batches = [range(start, min(start + asked.batch_size, asked.count)) for start in starts]
    images: list[Image.Image] = []
    cannot = foreign_errors(f"{type(pipeline).__name__} cannot draw")
    with progress_bar(progress) as bar, seeded(asked.seed, model.device), cannot:
        task = bar.add_task("sampling", total=len(batches) * len(pipeline.scheduler.timesteps))
        advance = model.register_forward_hook(lambda *_: bar.advance(task))
        try:
            for rows in batches:
                given = call_arguments(pipeline, rows, asked.prompts, asked.guidance_scale, asked.size)
                drawn = np.asarray(pipeline(**given, **common).images)
                check_finite(drawn, rows, pipeline)
                images += pil_images(drawn)
        finally:
            advance.remove()
            pipeline.scheduler = before
            pipeline.set_progress_bar_config(**bar_before)
    return images


def check_finite(images: Any, rows: range, pipeline: Any) -> None:
    """Raises CheckFailed for an image (count, height, width, channels) that would otherwise become a black one."""
    bad = [row for row, image in zip(rows, images, strict=True) if not np.isfinite(image).all()]
    if bad:
        name = pipeline.name_or_path or type(pipeline).__name__
        raise CheckFailed(f"{name}: image {bad[0]} is not finite; the model has diverged, or its dtype is too narrow")


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The same random numbers also for pipelines and samplers that add noise and take no generator for it.

    They come from another seed made of this one: as numbers of the generator's own they would repeat the first noise.
    """
    other = torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(other))
        yield


def sampler(own: Any, name: str, steps: int, skip: str, sigmas: bool = False) -> Any:
    """A scheduler of this name for a pipeline whose own is ``own``, set to so many steps.

    ``sigmas``: whether the pipeline works with samplers that scale its noise (see `scales_noise`).

    Raises BadInput for an unknown scheduler, or one that cannot be set so or does not fit the pipeline.
    """
    if flow_sign(own) or type(own).__name__ in DISTILLED or not hasattr(own, "alphas_cumprod"):
        return own_sampler(own, name, steps, skip)
    total = own.config.num_train_timesteps
    if skip not in SKIPS:
        raise BadInput(f"--skip {skip!r}{nearest(skip, SKIPS)}; known: {', '.join(SKIPS)}")
    if steps > total:
        raise BadInput(f"--steps {steps} is more than the {total} the model was trained for")
    known = {cls.__name__: cls for cls in own.compatibles} | {type(own).__name__: type(own)}
    cls = known.get(SCHEDULERS.get(name, name)) or getattr(diffusers, SCHEDULERS.get(name, ""), None)
    if cls is None:
        listing = ", ".join((*SCHEDULERS, *sorted(known)))
        raise BadInput(f"--scheduler {name!r}{nearest(name, [*SCHEDULERS, *known])}; known: {listing}")
    if skip == "quad" and cls is DDIMScheduler:
        cls = AnyStepDDIM
    try:
        scheduler = made_like(own, cls)
        settle_(scheduler, quadratic(total, steps) if skip == "quad" else None)
        scheduler.set_timesteps(steps)
    except (ImportError, ValueError) as error:
        raise BadInput(f"--scheduler {name}: {first_line(error)}") from None
    if not sigmas and float(scheduler.init_noise_sigma) != 1:
        raise BadInput(f"--scheduler {name}: it works in sigmas, and this pipeline scales no noise; use ddim or dpm")
    return scheduler


def own_sampler(own: Any, name: str, steps: int, skip: str) -> Any:
    """The pipeline's own scheduler where nothing else draws from its model: of flow matching, whose Euler steps are
    what DDIM's are for noise prediction, of a distilled model, or of one with another kind of noise (EDM's).

    Raises BadInput for any other, for a spacing, and for more steps than it has.
    """
    flow, distilled = bool(flow_sign(own)), type(own).__name__ in DISTILLED
    scheduler = training_scheduler(own) if flow else made_like(own, type(own))
    if name not in ("ddim", type(scheduler).__name__) or skip != "uniform":
        of = "flow matching" if flow else "a distilled model" if distilled else f"{type(own).__name__}'s noise"
        raise BadInput(
            f"--scheduler {name}, --skip {skip}: a pipeline of {of} is "
            f"drawn from with its own scheduler and spacing; leave them out, or give {type(scheduler).__name__}"
        )
    try:
        scheduler.set_timesteps(steps, **({"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}))
    except ValueError as error:
        raise BadInput(f"--steps {steps}: {first_line(error)}") from None
    return scheduler


def settle_(scheduler: Any, timesteps: Sequence[int] | None) -> None:
    """Make the pipeline's calls fit: these timesteps whatever it asks for, no word that step does not take, and the
    prediction without the variances beside it, which DDPM's step alone reads.

    Raises BadInput if timesteps are given and the scheduler cannot take them.
    """
    cls = type(scheduler)
    taken = inspect.signature(cls.step).parameters

    @functools.wraps(cls.step)  # whose signature pipelines look at
    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **named: Any) -> Any:
        if cls is not DDPMScheduler and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        words = {key: value for key, value in named.items() if key in taken}
        return cls.step(scheduler, model_output, timestep, sample, *args, **words)

    scheduler.step = step
    if timesteps is None:
        return
    if "timesteps" not in inspect.signature(cls.set_timesteps).parameters:
        raise BadInput(f"--skip quad: {cls.__name__} takes no timesteps of one's own; use ddim, ddpm or dpm")
    scheduler.set_timesteps = lambda _, device=None: cls.set_timesteps(scheduler, device=device, timesteps=timesteps)


def quadratic(total: int, steps: int) -> list[int]:
    """Timesteps that grow as squares, largest first: [linspace(0, sqrt(0.8 total), steps) ** 2], rounded down.

    The spacing of DDIM (arXiv 2010.02502, D.3) in the authors' code. Repeats near 0 are left out: a step of length
    zero changes nothing. Raises BadInput for fewer than two steps.
    """
    if steps < 2:
        raise BadInput(f"--skip quad: --steps {steps} is below 2: it would start from timestep 0")
    squares = np.linspace(0, np.sqrt(total * 0.8), steps) ** 2
    return [int(timestep) for timestep in np.unique(squares.astype(np.int64))[::-1]]


class AnyStepDDIM(DDIMScheduler):  # type: ignore[misc]
    """DDIM over any decreasing timesteps; diffusers' own always goes back by the same stride."""

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] = ()
    ) -> None:
        self.timesteps = torch.tensor(timesteps, dtype=torch.int64, device=device)
        self.before = dict(zip(timesteps, [*timesteps[1:], -1], strict=True))

    def step(self, model_output: torch.Tensor, timestep: Any, *args: Any, **named: Any) -> Any:
        stride = int(timestep) - self.before[int(timestep)]
        # The step goes back by num_train_timesteps // num_inference_steps: as many steps as give this stride.
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, stride)
        return super().step(model_output, timestep, *args, **named)
