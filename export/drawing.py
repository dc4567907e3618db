"""Images of a pipeline from the same noise and prompt, of PyTorch and ONNX Runtime, compared."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diffprune_plugin.errors import CheckFailed
from diffprune_plugin.export.verify import finite
from diffprune_plugin.planning.report import error_text

PROMPT, GUIDANCE, SEED = "a small house by a lake, in the evening", 7.5, 0
# Of a pixel in [0, 1]. fp32: half a grey level, a thousand times what trained models show. fp16 against fp32 PyTorch.
TOLERANCES = {"fp32": 0.5 / 255, "fp16": 0.1}
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


def arguments(pipeline: Any) -> Any:
    return inspect.signature(pipeline.__call__).parameters


def not_drawn(kind: type) -> str:
    """Why pipelines of this class are not drawn from; nothing where they are."""
    taken = dict(list(arguments(kind).items())[1:])  # without self
    needed = [
        name
        for name, each in taken.items()
        if name in ("image", "mask_image")
        or (
            each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL) and name != "prompt"
        )
    ]
    return f"{kind.__name__} draws from {', '.join(needed)}" if needed else ""


def guided(pipeline: Any) -> bool:
    """Whether it is drawn from with guidance, which doubles the denoiser's batch."""
    return "guidance_scale" in arguments(pipeline)


def draw(pipeline: Any, batch: int, steps: int) -> Images:
    """Images (batch, height, width, channels) in [0, 1] from a fixed seed; with a prompt and guidance where it takes
    them."""
    taken = arguments(pipeline)
    given: dict[str, Any] = {"prompt": [PROMPT] * batch} if "prompt" in taken else {"batch_size": batch}
    if guided(pipeline):
        given["guidance_scale"] = GUIDANCE
    generator = torch.Generator().manual_seed(SEED)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # for samplers that take no generator
        found = pipeline(**given, generator=generator, num_inference_steps=steps, output_type="np").images
    return np.asarray(found, dtype=np.float32)


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
