"""What torch's exporter writes wrongly for some models, computed in another way while they are exported."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from diffusers.models.attention_processor import Attention

from diffprune_plugin.adapters.table import ModelAdapter


def squeeze(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Of an axis that is not 1, which torch leaves as it is: written as Squeeze, with which no session loads."""

    def call(tensor: torch.Tensor, *axes: int) -> torch.Tensor:
        return tensor if len(axes) == 1 and tensor.shape[axes[0]] != 1 else original(tensor, *axes)

    return call


def attention_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    """A mask (batch, 1, tokens) once for each head, without the size that repeat_interleave reads from data."""

    def call(attention: Any, mask: Any, target_length: int, batch_size: int, out_dim: int = 3) -> Any:
        if mask is None or out_dim != 3:
            return original(attention, mask, target_length, batch_size, out_dim)
        heads = mask[:, None].expand(-1, attention.heads, -1, -1)
        return heads.reshape(batch_size * attention.heads, *mask.shape[1:])

    return call


def concat(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Of tensors of several types, which torch promotes: written as a Concat of them, with which no session loads."""

    def call(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        kind = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        return original([tensor.to(kind) for tensor in tensors], dim=dim)

    return call


# By the names that adapters give: what is replaced, and by what.
PATCHES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "squeeze": (torch.Tensor, "squeeze", squeeze),
    "concat": (torch, "concat", concat),
    "attention_mask": (Attention, "prepare_attention_mask", attention_mask),
}


@contextlib.contextmanager
def exportable(adapter: ModelAdapter) -> Iterator[None]:
    """While a model of this adapter is exported; everything is as it was afterwards."""
    with contextlib.ExitStack() as patched:
        for owner, name, replacement in map(PATCHES.__getitem__, adapter.patches):
            patched.enter_context(mock.patch.object(owner, name, replacement(getattr(owner, name))))
        yield
