"""What the settings come to on a pipeline: completed from it and the reference, checked, and told in the report."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from typing import Any

import torch

from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput
from diffprune_plugin.evaluation.prompts import (
    check_drawable,
    check_fitting,
    own_guidance,
    scales_noise,
    takes_prompts,
)
from diffprune_plugin.evaluation.sampling import sampler
from diffprune_plugin.evaluation.settings import Drawing


def completed(drawing: Drawing, pipeline: Any, reference: Samples | None) -> Drawing:
    """The same with what was not given."""
    if not takes_prompts(pipeline):
        return drawing
    images = reference is not None and reference.values.dtype is torch.uint8
    return replace(
        drawing,
        prompts=drawing.prompts or (reference.captions if reference is not None else ()),
        guidance_scale=own_guidance(pipeline) if drawing.guidance_scale is None else drawing.guidance_scale,
        size=reference.shape[1:] if drawing.size is None and reference is not None and images else drawing.size,
    )


def drawing_facts(drawing: Drawing, pipeline: Any) -> dict[str, Any]:
    """For evaluation.json: the prompts that are drawn, by number and hash; unet_passes for an image (with guidance on
    two rows)."""
    found = {part.name: getattr(drawing, part.name) for part in fields(drawing)}
    used = drawing.prompts[: drawing.count or None]
    found["prompts"] = len(used) or None
    if drawing.count:
        options = drawing.scheduler, drawing.steps, drawing.skip, scales_noise(pipeline)
        found["unet_passes"] = len(sampler(pipeline.scheduler, *options).timesteps)
    if used:
        found["prompts_sha256"] = hashlib.sha256("\n".join(used).encode()).hexdigest()
    return {name: value for name, value in found.items() if value is not None}


def check_comparably_drawn(drawing: Drawing, against: Any, pipeline: Any) -> None:
    """Raises BadInput for pipelines that cannot be drawn from, or not so, or of which only one takes prompts."""
    if takes_prompts(against) != takes_prompts(pipeline):
        kinds = type(against).__name__, type(pipeline).__name__
        raise BadInput(f"--against: a {kinds[0]}, the model a {kinds[1]}: only one takes prompts: not comparable")
    for each in (against, pipeline):
        check_fitting(each, drawing.prompts, drawing.guidance_scale, drawing.size)
        if drawing.count:
            check_drawable(each, drawing.prompts)
