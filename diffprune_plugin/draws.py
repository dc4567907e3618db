"""Which image, timestep and noise a training sample gets: a function of the seed, the stage and its index alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffprune_plugin.data import Samples

CURVE, GRADIENTS, FINETUNE = 0, 1, 3  # stages: each has a stream of its own


@dataclass(frozen=True)
class Batch:
    """Image rows and timesteps (batch,), samples and noise (batch, channels, height, width), further inputs by name."""

    rows: Tensor
    timesteps: Tensor
    sample: Tensor
    noise: Tensor
    extra: Mapping[str, Tensor]

    def to(self, like: Tensor) -> Batch:
        """On the device of ``like``; samples and noise in its dtype."""
        return Batch(
            self.rows,
            self.timesteps.to(like.device),
            self.sample.to(like),
            self.noise.to(like),
            {key: value.to(like.device) for key, value in self.extra.items()},
        )


def draw(samples: Samples, seed: int, stage: int, index: int, timesteps: npt.NDArray[np.int64]) -> tuple[int, int, Any]:
    """Image row, timestep (one of ``timesteps``) and noise (channels, height, width) of sample ``index`` of a stage.

    Every image is drawn once before any is drawn again.
    """
    epoch, position = divmod(index, len(samples))
    source = np.random.default_rng([seed, stage, index, 1])
    generator = torch.Generator().manual_seed(int(source.integers(2**62)))
    noise = torch.randn(samples.shape, generator=generator)
    return int(shuffled(len(samples), seed, stage, epoch)[position]), int(source.choice(timesteps)), noise


@functools.lru_cache(maxsize=4)
def shuffled(count: int, seed: int, stage: int, epoch: int) -> npt.NDArray[np.int64]:
    """The rows in the order in which an epoch takes them."""
    return np.random.default_rng([seed, stage, epoch]).permutation(count)


def batch_of(samples: Samples, draws: Sequence[tuple[int, int, Tensor]]) -> Batch:
    """The samples of some draws, on the CPU."""
    rows = torch.tensor([row for row, _, _ in draws])
    return Batch(
        rows,
        torch.tensor([timestep for _, timestep, _ in draws]),
        samples.sample(rows),
        torch.stack([noise for _, _, noise in draws]),
        {key: value[rows] for key, value in samples.extra.items()},
    )
