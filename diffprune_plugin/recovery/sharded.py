"""Tensors of which each process holds a part (torch's FSDP 2, by Accelerate): put together, and split again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors put together one by one, split ones on the CPU; every process has to call this.

    keep: whether this process wants them; of those that it does not want it never has more than one.
    """
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if keep else tensor
        if keep:
            found[name] = tensor
    return found


def split_as(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that each has whole, where ``like`` is split and of its shape; else all of it."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
