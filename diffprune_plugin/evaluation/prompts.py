"""What a pipeline draws its images from: a count alone, or prompts, a guidance scale and a size."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffprune_plugin.data.encoding import image_channels
from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.evaluation.settings import Size
from diffprune_plugin.plugins import denoiser_of, find_adapter

IMAGES = ("image", "mask_image")  # arguments of pipelines that change images
SIZE = ("height", "width")  # arguments of every prompted pipeline that draws images (of sound: none)
MOST = 4  # channels of a picture: RGBA
ELSE = "draw with diffusers, evaluate with --count 0"
NOT_GIVEN = f"cannot be given here; {ELSE}"


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a text file without the empty ones; raises BadInput if it is missing, no UTF-8 or has none."""
    if not path.is_file():
        raise BadInput(f"--prompts: {path}: no such file; give a text file, a prompt a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut prompts at U+2028 too
    except UnicodeDecodeError as error:
        raise BadInput(f"--prompts: {path}: not UTF-8: {first_line(error)}; convert it") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise BadInput(f"--prompts: {path}: no prompt in it; write one a line")
    return prompts


def arguments(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """What the pipeline's call takes, by name."""
    return inspect.signature(pipeline.__call__).parameters


def takes_prompts(pipeline: Any) -> bool:
    return "prompt" in arguments(pipeline)


def scales_noise(pipeline: Any) -> bool:
    """Whether the pipeline scales its noise and inputs as samplers want that work in sigmas (Euler, Heun, LMS).

    Those of diffusers that do so do it in their ``prepare_latents``; DDPM's, DDIM's and LDMTextToImagePipeline do not.
    """
    return hasattr(pipeline, "prepare_latents")


def own_guidance(pipeline: Any) -> float | None:
    """The guidance scale that the pipeline's call has by default; None for one that takes none."""
    scale = arguments(pipeline).get("guidance_scale")
    return None if scale is None else scale.default


def check_fitting(pipeline: Any, prompts: Sequence[str], guidance_scale: float | None, size: Size | None) -> None:
    """Raises BadInput for prompts, a guidance scale or a size that the pipeline has no use for."""
    kind = type(pipeline).__name__
    if isinstance(prompts, str):
        raise BadInput(f"prompts: {prompts!r} is one text; give a list of them")
    if prompts and not takes_prompts(pipeline):
        raise BadInput(f"--prompts: {kind} draws without prompts; leave it out")
    if size is not None and not takes_prompts(pipeline):
        raise BadInput(f"size: {size}: {kind} draws images of one size; leave it out")
    if guidance_scale is not None and "guidance_scale" not in arguments(pipeline):
        raise BadInput(f"--guidance-scale {guidance_scale}: {kind} takes none; leave it out")


def check_drawable(pipeline: Any, prompts: Sequence[str]) -> None:
    """Raises BadInput for a pipeline that draws from more than a count or prompts, or lacks the prompts it takes."""
    kind, taken = type(pipeline).__name__, arguments(pipeline)
    needed = [name for name, argument in taken.items() if name in IMAGES or required(argument)]
    if needed:
        raise BadInput(f"{kind} draws from {', '.join(needed)}, which {NOT_GIVEN}")
    model = denoiser_of(pipeline)[1]
    into, out = find_adapter(model).channels(model)
    if into > out:
        raise BadInput(f"{kind}: its UNet takes {into} channels and predicts {out}: the rest, a condition, {NOT_GIVEN}")
    if (drawn := image_channels(pipeline)) > MOST:
        raise BadInput(f"{kind} draws {drawn} channels, a picture has up to {MOST}; {ELSE}")
    if not takes_prompts(pipeline):
        return
    if not set(SIZE) <= set(taken):
        raise BadInput(f"{kind} takes no {' and '.join(SIZE)}: it draws no images; {ELSE}")
    encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder")]
    if encoders and all(part is None for part in encoders):
        raise BadInput(f"{kind} was saved without its text encoder, which reads the prompts; put it back, or {ELSE}")
    if not prompts:
        raise BadInput(
            f"{kind} draws from prompts: give --prompts FILE, a prompt a line; evaluate also takes the captions of "
            "--reference (metadata.jsonl)"
        )


def required(argument: inspect.Parameter) -> bool:
    """Whether a call needs it, other than the prompt."""
    named = argument.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return named and argument.default is inspect.Parameter.empty and argument.name != "prompt"


def call_arguments(
    pipeline: Any, rows: range, prompts: Sequence[str], guidance_scale: float | None, size: Size | None
) -> dict[str, Any]:
    """What the pipeline's call takes for these images: their number, or a prompt for each, taken in turn."""
    if not takes_prompts(pipeline):
        return {"batch_size": len(rows)}
    found: dict[str, Any] = {"prompt": [prompts[row % len(prompts)] for row in rows]}
    if guidance_scale is not None:
        found["guidance_scale"] = guidance_scale
    return found if size is None else {**found, **dict(zip(SIZE, size, strict=True))}
