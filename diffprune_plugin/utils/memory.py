"""How much memory there is, and work in passes that fit it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from rich.console import Console

from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.utils.out_of_memory import out_of_memory

Item = TypeVar("Item")
Result = TypeVar("Result")
Context = Callable[[], contextlib.AbstractContextManager[Any]]


class Passes:
    """``size``: how many samples go through the UNet at once; halved, and said so, whenever memory runs out."""

    def __init__(self, size: int) -> None:
        self.size, self.said = size, ""

    def over(
        self,
        items: Sequence[Item],
        run: Callable[[Sequence[Item]], Result],
        repeating: Context = contextlib.nullcontext,
    ) -> list[Result]:
        """What ``run`` returns for the items, so many at a time; what ran out of memory again, in halves, inside
        ``repeating``.

        Raises BadInput if memory runs out for a single one.
        """
        results: list[Result] = []
        first = 0
        while first < len(items):
            part = items[first : first + self.size]
            done, result = self.attempt(part, run)
            if done:
                results += result
            else:
                self.halve(len(part))
                with repeating():
                    results += self.over(part, run, repeating)
            first += len(part)
        return results

    def attempt(self, part: Sequence[Item], run: Callable[[Sequence[Item]], Result]) -> tuple[bool, list[Result]]:
        """Whether there was memory enough, and the result; on return nothing of a failed pass is held any more."""
        try:
            return True, [run(part)]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self.said = f"{type(error).__name__}: {first_line(error)}"  # in words that may stand for other troubles too
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False, []

    def halve(self, failed: int) -> None:
        if failed == 1:
            raise BadInput(
                f"out of memory at batch size 1 ({self.said}); set gradient_checkpointing: true, autocast: true or, to "
                "calibrate, blocks_at_once: 1, free memory, or use another device"
            )
        self.size = failed // 2
        Console(stderr=True).print(
            f"out of memory at batch size {failed}: going on with {self.size}; the result is the same", soft_wrap=True
        )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, in a container with a limit of its own what is left of that."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what an earlier calibration has left there
        return int(torch.cuda.mem_get_info(device)[0])
    free, left = int(psutil.virtual_memory().available), of_container(Path("/sys/fs/cgroup"))
    return free if left is None else min(free, left)


def of_container(place: Path) -> int | None:
    """Bytes that a control group (Linux, version 2) leaves its processes; None where it sets no limit.

    What it holds of files counts as used there, and is given up as soon as a process wants it.
    """
    try:
        limit, used = ((place / name).read_text().strip() for name in ("memory.max", "memory.current"))
        left = int(limit) - int(used)
    except (OSError, ValueError):  # no such file, or "max"
        return None
    try:
        facts = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        left += int(facts["inactive_file"]) + int(facts["active_file"])
    except (OSError, ValueError, KeyError):
        pass
    return max(left, 0)


@contextlib.contextmanager
def checkpointing(model: Any, on: bool) -> Iterator[None]:
    """Gradient checkpointing as diffusers has it, if asked for: activations are computed again in the backward pass.

    Raises BadInput for a model without it.
    """
    if not on or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    try:
        model.enable_gradient_checkpointing()
    except (AttributeError, ValueError):
        raise BadInput(f"gradient_checkpointing: {type(model).__name__} has none; set it to false") from None
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()
