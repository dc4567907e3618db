"""Work shared out over the processes of torch.distributed; without it there is one process, and nothing is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, distributed

from diffprune_plugin.errors import BadInput, CheckFailed, DiffPruneError, HardwareUnproved, first_line, out_of_memory

Item = TypeVar("Item")
Result = TypeVar("Result")
PARALLEL = {"NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU"}  # ways that leave the whole model in a process
KINDS: dict[int, type[DiffPruneError]] = {kind.exit_code: kind for kind in (CheckFailed, BadInput, HardwareUnproved)}
TOLD = 4096  # bytes of an error that the other processes are told


def check_parallel(accelerator: Any) -> None:
    """Raises BadInput for ways of Accelerate that leave a process with a part of the model."""
    if accelerator.distributed_type not in {DistributedType[name] for name in PARALLEL}:
        raise BadInput(
            f"accelerate: {accelerator.distributed_type.value} splits the model; use multi-GPU (accelerate config)"
        )


def place() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def own_device() -> torch.device | None:
    """Where Accelerate puts the tensors of this process, of several; None for the only one."""
    return PartialState().device if place()[1] > 1 else None


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


def same(number: int, device: torch.device | None) -> bool:
    """Whether all processes have the same number."""
    everyone = joined(torch.tensor([number], device=device), place()[1])
    return not bool((everyone != number).any())


def check_same(number: int, file: Path, device: torch.device) -> None:
    """Raises BadInput, on every process, unless all of them read the same number from a file of progress."""
    if not same(number, device):
        raise BadInput(f"{file}: not the same for all processes; put the output on a disk that all machines share")


def decided(value: bool, device: torch.device | None) -> bool:
    """What the first process decided."""
    mine = value and place()[0] == 0
    return bool(summed(torch.tensor(int(mine), device=device)))


def agreed(step: Callable[[], Result], device: torch.device | None) -> Result:
    """What ``step``, which itself sends nothing, returns here; where it fails on one process, it fails on all.

    So none waits for ever for one that has given up. ``device``: of what is sent. Raises what the first process that
    failed raised; on the others a DiffPruneError of the same exit code with the number of that process.
    """
    if place()[1] == 1:
        return step()
    error: Exception | None = None
    try:
        result = step()
    except Exception as caught:
        error = caught
    codes = joined(torch.tensor([exit_code(error)], device=device), place()[1]).tolist()
    if not any(codes):
        return result
    failed = next(process for process, code in enumerate(codes) if code)
    message = told(described(error), failed, device)
    if place()[0] == failed and error is not None:
        raise error
    raise KINDS[codes[failed]](f"process {failed}: {message}") from error


def exit_code(error: Exception | None) -> int:
    """0 for none; an error that is not ours is a failed check, unless memory ran out."""
    if isinstance(error, DiffPruneError):
        return error.exit_code
    return 0 if error is None else BadInput.exit_code if out_of_memory(error) else CheckFailed.exit_code


def described(error: Exception | None) -> str:
    """What the other processes are told of an error."""
    if error is None or isinstance(error, DiffPruneError):
        return str(error or "")
    return f"{type(error).__name__}: {first_line(error)}"


def told(text: str, by: int, device: torch.device | None) -> str:
    """The text that process ``by`` has, on each, cut to TOLD bytes."""
    cut = text.encode()[:TOLD] if place()[0] == by else b""
    sent = torch.tensor([*cut, *bytes(TOLD - len(cut))], dtype=torch.uint8, device=device)
    distributed.broadcast(sent, by)
    return bytes(sent.tolist()).rstrip(b"\0").decode(errors="ignore")
