"""Which device is asked for, and whether it is there."""

from __future__ import annotations

import platform
import re
from typing import Any

import torch
from rich.console import Console

from diffprune_plugin.errors import BadInput, HardwareUnproved

X86 = ("x86_64", "AMD64", "i386", "x86")
WITHOUT_BFLOAT16 = ("DEFAULT", "AVX2")  # what torch's kernels are made for there


def device_of(accelerator: Any, asked: str | None, autocast: bool) -> str:
    """The kind of device that Accelerate gave this process, which is torch's current one of its kind.

    Raises BadInput if another is asked for, or if the launcher asks for a precision that ``autocast`` does not.
    """
    given, precision = accelerator.device, accelerator.mixed_precision
    if asked not in (None, given.type):
        raise BadInput(
            f"device: {asked}, but Accelerate gives each process its own ({given}); leave 'device' out or say "
            f"{given.type}, or launch with --cpu, --gpu_ids or plain diffprune prune"
        )
    if precision not in ("no", "bf16" if autocast else "no"):
        raise BadInput(
            f"mixed_precision: accelerate launch says {precision}, the config autocast: {autocast}; launch with "
            "--mixed_precision no, or bf16 and autocast: true"
        )
    return str(given.type)


def check_device(device: str) -> None:
    """Raises BadInput for what is no device, HardwareUnproved for a GPU that torch does not see."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise BadInput(f"device: {device!r} is none of cpu, cuda, cuda:1 ...")
    number = int(device.partition(":")[2] or 0)
    if device != "cpu" and (not torch.cuda.is_available() or number >= torch.cuda.device_count()):
        raise HardwareUnproved(f"device: {device}, but torch sees no GPU; use device: cpu or install a CUDA build")


def say_if_emulated(device: str, key: str) -> None:
    """A line on standard error where a CPU that has no bfloat16 is asked for it by a key of the config.

    torch emulates it there without a word: a training step took nine times as long.
    """
    old = platform.machine() in X86 and torch.backends.cpu.get_cpu_capability() in WITHOUT_BFLOAT16
    if device == "cpu" and old:
        line = f"{key}: this CPU has no AVX-512, so bfloat16 is emulated, many times slower than float32; leave it out"
        Console(stderr=True).print(line, soft_wrap=True, markup=False, highlight=False)
