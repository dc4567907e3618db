"""Which widths keep the kernels that a runtime has for a layer: one table, for plans and for what an export tells.

Read from ONNX Runtime 1.31's sources, not tried on a GPU: the contrib GroupNorm computes two channels a thread, flash
and memory-efficient attention take head sizes in eights, and BiasSplitGelu is compiled for three half-widths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diffprune_plugin.errors import BadInput, nearest

if TYPE_CHECKING:
    from diffprune_plugin.graph.groups import CoupledGroup

AUTO = "auto"  # in a config: the runtime of its `latency`
Part = Literal["layer", "norm group", "head", "half"]


@dataclass(frozen=True)
class Rule:
    """What a kernel asks of a width: of all channels of a layer, or of one norm group, one head, one half of a GEGLU.

    The width is a multiple of ``multiple``, or one of ``listed`` where there are any.
    """

    kernel: str
    of: Part
    multiple: int = 1
    listed: tuple[int, ...] = ()

    def at_least(self, width: int) -> int | None:
        """The smallest width that keeps the kernel and is no narrower; None where there is none."""
        if self.listed:
            return min((each for each in self.listed if each >= width), default=None)
        return -(-width // self.multiple) * self.multiple


BLOCKS = Rule("blocks of 16 (AVX-512)", "layer", 16)
WARPS = Rule("warps of 32", "layer", 32)
TENSOR_CORES = Rule("tensor cores", "layer", 8)
GROUP_NORM = Rule("GroupNorm", "norm group", 2)
ATTENTION = Rule("MultiHeadAttention", "head", 8)
SPLIT_GELU = Rule("BiasSplitGelu", "half", listed=(1280, 2560, 5120))
# By provider and dtype. What is fused only by --fuse and known for few widths stands in rows of its own: a plan that
# keeps those kernels hardly prunes what they compute.
RUNTIMES: dict[str, tuple[Rule, ...]] = {
    "cpu-fp32": (BLOCKS,),
    "openvino-fp32": (BLOCKS,),
    "cuda-fp32": (WARPS, GROUP_NORM, ATTENTION),
    "cuda-fp16": (TENSOR_CORES, GROUP_NORM, ATTENTION),
    "cuda-fp32-fused": (WARPS, GROUP_NORM, ATTENTION, SPLIT_GELU),
    "cuda-fp16-fused": (TENSOR_CORES, GROUP_NORM, ATTENTION, SPLIT_GELU),
    "tensorrt-fp32": (WARPS, ATTENTION),
    "tensorrt-fp16": (TENSOR_CORES, ATTENTION),
}


FUSES = ("cpu", "cuda")  # providers with kernels for fused operators


def runtime_name(provider: str, dtype: str, fused: bool = False) -> str:
    """The key in the table for a provider (its options are no matter) and a dtype, where it has one."""
    name = f"{provider.partition(':')[0]}-{dtype}"
    return f"{name}-fused" if fused and f"{name}-fused" in RUNTIMES else name


def rules_of(runtime: str) -> tuple[Rule, ...]:
    """What the kernels of a runtime ask; raises BadInput for one that is not in the table."""
    if runtime not in RUNTIMES:
        raise BadInput(f"{runtime!r}{nearest(runtime, RUNTIMES)}: not one of {', '.join(RUNTIMES)}")
    return RUNTIMES[runtime]


def layer_multiple(round_to: int | str | None) -> int:
    """What all channels of a layer are kept a multiple of, whatever is in it."""
    if isinstance(round_to, str):
        return math.lcm(*(rule.multiple for rule in rules_of(round_to) if rule.of == "layer"))
    return round_to or 1


@dataclass(frozen=True)
class Fit:
    """The widths of a group that are asked for: multiples of ``step``, or the ``listed`` ones; and in words why."""

    step: int
    listed: tuple[int, ...] = ()
    why: str = ""

    def at_least(self, width: int, most: int) -> int:
        """The smallest width that fits and is no narrower, ``most`` at most."""
        if self.listed:
            return min((each for each in self.listed if width <= each <= most), default=most)
        return min(max(math.ceil(width / self.step), 1) * self.step, most)

    def below(self, width: int) -> int:
        """How far the next narrower width that fits is; all of it where there is none."""
        return width - max((each for each in self.listed if each < width), default=0) if self.listed else self.step

    def counts(self, units: int, most: int) -> Sequence[int]:
        """How many of the units may go for what is left to fit, ``most`` at most."""
        if self.listed:
            return sorted(units - each for each in self.listed if 0 <= units - each <= most)
        return range(units % self.step, most + 1, self.step)


def fit_of(group: CoupledGroup, round_to: int | str | None) -> Fit:
    """The widths of a group that a multiple, or the kernels of a runtime, ask for; its parts lose equally many."""
    if not isinstance(round_to, str):
        multiple = round_to or 1
        return Fit(math.lcm(group.parts, multiple), why=f"round_to {multiple}" if multiple > 1 else "")
    kinds = kinds_of(group)
    rules = [
        rule for rule in rules_of(round_to) if rule.of in kinds and (not rule.listed or group.units in rule.listed)
    ]
    parts = {"norm group": group.parts, "head": group.parts}
    step = math.lcm(group.parts, *(rule.multiple * parts.get(rule.of, 1) for rule in rules))
    listed = next((rule.listed for rule in rules if rule.listed), ())
    return Fit(step, listed, f"round_to {round_to} ({', '.join(rule.kernel for rule in rules)})")


def kinds_of(group: CoupledGroup) -> set[Part]:
    """Which parts the channels of a group fall into."""
    present: dict[Part, bool] = {
        "layer": True,
        "norm group": group.normed,
        "head": group.parts > 1 and not group.normed,
        "half": group.pairs == 2 and not group.normed,
    }
    return {part for part, there in present.items() if there}
