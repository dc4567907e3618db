"""Training samples in memory."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

CONDITION_DROPOUT = 0.1  # what text-conditional models are trained with for classifier-free guidance


LIMIT = 4096  # images held in memory; of more, every n-th is taken


@dataclass(frozen=True)
class Samples:
    """Training samples in memory: uint8 images (count, height, width, channels), or float (count, channels, height,
    width) as the UNet takes them (latents, or pixels in [-1, 1]).

    extra: further inputs by name, a row each. null: by the same names, the one row (1, ...) that stands for no
    condition. captions: texts that are not encoded yet. classes: of how many class folders the labels were made.
    noised: how many channels, the first ones, get noise; those behind are a condition, clean. None: all of them.
    pictures: they were image files or PIL images, whose colours may be converted to what a model takes.
    dropout: the share that a compensation or sensitivity takes without condition, where it is known what that is.
    """

    values: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)
    null: dict[str, Tensor] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    classes: int | None = None
    noised: int | None = None
    pictures: bool = False
    dropout: float = CONDITION_DROPOUT

    def __len__(self) -> int:
        return len(self.values)

    def sample(self, rows: Tensor) -> Tensor:
        """Float samples (len(rows), channels, height, width); images scaled to [-1, 1]."""
        values = self.values[rows]
        if values.dtype is torch.uint8:
            return values.permute(0, 3, 1, 2).float() / 127.5 - 1
        return values

    def inputs(self, rows: Tensor, dropped: Tensor | None = None) -> dict[str, Tensor]:
        """Further inputs of these rows; those of rows that ``dropped`` (len(rows),) marks are the null condition."""
        found = {}
        for name, values in self.extra.items():
            found[name] = part = values[rows]
            if dropped is not None and name in self.null:
                part[dropped] = self.null[name].to(part)
        return found

    def with_dropout(self, share: float | None) -> Samples:
        """Themselves with another ``dropout``, if one was asked for."""
        return self if share is None else replace(self, dropout=share)

    def in_memory(self) -> Samples:
        """Themselves, or those that lie on a GPU as they are on the CPU."""
        tensors = self.values, *self.extra.values(), *self.null.values()
        if all(tensor.device.type == "cpu" for tensor in tensors):
            return self
        extra, null = ({name: tensor.cpu() for name, tensor in part.items()} for part in (self.extra, self.null))
        return replace(self, values=self.values.cpu(), extra=extra, null=null)

    def thinned(self) -> Samples:
        """Every n-th of them, so that there are no more than LIMIT."""
        part = slice(None, None, -(-len(self) // LIMIT))
        extra = {name: values[part] for name, values in self.extra.items()}
        return replace(self, values=self.values[part], extra=extra, captions=self.captions[part])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one sample."""
        channels, height, width = self.sample(torch.tensor([0])).shape[1:]
        return channels, height, width

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the noise of one sample."""
        channels, height, width = self.shape
        return channels if self.noised is None else self.noised, height, width

    @functools.cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        if self.noise_shape != self.shape:
            digest.update(str(self.noise_shape).encode())
        further = (part[key] for part in (self.extra, self.null) for key in sorted(part))
        for tensor in (self.values, *further):
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)  # a view: nothing is copied
        return digest.hexdigest()


def drawn_hash(samples: Samples) -> str:
    """SHA-256 of samples and of how often they are taken without condition, where that is not as ever."""
    usual = not samples.null or samples.dropout == CONDITION_DROPOUT
    return samples.sha256 if usual else hashlib.sha256(f"{samples.sha256} {samples.dropout}".encode()).hexdigest()


def moved(inputs: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Inputs on the device of ``like``; numbers in its dtype, indices as they are."""
    return {k: v.to(like) if v.is_floating_point() else v.to(like.device) for k, v in inputs.items()}
