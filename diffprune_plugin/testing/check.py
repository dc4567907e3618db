"""Checks for the author of a criterion or an adapter, to be called from tests; what does not hold is a CheckFailed."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from diffprune_plugin.adapters.table import UNetAdapter, axis_size, sample_size
from diffprune_plugin.calibration.run import calibrate
from diffprune_plugin.data.loading import Samples
from diffprune_plugin.errors import BadInput, CheckFailed, DiffPruneError
from diffprune_plugin.graph.groups import CoupledGroup, trace_groups
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.planning.planner import make_plan
from diffprune_plugin.plugins import find_adapter, importance
from diffprune_plugin.pruning.checkpoint import load, save
from diffprune_plugin.pruning.removal import remove_
from diffprune_plugin.testing.permute import NORMS, new_order, reorder_

ROWS = ("inputs", "keep", "heads", "pairs", "mirrors", "words")
RATIOS = (0.3, 0.5)


def check_criterion(
    criterion: Criterion | str, unet: nn.Module | None = None, *, equivariant: bool = True, **options: Any
) -> None:
    """Test a criterion, an object or a registered name with ``options``, on every group of a UNet (else a tiny one).

    A score is a tensor of shape (channels,), finite, not negative, on the weights' device, of a floating type not
    narrower than theirs (float32 and bfloat16 are tried). Scoring leaves the model as it was, gives the same twice,
    and, unless ``equivariant`` is False (a criterion that does not look at the weights), follows channels that
    change places. Gradients are there to be read: in ``.grad``, and as a small calibration if it has a ``sweep``.

    Raises CheckFailed naming the group and what did not hold; BadInput for an unknown name or option.
    """
    unet = copy.deepcopy(unet or tiny_unet())
    adapter = find_adapter(unet)
    tested = importance(criterion, **options) if isinstance(criterion, str) else copy.copy(criterion)
    prepare_(tested, unet, adapter)
    before = snapshot(unet)
    scores = scored(tested, unet, adapter)
    for name, value in snapshot(unet).items():
        if not same(before[name], value):
            raise CheckFailed(f"{label(tested)} changed the model: {name}")
    for root, score in scored(tested, unet, adapter).items():
        if not torch.equal(score, scores[root]):
            raise CheckFailed(f"{label(tested)} scored {root} differently the second time; seed what is random")
    narrow = with_gradients(nn.Module.to(copy.deepcopy(unet), torch.bfloat16), gradients_of(unet))
    scored(tested, narrow, adapter)
    if equivariant:
        check_equivariant(tested, unet, adapter, scores)


def check_equivariant(criterion: Any, unet: nn.Module, adapter: UNetAdapter, scores: Mapping[str, Tensor]) -> None:
    """Raises CheckFailed unless the scores follow channels that change places, in weights and gradients alike."""
    groups = trace_groups(unet, adapter)
    orders = {g.root: new_order(unet, g, np.random.default_rng(i)) for i, g in enumerate(groups)}
    weights, gradients = dict(unet.state_dict()), gradients_of(unet)
    calibration = getattr(criterion, "calibration", None)
    stored = dict(calibration.gradients) if calibration is not None else {}
    for tensors in (weights, gradients, stored):
        for group in groups:
            reorder_(tensors, unet, group, orders[group.root])
    moved = copy.deepcopy(unet)
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


def scored(criterion: Criterion, unet: nn.Module, adapter: UNetAdapter) -> dict[str, Tensor]:
    """The score of every group; raises CheckFailed for one that the plan could not use."""
    scores = {}
    for group in trace_groups(unet, adapter):
        try:
            score = criterion(group.graph_group)
        except DiffPruneError:
            raise
        except Exception as error:
            where = f"{group.root} in {next(unet.parameters()).dtype}"
            raise CheckFailed(f"{label(criterion)} on {where}: {type(error).__name__}: {error}") from error
        weight = next(unet.get_submodule(group.root).parameters())
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


def prepare_(criterion: Any, unet: nn.Module, adapter: UNetAdapter) -> None:
    """Give the criterion gradients of a few random samples: in ``.grad``, and as a calibration if it wants one."""
    inputs = adapter.flat_inputs(unet, batch=4)
    if (sweep := getattr(criterion, "sweep", None)) is not None:
        extra = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}
        criterion.calibration = calibrate(
            unet,
            DDPMScheduler(num_train_timesteps=20),
            Samples(inputs["sample"].cpu(), {name: value.cpu() for name, value in extra.items()}),
            dataclasses.replace(sweep, samples=4, curve_samples=1, micro_batch=min(sweep.micro_batch, 4)),
            batch_size=4,
            timesteps=2,
            progress=False,
            adapter=adapter,
        )
    with torch.enable_grad():
        torch.autograd.backward(forward(unet, adapter, inputs).square().mean())


def gradients_of(unet: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


def with_gradients(unet: nn.Module, gradients: Mapping[str, Tensor]) -> nn.Module:
    for name, parameter in unet.named_parameters():
        parameter.grad = gradients[name].to(parameter) if name in gradients else None
    return unet


def snapshot(unet: nn.Module) -> dict[str, Any]:
    """Everything about a model that scoring must not change, by name."""
    found: dict[str, Any] = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    found |= {f"gradient of {name}": gradient for name, gradient in gradients_of(unet).items()}
    found |= {f"requires_grad of {name}": p.requires_grad for name, p in unet.named_parameters()}
    return found | {f"training mode of {name or 'the model'}": m.training for name, m in unet.named_modules()}


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return bool(one == other)
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def label(criterion: Any) -> str:
    return type(criterion).__name__


def tiny_unet() -> UNet2DModel:
    """Norm groups, heads and concatenations in 0.2 M random parameters."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return unsettled_(unet).eval()


