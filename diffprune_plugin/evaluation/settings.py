"""How `diffprune evaluate` draws: what both models' images have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput
from diffprune_plugin.evaluation.prompts import (
    Size,
    check_drawable,
    check_fitting,
    own_guidance,
    scales_noise,
    takes_prompts,
)
from diffprune_plugin.evaluation.sampling import sampler


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How images are drawn and losses measured.

    count: images of each model; loss_samples: samples for each of the 20 points of the loss curve; the rest as
    `sample_images` takes it. Of pipelines that draw from prompts, what is not given is that of the reference (captions,
    size of the images), else the pipeline's own (guidance scale, size).
    """

    count: int = 64
    seed: int = 0
    scheduler: str = "ddim"
    steps: int = 50
    skip: str = "uniform"
    batch_size: int = 32
    prompts: Sequence[str] = field(default=(), repr=False)
    guidance_scale: float | None = None
    size: Size | None = None
    loss_samples: int = 32

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `sample_images`."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "loss_samples"}

    def settled(self, pipeline: Any, reference: Samples | None) -> Drawing:
        """The same with what was not given."""
        if not takes_prompts(pipeline):
            return self
        images = reference is not None and reference.values.dtype is torch.uint8
        return replace(
            self,
            prompts=self.prompts or (reference.captions if reference is not None else ()),
            guidance_scale=own_guidance(pipeline) if self.guidance_scale is None else self.guidance_scale,
            size=reference.shape[1:] if self.size is None and reference is not None and images else self.size,
        )

    def facts(self, pipeline: Any) -> dict[str, Any]:
        """For evaluation.json: the prompts by number and hash; unet_passes for an image (with guidance on two rows)."""
        options = self.scheduler, self.steps, self.skip, scales_noise(pipeline)
        found = {part.name: getattr(self, part.name) for part in fields(self)}
        found["prompts"] = len(self.prompts) or None
        found["unet_passes"] = len(sampler(pipeline.scheduler, *options).timesteps)
        if self.prompts:
            found["prompts_sha256"] = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        return {name: value for name, value in found.items() if value is not None}

    def check(self, against: Any, pipeline: Any) -> None:
        """Raises BadInput for pipelines that cannot be drawn from, or not so, or of which one takes prompts and the
        other does not."""
        if self.loss_samples < 2:
            raise BadInput(f"--loss-samples {self.loss_samples} is below 2: no standard error")
        if takes_prompts(against) != takes_prompts(pipeline):
            kinds = type(against).__name__, type(pipeline).__name__
            raise BadInput(f"--against: a {kinds[0]}, the model a {kinds[1]}: only one takes prompts: not comparable")
        for each in (against, pipeline):
            check_fitting(each, self.prompts, self.guidance_scale, self.size)
            if self.count:
                check_drawable(each, self.prompts)
