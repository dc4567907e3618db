"""Images of a pipeline from the same noise and prompt, of PyTorch and ONNX Runtime, compared."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diffprune_plugin.errors import CheckFailed
from diffprune_plugin.export.verify import finite
from diffprune_plugin.planning.report import error_text
from diffprune_plugin.plugins import denoiser_of
from diffprune_plugin.pruning.building import foreign_errors

PROMPT, GUIDANCE, SEED = "a small house by a lake, in the evening", 7.5, 0
# Of a pixel in [0, 1]. fp32: half a grey level, a thousand times what trained models show. fp16 against fp32 PyTorch.
TOLERANCES = {"fp32": 0.5 / 255, "fp16": 0.1}
PICTURES, LABELS = ("image", "mask_image"), "class_labels"  # arguments of pipelines
Images = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ImageCheck:
    """How far images are apart: the largest difference of a pixel in [0, 1], the share of 8-bit values that differ.

    A difference that is not finite, which JSON has no number for, is None.
    """

    images: int
    steps: int
    difference: float | None
    differing: float
    tolerance: float
    passed: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def arguments(kind: Any) -> dict[str, inspect.Parameter]:
    """What the call of pipelines of a class takes, by name."""
    return dict(list(inspect.signature(kind.__call__).parameters.items())[1:])  # without self


def needed(kind: type) -> list[str]:
    """What pipelines of this class cannot be drawn from without, other than prompts."""
    return [
        name
        for name, each in arguments(kind).items()
        if name in PICTURES
        or (
            each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL) and name != "prompt"
        )
    ]


def not_drawn(kind: type, parts: Collection[str]) -> str:
    """Why a pipeline of this class with these components is not drawn from; nothing where it is."""
    if beyond := [name for name in needed(kind) if name not in (*PICTURES, LABELS)]:
        return f"{kind.__name__} draws from {', '.join(beyond)}"
    encoders = [name for name in inspect.signature(kind).parameters if name.startswith("text_encoder")]
    if "prompt" in arguments(kind) and encoders and not set(encoders) & set(parts):
        return f"{kind.__name__} draws from prompts, and was saved without a text encoder"
    return ""


def not_timed(kind: type, parts: Collection[str]) -> str:
    """Why its images are not timed: of changed images not all steps are drawn."""
    pictures = [name for name in needed(kind) if name in PICTURES]
    return not_drawn(kind, parts) or (f"{kind.__name__} draws from {', '.join(pictures)}" if pictures else "")


def guided(kind: type, config: Mapping[str, Any]) -> bool:
    """Whether it is drawn from with guidance that doubles the batch of a denoiser of this config; a distilled one takes
    the scale as an input instead (LCM)."""
    return "guidance_scale" in arguments(kind) and config.get("time_cond_proj_dim") is None


def draw(pipeline: Any, batch: int, steps: int) -> Images:
    """Images (batch, height, width, channels) in [0, 1] from a fixed seed; with a prompt, a class, guidance and
    pictures where it takes them. Raises BadInput where the pipeline does not draw."""
    taken = arguments(type(pipeline))
    given: dict[str, Any] = {"prompt": [PROMPT] * batch} if "prompt" in taken else {"batch_size": batch}
    given |= {"guidance_scale": GUIDANCE, LABELS: [0] * batch} | (pictures(pipeline, batch) if "image" in taken else {})
    given = {name: value for name, value in given.items() if name in taken}
    generator = torch.Generator().manual_seed(SEED)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), foreign_errors(f"{type(pipeline).__name__} cannot draw"):
        torch.manual_seed(SEED)  # for samplers that take no generator
        found = pipeline(**given, generator=generator, num_inference_steps=steps, output_type="np").images
    return np.asarray(found, dtype=np.float32)


def pictures(pipeline: Any, batch: int) -> dict[str, torch.Tensor]:
    """Pictures to change, (batch, 3, height, width) in [0, 1], of colours that run smoothly, and masks of their left
    half, in the size that the pipeline computes: its images', or its latents' where it makes them larger."""
    sides: Any = denoiser_of(pipeline)[1].config.get("sample_size") or 1
    sides = (sides, sides) if isinstance(sides, int) else sides
    larger = hasattr(pipeline, "low_res_scheduler") or "prompt" not in arguments(type(pipeline))
    scale = 1 if larger else getattr(pipeline, "vae_scale_factor", 1)
    rows, columns = torch.meshgrid(*(torch.linspace(0, 1, side * scale) for side in sides), indexing="ij")
    colours, mask = torch.stack([rows, columns, 1 - rows]), (columns[None] < 0.5).float()
    return dict(zip(PICTURES, (each.expand(batch, -1, -1, -1).clone() for each in (colours, mask)), strict=True))


def compared(found: dict[int, Images], expected: dict[int, Images], steps: int, dtype: str) -> ImageCheck:
    """Images by batch size against PyTorch's; raises CheckFailed for PyTorch's that are not finite."""
    if not all(np.isfinite(images).all() for images in expected.values()):
        raise CheckFailed("PyTorch's own images are not finite; the model has diverged, or its dtype is too narrow")
    gaps = [np.abs(found[batch] - expected[batch]) for batch in expected]
    worst = float(np.max([gap.max() for gap in gaps]))  # keeps a NaN, whichever batch it is of
    bytes_ = [(np.round(found[b] * 255), np.round(expected[b] * 255)) for b in expected]
    differing = float(np.mean(np.concatenate([(ours != theirs).ravel() for ours, theirs in bytes_])))
    limit = TOLERANCES[dtype]
    return ImageCheck(sum(expected), steps, finite(worst), differing, limit, worst <= limit)  # NaN compares false


def summary(check: ImageCheck) -> str:
    return (
        f"{check.images} images of {check.steps} steps: largest difference of a pixel {error_text(check.difference)}, "
        f"allowed {check.tolerance:.1e}; {check.differing:.2%} of the 8-bit values differ"
    )