def unsettled_(unet: Any) -> Any:
    """Norms and biases moved away from ones and zeros, behind which a fault could hide."""
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def check_adapter(adapter: UNetAdapter, *unets: nn.Module, export: bool = True) -> None:
    """Test an adapter's table on tiny dense UNets of its class that between them use every row.

    Enough: coupled channels can change places, dead ones can be removed, without any effect on the output; at ratios
    0.3 and 0.5 the UNet runs, gives outputs of the shape that the table says, and is saved and loaded with
    difference 0; ``export``: the first one's ONNX file is verified. Needed: without any one row, some of this fails.

    Raises CheckFailed naming the UNet's fault or the row; BadInput without a UNet.
    """
    if not unets:
        raise BadInput("check_adapter: give at least one tiny UNet of the class")
    torch.manual_seed(0)
    unets = tuple(unsettled_(copy.deepcopy(unet)).eval() for unet in unets)
    for unet in unets:
        check_enough(adapter, unet)
        check_reload(adapter, unet)
    if export:
        check_export(adapter, unets[0])
    for field in ROWS:
        for row in getattr(adapter, field):
            rest: Any = tuple(other for other in getattr(adapter, field) if other is not row)
            shorter = dataclasses.replace(adapter, **{field: rest})
            if not any(fails(shorter, unet) for unet in unets):
                raise CheckFailed(
                    f"{adapter.model_class}: nothing fails without {row!r} in {field}; drop it, or give a UNet with it"
                )


def fails(adapter: UNetAdapter, unet: nn.Module) -> bool:
    try:
        check_enough(adapter, unet)
    except CheckFailed:
        return True
    return False


def check_enough(adapter: UNetAdapter, unet: nn.Module) -> None:
    """Raises CheckFailed for the first thing that the table does not say and the UNet needs."""
    for name, check in (
        ("a forward pass", check_shapes),
        ("channels that change places", check_coupling),
        ("the removal of dead channels", check_dead),
        ("pruning", check_pruned),
    ):
        try:
            check(adapter, unet)
        except CheckFailed as error:
            raise CheckFailed(f"{adapter.model_class}: {name}: {error}") from None
        except Exception as error:  # whatever a wrong table leads to, in the model or in torch
            raise CheckFailed(f"{adapter.model_class}: {name}: {type(error).__name__}: {error}") from error


def check_shapes(adapter: UNetAdapter, unet: nn.Module) -> None:
    """Raises CheckFailed unless the output has the shape that the table says."""
    batch, (height, width) = 2, sample_size(unet)
    found = forward(unet, adapter, adapter.flat_inputs(unet, batch))
    words = {"batch": batch, "height": height, "width": width, **dict(adapter.words)}
    expected = tuple(axis_size(unet, axis, words) for axis in adapter.outputs[0].axes.split())
    if tuple(found.shape) != expected:
        raise CheckFailed(f"the output has shape {tuple(found.shape)}, not {expected}; see outputs and keep")
    if not bool(torch.isfinite(found).all()):
        raise CheckFailed("the output is not finite")


def check_coupling(adapter: UNetAdapter, unet: nn.Module) -> None:
    """Raises CheckFailed unless the units of each group can change places without any effect."""
    inputs, kept, moved = adapter.flat_inputs(unet, 2), adapter.kept_layers(unet), copy.deepcopy(unet)
    expected = forward(unet, adapter, inputs)
    for number, group in enumerate(trace_groups(unet, adapter)):
        if not kept.intersection(group.layers):
            weights = dict(unet.state_dict())
            reorder_(weights, unet, group, new_order(unet, group, np.random.default_rng(number)))
            moved.load_state_dict(weights)
            compare(moved, adapter, inputs, expected, f"those of {group.root} have an effect")


