"""Keeps the last channels: the simplest criterion whose choice can be checked by eye."""

import torch

from diffprune_plugin import hookimpl


class LastChannels:
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, group):
        return self.scale * torch.arange(len(group[0].idxs), dtype=torch.float32)


@hookimpl
def diffprune_register_criteria(register):
    register("last_channels", LastChannels)
