"""Work shared out over the processes of torch.distributed; without it there is one process, and nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, distributed

from diffprune_plugin.errors import BadInput

Item = TypeVar("Item")


def place() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def part_of(items: Sequence[Item]) -> Sequence[Item]:
    """The part of the items that this process of n works on: every n-th."""
    rank, processes = place()
    return items[rank::processes]


def summed(tensor: Tensor) -> Tensor:
    """The sum over processes, on each of them; every process has to ask for it."""
    if place()[1] == 1:
        return tensor
    total = tensor.detach().clone()
    distributed.all_reduce(total)
    return total


def joined(mine: Tensor, count: int) -> Tensor:
    """``count`` values of which process r of n has the r-th, r+n-th ...: all of them, shape (count,), on each."""
    rank, processes = place()
    whole = torch.zeros(count, dtype=mine.dtype, device=mine.device)
    whole[rank::processes] = mine.detach()
    return summed(whole)


def check_same(number: int, file: Path, device: torch.device) -> None:
    """Raises BadInput, on every process, unless all of them read the same number from a file of progress."""
    everyone = joined(torch.tensor([number], device=device), place()[1])
    if bool((everyone != number).any()):
        raise BadInput(f"{file}: not the same for all processes; put the output on a disk that all machines share")


def decided(value: bool, device: torch.device) -> bool:
    """What the first process decided."""
    mine = value and place()[0] == 0
    return bool(summed(torch.tensor(int(mine), device=device)))
