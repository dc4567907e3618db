"""Which image, timestep and noise a training sample gets: a function of the seed, the stage and its index alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffprune_plugin.data import Samples
from diffprune_plugin.errors import BadInput
from diffprune_plugin.timesteps import CONDITION_DROPOUT

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
        """On the device of ``like``, numbers in its dtype."""
        extra = {k: v.to(like) if v.is_floating_point() else v.to(like.device) for k, v in self.extra.items()}
        return Batch(self.rows, self.timesteps.to(like.device), self.sample.to(like), self.noise.to(like), extra)


class Draw(NamedTuple):
    """A row of the samples, a timestep, noise (channels, height, width), and whether the row's condition is dropped."""

    row: int
    timestep: int
    noise: Tensor
    dropped: bool


def draw(
    samples: Samples, seed: int, stage: int, index: int, timesteps: npt.NDArray[np.int64], dropout: float = 0.0
) -> Draw:
    """Sample ``index`` of a stage, at one of the timesteps; every image is drawn once before any is drawn again."""
    epoch, position = divmod(index, len(samples))
    source = np.random.default_rng([seed, stage, index, 1])
    generator = torch.Generator().manual_seed(int(source.integers(2**62)))
    noise = torch.randn(samples.shape, generator=generator)
    dropped = np.random.default_rng([seed, stage, index, 2]).random() < dropout
    row = shuffled(len(samples), seed, stage, epoch)[position]
    return Draw(int(row), int(source.choice(timesteps)), noise, bool(dropped))


@functools.lru_cache(maxsize=4)
def shuffled(count: int, seed: int, stage: int, epoch: int) -> npt.NDArray[np.int64]:
    """The rows in the order in which an epoch takes them."""
    return np.random.default_rng([seed, stage, epoch]).permutation(count)


def batch_of(samples: Samples, draws: Sequence[Draw]) -> Batch:
    """The samples of some draws, on the CPU."""
    rows, dropped = torch.tensor([d.row for d in draws]), torch.tensor([d.dropped for d in draws])
    noise = torch.stack([d.noise for d in draws])
    timesteps = torch.tensor([d.timestep for d in draws])
    return Batch(rows, timesteps, samples.sample(rows), noise, samples.inputs(rows, noise, dropped))


def settled_dropout(asked: float | None, samples: Samples, where: str) -> float:
    """The share of samples whose condition is dropped: as asked, or the usual one where something stands for none.

    Raises BadInput if conditions are to be dropped and nothing is known to stand for none.
    """
    if asked is None:
        return CONDITION_DROPOUT if samples.null else 0.0
    if asked and not samples.null:
        have = ", ".join(sorted(samples.extra)) or "no conditions"
        raise BadInput(
            f"{where}: condition_dropout {asked}, but the data ({have}) has no null condition; "
            f"add null_... to the file, or set it to 0"
        )
    return asked
