"""Checks for the author of a criterion, to be called from tests; what does not hold is a CheckFailed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.calibration.run import calibrate
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import CheckFailed, DiffPruneError
from diffprune_plugin.graph.groups import CoupledGroup, trace_groups
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.plugins import find_adapter, importance
from diffprune_plugin.testing.permute import new_order, reorder_
from diffprune_plugin.testing.tiny import tiny_unet


def check_criterion(
    criterion: Criterion | str, model: nn.Module | None = None, *, equivariant: bool = True, **options: Any
) -> None:
    """Test a criterion, an object or a registered name with ``options``, on every group of a UNet (else a tiny one).

    A score is a tensor of shape (channels,), finite, not negative, on the weights' device, of a floating type not
    narrower than theirs (float32 and bfloat16 are tried). Scoring leaves the model as it was, gives the same twice,
    and, unless ``equivariant`` is False (a criterion that does not look at the weights), follows channels that
    change places. Gradients are there to be read: in ``.grad``, and as a small calibration if it has a ``sweep``.

    Raises CheckFailed naming the group and what did not hold; BadInput for an unknown name or option.
    """
    model = copy.deepcopy(model or tiny_unet())
    adapter = find_adapter(model)
    tested = importance(criterion, **options) if isinstance(criterion, str) else copy.copy(criterion)
    prepare_(tested, model, adapter)
    before = snapshot(model)
    scores = scored(tested, model, adapter)
    for name, value in snapshot(model).items():
        if not same(before[name], value):
            raise CheckFailed(f"{label(tested)} changed the model: {name}")
    for root, score in scored(tested, model, adapter).items():
        if not torch.equal(score, scores[root]):
            raise CheckFailed(f"{label(tested)} scored {root} differently the second time; seed what is random")
    narrow = with_gradients(nn.Module.to(copy.deepcopy(model), torch.bfloat16), gradients_of(model))
    scored(tested, narrow, adapter)
    if equivariant:
        check_equivariant(tested, model, adapter, scores)


def check_equivariant(criterion: Any, model: nn.Module, adapter: ModelAdapter, scores: Mapping[str, Tensor]) -> None:
    """Raises CheckFailed unless the scores follow channels that change places, in weights and gradients alike."""
    groups = trace_groups(model, adapter)
    orders = {g.root: new_order(model, g, np.random.default_rng(i)) for i, g in enumerate(groups)}
    weights, gradients = dict(model.state_dict()), gradients_of(model)
    calibration = getattr(criterion, "calibration", None)
    stored = dict(calibration.gradients) if calibration is not None else {}
    for tensors in (weights, gradients, stored):
        for group in groups:
            reorder_(tensors, model, group, orders[group.root])
    moved = copy.deepcopy(model)
    moved.load_state_dict(weights)
    criterion = copy.copy(criterion)
    if calibration is not None:
        criterion.calibration = dataclasses.replace(calibration, gradients=stored)
    found = scored(criterion, with_gradients(moved, gradients), adapter)
    for group in groups:
        expected = scores[group.root][torch.from_numpy(group.rooted(orders[group.root]))]
        largest = float(expected.abs().max())
        if not torch.allclose(found[group.root], expected, rtol=1e-3, atol=1e-4 * largest):
            raise CheckFailed(
                f"{label(criterion)} is not permutation-equivariant: when channels of {group.root} change places, "
                "their scores do not; pass equivariant=False if it does not look at the weights"
            )


def scored(criterion: Criterion, model: nn.Module, adapter: ModelAdapter) -> dict[str, Tensor]:
    """The score of every group; raises CheckFailed for one that the plan could not use."""
    scores = {}
    for group in trace_groups(model, adapter):
        try:
            score = criterion(group.graph_group)
        except DiffPruneError:
            raise
        except Exception as error:
            where = f"{group.root} in {next(model.parameters()).dtype}"
            raise CheckFailed(f"{label(criterion)} on {where}: {type(error).__name__}: {error}") from error
        weight = next(model.get_submodule(group.root).parameters())
        for fault in faults(score, group, weight):
            raise CheckFailed(f"{label(criterion)} scored {group.root} {fault}")
        assert score is not None
        scores[group.root] = score.detach().clone()
    return scores


def faults(score: Any, group: CoupledGroup, weight: Tensor) -> Iterator[str]:
    """In words, what is wrong with a score."""
    if not isinstance(score, Tensor):
        yield f"with a {type(score).__name__}, not a tensor"
    elif tuple(score.shape) != (group.channels,):
        yield f"with shape {tuple(score.shape)}, not ({group.channels},)"
    elif score.device != weight.device:
        yield f"on {score.device}, but its weights are on {weight.device}"
    elif not score.is_floating_point() or torch.promote_types(score.dtype, weight.dtype) != score.dtype:
        yield f"in {score.dtype}, but its weights are {weight.dtype}; give a floating type not narrower"
    elif not bool(torch.isfinite(score).all()):
        yield "with a value that is not finite"
    elif bool((score < 0).any()):
        yield f"with a negative value ({float(score.min()):.3g})"


def prepare_(criterion: Any, model: nn.Module, adapter: ModelAdapter) -> None:
    """Give the criterion gradients of a few random samples: in ``.grad``, and as a calibration if it wants one."""
    inputs = adapter.flat_inputs(model, batch=4)
    if (sweep := getattr(criterion, "sweep", None)) is not None:
        extra = {name: value for name, value in inputs.items() if name not in (adapter.sample, adapter.timestep)}
        criterion.calibration = calibrate(
            model,
            DDPMScheduler(num_train_timesteps=20),
            Samples(inputs[adapter.sample].cpu(), {name: value.cpu() for name, value in extra.items()}),
            dataclasses.replace(sweep, samples=4, curve_samples=1, micro_batch=min(sweep.micro_batch, 4)),
            batch_size=4,
            timesteps=2,
            progress=False,
            adapter=adapter,
        )
    with torch.enable_grad():
        torch.autograd.backward(adapter.denoise(model, inputs).square().mean())


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_gradients(model: nn.Module, gradients: Mapping[str, Tensor]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].to(parameter) if name in gradients else None
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that scoring must not change, by name."""
    found: dict[str, Any] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found |= {f"gradient of {name}": gradient for name, gradient in gradients_of(model).items()}
    found |= {f"requires_grad of {name}": p.requires_grad for name, p in model.named_parameters()}
    return found | {f"training mode of {name or 'the model'}": m.training for name, m in model.named_modules()}


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return bool(one == other)
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def label(criterion: Any) -> str:
    return type(criterion).__name__
