"""The noisy samples that a compensation compares the dense and the pruned model on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.calibration.timesteps import share
from diffprune_plugin.data.samples import Samples, moved
from diffprune_plugin.diffusion.loss import noised
from diffprune_plugin.errors import BadInput

FOLD = 8  # every eighth image is held out


@dataclass(frozen=True)
class Draws:
    """Noisy samples (count, channels, height, width), their timesteps and further inputs, and which are held out."""

    noisy: Tensor
    timesteps: Tensor
    extra: dict[str, Tensor]
    held_out: Tensor
    adapter: ModelAdapter

    def batches(self, size: int) -> list[slice]:
        return [slice(first, first + size) for first in range(0, len(self.noisy), size)]

    def forward(self, model: nn.Module, batch: slice) -> None:
        extra = {key: value[batch] for key, value in self.extra.items()}
        self.adapter.predict(model, self.noisy[batch], self.timesteps[batch], extra)


def draw(
    data: Samples, scheduler: Any, timesteps: Any, count: int, seed: int, like: Tensor, adapter: ModelAdapter
) -> Draws:
    """``count`` noisy samples, timesteps spread evenly, some (`Samples.dropout`) without their condition where the data
    knows what that is; held out are all samples of every eighth image.

    Raises BadInput for fewer than two images or samples.
    """
    check_enough(len(data), count)
    rng = np.random.default_rng(seed)
    image = np.arange(count) % len(data)
    fold = min(FOLD, len(data), count)
    rows = torch.from_numpy(rng.permutation(len(data))[image])
    chosen = torch.tensor([int(rng.choice(share(timesteps, int(i), count))) for i in rng.permutation(count)])
    noise = torch.randn((count, *data.noise_shape), generator=torch.Generator().manual_seed(seed))
    noisy, _, times = noised(scheduler, data.sample(rows), noise, chosen, adapter)
    dropped = torch.from_numpy(np.random.default_rng([seed, 2]).random(count) < data.dropout)
    extra = moved(data.inputs(rows, dropped), like)
    held_out = torch.from_numpy(image % fold == fold - 1).to(like.device)
    return Draws(noisy.to(like), times.to(like.device), extra, held_out, adapter)


def check_enough(images: int, samples: int) -> None:
    """Raises BadInput for fewer than two images or samples."""
    if min(images, samples) < 2:
        raise BadInput(
            f"compensate: {images} images, {samples} samples: it needs two of both, to hold one out; "
            "add images, or set 'compensate: false'"
        )
