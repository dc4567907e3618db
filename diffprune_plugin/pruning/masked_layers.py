"""Layers that know which channels are kept: with them a masked UNet computes, and learns, what the pruned one does.

Zeroed channels still count in a norm's mean and variance, and in the head size that attention scales by.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffprune_plugin.errors import BadInput


class KeptGroupNorm(nn.GroupNorm):
    """A GroupNorm over the kept channels alone: the groups are those that will be there after removal."""

    kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, ...) to the same shape, 0 in the other channels."""
        weight, bias = rows(self.weight, self.kept), rows(self.bias, self.kept)
        out = functional.group_norm(x.index_select(1, self.kept), self.num_groups, weight, bias, self.eps)
        return out.new_zeros(x.shape).index_copy(1, self.kept, out)


class KeptLayerNorm(nn.LayerNorm):
    """A LayerNorm over the kept channels of the last axis alone."""

    kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same shape, 0 in the other channels."""
        weight, bias = rows(self.weight, self.kept), rows(self.bias, self.kept)
        out = functional.layer_norm(x.index_select(-1, self.kept), self.kept.shape, weight, bias, self.eps)
        return out.new_zeros(x.shape).index_copy(-1, self.kept, out)


class KeptQuery(nn.Linear):
    """A query projection with the weights that it has after removal, so that an optimizer takes the same steps.

    Those are sqrt(kept / dense head size) times the dense ones (`Heads`); attention still divides by the square root
    of the dense head size, which the output makes up for.
    """

    kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain

    @property
    def gain(self) -> float:
        """sqrt(dense / kept head size)."""
        return math.sqrt(self.out_features / len(self.kept))


KEPT: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: KeptGroupNorm,
    nn.LayerNorm: KeptLayerNorm,
    nn.Linear: KeptQuery,
}
STOCK = {kept: stock for stock, kept in KEPT.items()}


def rows(parameter: Tensor | None, kept: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.index_select(0, kept)


def keep_(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Make these norms and query projections know their kept channels (indices, by layer name).

    The indices are part of the state dict: it does not load into stock layers, which would compute something else.

    Raises BadInput for a layer of another type.
    """
    for name in kept:
        if type(model.get_submodule(name)) not in KEPT:
            raise BadInput(
                f"{name}: masks cannot be exact through a {type(model.get_submodule(name)).__name__}; "
                "use exact_norms=False, or remove the channels"
            )
    for name, channels in kept.items():
        layer = model.get_submodule(name)
        layer.__class__ = KEPT[type(layer)]
        layer.register_buffer("kept", channels.to(next(model.parameters()).device))
        if isinstance(layer, KeptQuery):
            scale_(layer, 1 / layer.gain)


def stock_(model: nn.Module) -> None:
    """Undo `keep_`: the stock layers, queries at the dense scale."""
    for layer in model.modules():
        if type(layer) in STOCK:
            if isinstance(layer, KeptQuery):
                scale_(layer, layer.gain)
            layer.__class__ = STOCK[type(layer)]
            del layer.kept


@contextlib.contextmanager
def stocked(model: nn.Module) -> Iterator[None]:
    """The stock layers, inside and afterwards; those of `keep_` again where anything fails."""
    kept: dict[str, Tensor] = {name: layer.kept for name, layer in model.named_modules() if type(layer) in STOCK}
    stock_(model)
    try:
        yield
    except BaseException:
        keep_(model, kept)
        raise


@torch.no_grad()
def scale_(layer: nn.Module, factor: float) -> None:
    for parameter in layer.parameters():
        parameter.mul_(factor)
