"""Work shared out over the processes of torch.distributed; without it there is one process, and nothing is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, distributed

from diffprune_plugin.errors import BadInput, CheckFailed, DiffPruneError, HardwareUnproved, first_line
from diffprune_plugin.utils.out_of_memory import out_of_memory

Item = TypeVar("Item")
Result = TypeVar("Result")
PARALLEL = {"NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU"}  # ways that leave the whole model in a process
KINDS: dict[int, type[DiffPruneError]] = {kind.exit_code: kind for kind in (CheckFailed, BadInput, HardwareUnproved)}
TOLD = 4096  # bytes of an error that the other processes are told


def check_parallel(accelerator: Any, splitting: bool = False) -> None:
    """Raises BadInput for ways of Accelerate that leave a process with a part of the model.

    splitting: whether torch's FSDP 2 is one of those that will do.
    """
    kind = accelerator.distributed_type
    if splitting and kind == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise BadInput("accelerate: FSDP 1 flattens the weights; set fsdp_version: 2 (accelerate config)")
    elif kind not in {DistributedType[name] for name in PARALLEL}:
        remedy = "use multi-GPU or FSDP 2" if splitting else "use multi-GPU"
        raise BadInput(f"accelerate: {kind.value} splits the model; {remedy} (accelerate config)")


def place() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


@dataclass(frozen=True)
class Processes:
    """All processes, seen from this one. ``device``: where tensors lie that are sent; of small ones the CPU if None.

    Each method but the properties and `part_of` has to be called by every process.
    """

    device: torch.device | None = None

    @classmethod
    def of_accelerate(cls) -> Processes:
        """With the device on which Accelerate puts the tensors of this process, where there are several."""
        return cls(PartialState().device if place()[1] > 1 else None)

    @property
    def rank(self) -> int:
        return place()[0]

    @property
    def count(self) -> int:
        return place()[1]

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part_of(self, items: Sequence[Item]) -> Sequence[Item]:
        """The part of the items that this process of n works on: every n-th."""
        return items[self.rank :: self.count]

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over processes, on each of them."""
        if self.count == 1:
            return tensor
        total = tensor.detach().to(self.device or tensor.device, copy=True)  # NCCL sends from its device alone
        distributed.all_reduce(total)
        return total.to(tensor.device)

    def gather(self, mine: Tensor, count: int) -> Tensor:
        """``count`` values of which process r of n has the r-th, r+n-th ...: all of them, shape (count,), on each."""
        whole = torch.zeros(count, dtype=mine.dtype, device=mine.device)
        whole[self.rank :: self.count] = mine.detach()
        return self.reduce(whole)

    def broadcast(self, value: bool) -> bool:
        """What the first process decided."""
        mine = value and self.is_first
        return bool(self.reduce(torch.tensor(int(mine), device=self.device)))

    def same(self, number: int) -> bool:
        """Whether all processes have the same number."""
        everyone = self.gather(torch.tensor([number], device=self.device), self.count)
        return not bool((everyone != number).any())

    def check_same(self, number: int, file: Path) -> None:
        """Raises BadInput, on every process, unless all of them read the same number from a file of progress."""
        if not self.same(number):
            raise BadInput(f"{file}: not the same for all processes; put the output on a disk that all machines share")

    def on_first(self, step: Callable[[], Result]) -> Result | None:
        """What ``step`` returns on the first process, None on the others; where it fails there, it fails on all."""
        return self.on_all(lambda: step() if self.is_first else None)

    def on_all(self, step: Callable[[], Result]) -> Result:
        """What ``step``, which itself sends nothing, returns here; where it fails on one process, it fails on all.

        So none waits for ever for one that has given up. Raises what the first process that failed raised; on the
        others a DiffPruneError of the same exit code with the number of that process.
        """
        if self.count == 1:
            return step()
        error: Exception | SystemExit | None = None
        try:
            result = step()
        except (Exception, SystemExit) as caught:  # a plugin may try to end the program
            error = caught
        codes = self.gather(torch.tensor([exit_code(error)], device=self.device), self.count).tolist()
        if not any(codes):
            return result
        failed = next(process for process, code in enumerate(codes) if code)
        message = self.told(described(error), failed)
        if self.rank == failed and error is not None:
            raise error
        raise KINDS[codes[failed]](f"process {failed}: {message}") from error

    def shared(self, text: str) -> str:
        """The text that the first process has, on each."""
        if self.count == 1:
            return text
        sent = torch.tensor([*text.encode()], dtype=torch.uint8, device=self.device)
        size = torch.tensor(len(sent), device=self.device)
        distributed.broadcast(size, 0)
        sent = sent if self.is_first else torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        distributed.broadcast(sent, 0)
        return bytes(sent.tolist()).decode()

    def told(self, text: str, by: int) -> str:
        """The text that process ``by`` has, on each, cut to TOLD bytes."""
        cut = text.encode()[:TOLD] if self.rank == by else b""
        sent = torch.tensor([*cut, *bytes(TOLD - len(cut))], dtype=torch.uint8, device=self.device)
        distributed.broadcast(sent, by)
        return bytes(sent.tolist()).rstrip(b"\0").decode(errors="ignore")


def exit_code(error: Exception | SystemExit | None) -> int:
    """0 for none; an error that is not ours is a failed check, unless memory ran out."""
    if isinstance(error, DiffPruneError):
        return error.exit_code
    return 0 if error is None else BadInput.exit_code if out_of_memory(error) else CheckFailed.exit_code


def described(error: Exception | SystemExit | None) -> str:
    """What the other processes are told of an error."""
    if error is None or isinstance(error, DiffPruneError):
        return str(error or "")
    return f"{type(error).__name__}: {first_line(error)}"
