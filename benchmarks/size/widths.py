"""`round_to: auto` on published UNets: each kind of group's width, and that no kernel is lost. Needs no weights.

    python benchmarks/bench.py widths        # a minute; results/widths.md

Kernels are counted in the pruned modules themselves, by the conditions of ONNX Runtime's sources and not by the table
that plans are made with; beside it what the same ratio loses without `round_to`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from shared.architectures import build
from shared.results import publish, table
from torch import nn

import diffprune_plugin as dp
from diffprune_plugin.planning.plan import GroupPlan, PruningPlan

NAMES = ("ddpm-cifar10-32", "sd15", "sd21", "sdxl-base")
RUNTIMES = ("cuda-fp16", "cuda-fp16-fused")
RATIO = 0.3
HEAD = ("groups", "of", "dense", "asked to go", "left without", "left", "step")
Kernels = dict[tuple[str, str], bool]  # by kernel and layer, whether its width is taken


def ones(group: Any) -> torch.Tensor:
    """Scores without weights: widths do not depend on them."""
    return torch.ones(len(group[0].idxs))


def planned(name: str, round_to: str | None, ratio: float = RATIO) -> tuple[PruningPlan, Kernels, Kernels]:
    """The plan of an architecture, and its kernels before and after, all on the meta device."""
    with torch.device("meta"):
        model = build(name)
    before = kernels(model)
    plan = dp.make_plan(model, ones, pruning_ratio=ratio, round_to=round_to)
    dp.remove_(model, plan)
    return plan, before, kernels(model)


def kernels(model: nn.Module) -> Kernels:
    """Whether each layer's width is one that its kernel takes: even norm groups, heads and layers in eights, GEGLU."""
    return {(kernel, layer): taken for kernel, layer, taken in conditions(model)}


def conditions(model: nn.Module) -> Iterator[tuple[str, str, bool]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm):
            yield "GroupNorm", name, module.num_channels // module.num_groups % 2 == 0
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            width = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
            yield "tensor cores", name, width % 8 == 0
        elif type(module).__name__ == "Attention":
            for part in ("to_q", "to_k", "to_v"):
                size = module.get_submodule(part).out_features // module.heads
                yield "attention", f"{name}.{part}", size % 8 == 0
        elif type(module).__name__ == "GEGLU":
            yield "BiasSplitGelu", name, module.proj.out_features // 2 in (1280, 2560, 5120)


def lost(before: Kernels, after: Kernels) -> str:
    """How many layers lost which kernel."""
    found = Counter(kernel for kernel, layer in before if before[kernel, layer] and not after[kernel, layer])
    return ", ".join(f"{count} {kernel}" for kernel, count in sorted(found.items())) or "none"


def rows(plan: PruningPlan, without: PruningPlan) -> list[list[str]]:
    """Groups of one kind and width in a row: what was asked of them, and what they have."""
    found: dict[tuple[Any, ...], int] = {}
    for group, other in zip(plan.groups, without.groups, strict=True):
        if group.requested:
            key = (kind(group), group.units, group.requested, left(other), left(group), group.step)
            found[key] = found.get(key, 0) + 1
    return [[str(count), *map(str, key)] for key, count in sorted(found.items())]


def kind(group: GroupPlan) -> str:
    if group.pairs == 2:
        return "half of a GEGLU"
    return f"{group.parts} norm groups or heads" if group.parts > 1 else "layer"


def left(group: GroupPlan) -> int:
    return group.units - len(group.removed)


def main() -> None:
    """Plan each model for each runtime and without; print and keep the tables."""
    lines = [f"Ratio {RATIO}: what is left of each group's units, with and without `round_to`, and in which steps."]
    for name in NAMES:
        without, before, bare = planned(name, None)
        for runtime in RUNTIMES:
            plan, _, after = planned(name, runtime)
            within = all(group.requested - len(group.removed) < group.step for group in plan.groups)
            shares = [f"{each.macs[1] / each.macs[0]:.1%}" for each in (plan, without)]
            lines += [
                "",
                f"{name}, {runtime}: kernels lost: {lost(before, after)} (without: {lost(before, bare)}); every group "
                f"within a step: {'yes' if within else 'NO'}; MACs left {shares[0]} (without: {shares[1]}).",
                "",
                *table(HEAD, rows(plan, without)),
            ]
    publish("widths", lines)
