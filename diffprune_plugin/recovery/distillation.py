"""Distillation: the dense model as a teacher of the pruned one, by its prediction and by its features."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.recovery.ridge import by_position
from diffprune_plugin.recovery.systems import find_systems
from diffprune_plugin.utils.modes import evaluating


@torch.no_grad()
def kept_features(model: nn.Module, dense: nn.Module, plan: PruningPlan, adapter: ModelAdapter) -> dict[str, Tensor]:
    """The blocks whose outputs are residual sums, and which of the dense UNet's channels there the pruned one kept.

    Raises BadInput if there is none.
    """
    with evaluating(model, dense):
        systems, _ = find_systems(model, dense, plan, adapter)
    sums = {s.block: s.kept for s in systems if s.block not in {part.name for part in s.parts}}
    if not sums:
        raise BadInput("feature_weight: the plan cuts no layer whose output goes into a residual sum; leave it out")
    return sums


@contextlib.contextmanager
def watched(model: nn.Module, names: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """The outputs of some modules, by name, filled in by the forward passes of the block."""
    values: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            values[name] = output[0] if isinstance(output, tuple) else output

        return hook

    with contextlib.ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(keeper(name)))
        yield values


def feature_error(values: Mapping[str, Tensor], taught: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensor:
    """Squared distance to the teacher's features at the kept channels over their mean square, shape (batch,).

    The mean over all features: the feature term of arXiv 2305.15798, made free of each feature's scale, of each sample
    by itself, so that it is the same however the samples of a step are split.
    """
    errors = []
    for name, channels in kept.items():
        target = by_position(taught[name])[..., channels.to(taught[name].device)].float()
        error, size = (
            each.square().flatten(1).mean(1) for each in (by_position(values[name]).float() - target, target)
        )
        errors.append(error / size.clamp_min(torch.finfo(target.dtype).tiny))
    return torch.stack(errors).mean(0)