def check_dead(adapter: UNetAdapter, unet: nn.Module) -> None:
    """Raises CheckFailed unless dead units, in groups that no norm sees, can be removed without any effect."""
    inputs, kept, dead = adapter.flat_inputs(unet, 2), adapter.kept_layers(unet), copy.deepcopy(unet)
    units = {}
    for group in trace_groups(unet, adapter):
        normed = any(isinstance(unet.get_submodule(member.layer), NORMS) for member in group.members)
        size = group.units // group.parts
        if not normed and not kept.intersection(group.layers) and size > 1:
            units[group.root] = [part * size + i for part in range(group.parts) for i in range(size // 2, size)]
            kill_(dead, group, units[group.root])
    expected = forward(dead, adapter, inputs)
    plan = make_plan(dead, "magnitude", pruning_ratio=0.0, adapter=adapter)
    chosen = tuple(g.model_copy(update={"removed": tuple(units.get(g.root, ()))}) for g in plan.groups)
    remove_(dead, plan.model_copy(update={"groups": chosen}), adapter=adapter)
    compare(dead, adapter, inputs, expected, f"some of {', '.join(units)} has an effect (heads: query and scale?)")


@torch.no_grad()
def kill_(unet: nn.Module, group: CoupledGroup, units: list[int]) -> None:
    """Set these units' own weights to zero, on the way in and out."""
    for member in group.members:
        channels = torch.from_numpy(member.channels[np.isin(member.roots % group.units, units)])
        layer = unet.get_submodule(member.layer)
        for parameter in layer.parameters(recurse=False):
            if member.side == "out" and not isinstance(layer, nn.Embedding):
                parameter[channels] = 0
            elif parameter.dim() > 1:
                parameter[:, channels] = 0


def check_pruned(adapter: UNetAdapter, unet: nn.Module) -> None:
    """Raises CheckFailed unless the pruned UNet runs with outputs of the right shape."""
    for ratio in RATIOS:
        check_shapes(adapter, pruned(adapter, unet, ratio))


def check_reload(adapter: UNetAdapter, unet: nn.Module) -> None:
    """Raises CheckFailed unless the registered adapter is this one and a pruned UNet is loaded with difference 0."""
    try:
        registered = find_adapter(unet)
    except BadInput as error:
        raise CheckFailed(f"{adapter.model_class} is not registered: {error}") from None
    if registered != adapter:
        raise CheckFailed(f"{adapter.model_class}: another adapter is registered for {type(unet).__name__}")
    small, inputs = pruned(adapter, unet, RATIOS[-1]), adapter.flat_inputs(unet, 2)
    with tempfile.TemporaryDirectory() as folder:
        try:
            loaded = load(save(small, Path(folder) / "pruned"))
        except BadInput as error:
            raise CheckFailed(f"{adapter.model_class}: saved, but not loaded: {error}") from error
    compare(loaded, adapter, inputs, forward(small, adapter, inputs), "the reloaded model gives other outputs", 0.0)


def check_export(adapter: UNetAdapter, unet: nn.Module) -> None:
    """Raises CheckFailed unless the pruned UNet's ONNX file gives its outputs; MissingExtra without ONNX Runtime."""
    from diffprune_plugin.export import to_onnx, verify_onnx

    small = pruned(adapter, unet, RATIOS[-1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        to_onnx(small, path)
        result = verify_onnx(path, small, batches=(1, 2))
    if not result.passed:
        raise CheckFailed(f"{adapter.model_class}: the ONNX file misses: {result.worst}")


def pruned(adapter: UNetAdapter, unet: nn.Module, ratio: float) -> nn.Module:
    small = copy.deepcopy(unet)
    remove_(small, make_plan(small, "magnitude", pruning_ratio=ratio, adapter=adapter), adapter=adapter)
    return small


def forward(unet: nn.Module, adapter: UNetAdapter, inputs: Mapping[str, Tensor]) -> Tensor:
    output: Tensor = unet(**adapter.nested(inputs), return_dict=False)[0]
    return output


@torch.no_grad()
def compare(
    unet: nn.Module,
    adapter: UNetAdapter,
    inputs: Mapping[str, Tensor],
    expected: Tensor,
    words: str,
    relative: float = 1e-4,
) -> None:
    """Raises CheckFailed, in these words, if the UNet's output is not the expected one."""
    worst = float((forward(unet, adapter, inputs) - expected).abs().max())
    if worst > relative * float(expected.abs().max()):
        raise CheckFailed(f"{words}: {worst:.2g}")
