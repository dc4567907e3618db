"""Which image, timestep and noise a training sample gets: a function of the seed, the stage and its index alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffprune_plugin.data.samples import CONDITION_DROPOUT, Samples, moved
from diffprune_plugin.errors import BadInput

CURVE, GRADIENTS, FINETUNE, SENSITIVITY = 0, 1, 3, 4  # stages: each has a stream of its own


class Draw(NamedTuple):
    """A row of the samples, a timestep, noise (noised channels, height, width), whether the condition is dropped."""

    row: int
    timestep: int
    noise: Tensor
    dropped: bool


def settled_dropout(asked: float | None, samples: Samples, where: str) -> float:
    """Share of the samples that get the null condition: as asked, else CONDITION_DROPOUT where there is one.

    Raises BadInput if conditions are to be dropped and nothing is known to stand for none.
    """
    if asked and not samples.null:
        have = ", ".join(sorted(samples.extra)) or "no conditions"
        raise BadInput(
            f"{where}: condition_dropout {asked}, but the data ({have}) has no null condition; add null_... to the "
            "file, or set it to 0"
        )
    return asked if asked is not None else CONDITION_DROPOUT if samples.null else 0.0


@dataclass(frozen=True)
class Batch:
    """Image rows and timesteps (batch,), samples (batch, channels, height, width), noise for their first channels, and
    further inputs by name."""

    rows: Tensor
    timesteps: Tensor
    sample: Tensor
    noise: Tensor
    extra: dict[str, Tensor]

    def to(self, like: Tensor) -> Batch:
        """On the device of ``like``; indices as they are, further inputs in its dtype, samples and noise in float32 at
        least: in bfloat16 sqrt(1 - alpha) is 0 at the first ten timesteps of a DDPM."""
        timesteps, extra = self.timesteps.to(like.device), moved(self.extra, like)
        place = like.device, torch.promote_types(like.dtype, torch.float32)
        return Batch(self.rows, timesteps, self.sample.to(*place), self.noise.to(*place), extra)


def draw(
    samples: Samples, seed: int, stage: int, index: int, timesteps: npt.NDArray[np.int64], dropout: float = 0.0
) -> Draw:
    """Sample ``index`` of a stage, at one of ``timesteps``; every image is drawn once before any is drawn again."""
    epoch, position = divmod(index, len(samples))
    source = np.random.default_rng([seed, stage, index, 1])
    generator = torch.Generator().manual_seed(int(source.integers(2**62)))
    noise = torch.randn(samples.noise_shape, generator=generator)
    row = int(shuffled(len(samples), seed, stage, epoch)[position])
    dropped = bool(np.random.default_rng([seed, stage, index, 2]).random() < dropout)
    return Draw(row, int(source.choice(timesteps)), noise, dropped)


@functools.lru_cache(maxsize=4)
def shuffled(count: int, seed: int, stage: int, epoch: int) -> npt.NDArray[np.int64]:
    """The rows in the order in which an epoch takes them."""
    return np.random.default_rng([seed, stage, epoch]).permutation(count)


def batch_of(samples: Samples, draws: Sequence[Draw]) -> Batch:
    """The samples of some draws, on the CPU."""
    rows = torch.tensor([one.row for one in draws])
    noise = torch.stack([one.noise for one in draws])
    extra = samples.inputs(rows, torch.tensor([one.dropped for one in draws]))
    return Batch(rows, torch.tensor([one.timestep for one in draws]), samples.sample(rows), noise, extra)
