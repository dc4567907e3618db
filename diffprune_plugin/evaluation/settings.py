"""How images are drawn and losses measured: every option of `diffprune sample` and `evaluate`, once. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from diffprune_plugin.utils.settings import LARGEST_SEED, check_bounds, setting

Size = tuple[int, int]
MANY = 100_000  # images or samples: twice what FID is published with
LARGEST = 16_384  # images a pass, and pixels a side


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How images are drawn; the same seed gives every model the same noise. Raises BadInput for a number out of bounds.

    scheduler: a short name, or any diffusers scheduler that the pipeline's own is compatible with; ``ddim`` adds no
        noise. skip: ``uniform`` spaces the timesteps as that scheduler does, ``quad`` by `sampling.quadratic`.
    batch_size: samplers that add noise (``ddpm``) draw other images at another one, the rest the same.
    Of pipelines that draw from prompts only: prompts, taken in turn, image i from prompt i; guidance_scale and size
        (height, width), by default the pipeline's own.
    """

    count: int = setting(16, "Number of images.", 1, MANY)
    seed: int = setting(0, "Seed of everything random.", 0, LARGEST_SEED)
    scheduler: str = setting("ddim", "ddim, ddpm, dpm, or a diffusers class.")
    steps: int = setting(50, "Sampling steps.", 1, 10_000)
    skip: str = setting("uniform", "Spacing of the timesteps: uniform or quad.")
    batch_size: int = setting(32, "Images a pass.", 1, LARGEST)
    prompts: Sequence[str] = field(default=(), repr=False)
    guidance_scale: float | None = setting(None, "Guidance scale; by default the pipeline's own.", 0.0, 1000.0)
    size: Size | None = None

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class Drawing(SamplingSettings):
    """How `diffprune evaluate` draws and measures the loss.

    Of pipelines that draw from prompts, what is not given is that of the reference (captions, size of the images), else
    the pipeline's own.
    """

    count: int = setting(64, "Images of each model; 0 draws none.", 0, MANY)
    loss_samples: int = setting(32, "Samples for each of the 20 points of the loss curve.", 2, MANY)
