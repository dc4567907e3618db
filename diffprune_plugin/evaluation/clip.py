"""How well images fit their prompts: the CLIP score (arXiv 2104.08718), by a CLIP of the user's.

torchmetrics has it too, but not with transformers 5, whose CLIP gives other objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffprune_plugin.errors import BadInput
from diffprune_plugin.evaluation.report import SCORE
from diffprune_plugin.pruning.building import foreign_errors
from diffprune_plugin.utils.optional import need
from diffprune_plugin.utils.tensors import weights_hash


@dataclass(frozen=True)
class Clip:
    """A CLIP and what prepares its inputs."""

    name: str
    weights: str
    model: Any = field(repr=False)
    processor: Any = field(repr=False)

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image.Image], prompts: Sequence[str], batch_size: int) -> Tensor:
        """100 * max(cos(image, prompt), 0) of each picture and the prompt it was drawn from, taken in turn.

        float64 (count,).
        """
        found = []
        for start in range(0, len(pictures), batch_size):
            part = [picture.convert("RGB") for picture in pictures[start : start + batch_size]]
            texts = [prompts[number % len(prompts)] for number in range(start, start + len(part))]
            asked = {"text": texts, "images": part, "return_tensors": "pt", "padding": True, "truncation": True}
            output = self.model(**self.processor(**asked))
            found.append(torch.cosine_similarity(output.image_embeds, output.text_embeds).double())
        return 100 * torch.cat(found).clamp_min(0)

    def measured(self, pictures: Sequence[Image.Image], prompts: Sequence[str], batch_size: int) -> dict[str, Any]:
        """The mean over the pictures and its standard error."""
        scores = self.scores(pictures, prompts, batch_size)
        error = float(scores.std() / len(scores) ** 0.5) if len(scores) > 1 else None
        return {SCORE: float(scores.mean()), f"{SCORE}_stderr": error}


def load_clip(path: Path) -> Clip:
    """The CLIP of a directory, as transformers' ``save_pretrained`` of model and processor leave it.

    Raises BadInput where there is none, or no safetensors; nothing is fetched.
    """
    transformers = need("transformers")
    if not any(path.glob("*.safetensors")):
        raise BadInput(
            f"--clip: {path}: no CLIP with safetensors there; give a directory that CLIPModel and CLIPProcessor wrote"
        )
    with foreign_errors(f"--clip: {path}: cannot be loaded as a CLIP"):
        options: dict[str, Any] = {"local_files_only": True}
        model, found = transformers.CLIPModel.from_pretrained(
            str(path), use_safetensors=True, output_loading_info=True, **options
        )
        processor = transformers.CLIPProcessor.from_pretrained(str(path), **options)
    if found["missing_keys"]:  # it would have made them up
        raise BadInput(f"--clip: {path}: has no {sorted(found['missing_keys'])[0]}; give a whole CLIP")
    model = model.float().eval()  # a score has more digits than half precision
    return Clip(path.name, weights_hash(model), model, processor)
