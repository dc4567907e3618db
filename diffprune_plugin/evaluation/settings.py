"""How images are drawn and losses measured: every option of `diffprune sample` and `evaluate`, once. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from typer import Option

from diffprune_plugin.utils.command_options import LARGEST_SEED, check_limits

Size = tuple[int, int]
MANY = 100_000  # images or samples: twice what FID is published with
LARGEST = 16_384  # images a pass, and pixels a side


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How images are drawn; the same seed gives every model the same noise. Raises BadInput for a number out of bounds.

    scheduler: a short name, or any diffusers scheduler that the pipeline's own is compatible with; ``ddim`` adds no
        noise. skip: ``uniform`` spaces the timesteps as that scheduler does, ``quad`` by `sampling.quadratic`.
    batch_size: samplers that add noise (``ddpm``) draw other images at another one, the rest the same, where the
        numbers of a sample divide by 16 (torch draws them in sixteens).
    Of pipelines that draw from prompts only: prompts, taken in turn, image i from prompt i; guidance_scale and size
        (height, width), by default the pipeline's own.
    """

    count: Annotated[int, Option(help="Number of images.", min=1, max=MANY)] = 16
    seed: Annotated[int, Option(help="Seed of everything random.", min=0, max=LARGEST_SEED)] = 0
    scheduler: Annotated[str, Option(help="ddim, ddpm, dpm, or a diffusers class.")] = "ddim"
    steps: Annotated[int, Option(help="Sampling steps.", min=1, max=10_000)] = 50
    skip: Annotated[str, Option(help="Spacing of the timesteps: uniform or quad.")] = "uniform"
    batch_size: Annotated[int, Option(help="Images a pass.", min=1, max=LARGEST)] = 32
    prompts: Sequence[str] = field(default=(), repr=False)
    guidance_scale: Annotated[
        float | None, Option(help="Guidance scale; by default the pipeline's own.", min=0.0, max=1000.0)
    ] = None
    size: Size | None = None

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, kw_only=True)
class Drawing(SamplingSettings):
    """How `diffprune evaluate` draws and measures the loss.

    Of pipelines that draw from prompts, what is not given is that of the reference (captions, size of the images), else
    the pipeline's own.
    """

    count: Annotated[int, Option(help="Images of each model; 0 draws none.", min=0, max=MANY)] = 64
    loss_samples: Annotated[
        int, Option(help="Samples for each of the 20 points of the loss curve.", min=2, max=MANY)
    ] = 32
