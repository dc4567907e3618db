"""What the built-in criteria compute; imported with the first score, so that naming a criterion needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from diffprune_plugin.criteria.sweep import POWERS
from diffprune_plugin.errors import BadInput, MissingGradients

if TYPE_CHECKING:
    from diffprune_plugin.criteria.taylor import TaylorImportance


def summed(group: Any, channel_scores: Callable[[Any], Tensor | None]) -> Tensor | None:
    """The scores of the layers of a torch-pruning group added up by root channel; None if no layer has any."""
    position = {channel: i for i, channel in enumerate(group[0].idxs)}
    score: Tensor | None = None
    for item in group.items:
        scores = channel_scores(item.dep)
        if scores is None or any(root is None for root in item.root_idxs):
            continue
        if score is None:
            score = torch.zeros(len(position), dtype=scores.dtype, device=scores.device)
        rows = torch.tensor([position[root] for root in item.root_idxs], device=scores.device)
        score.index_add_(0, rows, scores[torch.as_tensor(item.idxs, device=scores.device)])
    return score


@torch.no_grad()
def taylor_score(criterion: TaylorImportance, group: Any) -> Tensor | None:
    """`TaylorImportance` of each root channel, shape (channels,), >= 0; None if nothing in the group counts."""
    score = summed(group, lambda dep: taylor_channels(criterion, dep, group))
    if score is None or criterion.normalizer is None:
        return score
    return score / score.mean().clamp_min(torch.finfo(score.dtype).tiny)


def taylor_channels(criterion: TaylorImportance, dep: Any, group: Any) -> Tensor | None:
    """`saliency` summed over all weights of each channel on the pruned side of one layer."""
    layer = dep.target.module
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        axis = 0 if group._DG.is_out_channel_pruning_fn(dep.handler) else 1
        return saliency(criterion, layer, "weight", group).transpose(0, axis).flatten(1).sum(1)
    if criterion.norms and isinstance(layer, (nn.GroupNorm, nn.LayerNorm)) and layer.weight is not None:
        score = saliency(criterion, layer, "weight", group)
        return score if layer.bias is None else score + saliency(criterion, layer, "bias", group)
    return None


def saliency(criterion: TaylorImportance, layer: nn.Module, name: str, group: Any) -> Tensor:
    """|w g| ** power of each weight, or |w| ** p G where the calibration holds the sums G of |g| ** p."""
    weight: nn.Parameter = getattr(layer, name)
    where = f"{group._DG._module2name[layer]}.{name}"
    accumulate = criterion.sweep.accumulate
    own = weight.grad if accumulate == "sum" else None  # a sum of powers is not what autograd leaves in .grad
    gradient = own if criterion.calibration is None else criterion.calibration.gradients.get(where)
    if gradient is None:
        raise MissingGradients(f"{where} has no gradient; pass importance(..., calibration=calibrate(...))")
    if gradient.shape != weight.shape:
        raise MissingGradients(
            f"{where} is {tuple(weight.shape)} but was calibrated as {tuple(gradient.shape)}; calibrate again "
            "after each removal"
        )
    size, slope = weight.detach().float().abs(), gradient.to(weight.device).float().abs()
    return (size * slope) ** criterion.power if accumulate == "sum" else size ** POWERS[accumulate] * slope


@torch.no_grad()
def filter_score(group: Any, norm: str, normalize: bool) -> Tensor | None:
    """`FilterImportance` of each root channel, shape (channels,), >= 0."""

    def of_layer(dep: Any) -> Tensor | None:
        layer = dep.target.module
        produces = isinstance(layer, (nn.Conv2d, nn.Linear)) and group._DG.is_out_channel_pruning_fn(dep.handler)
        if not produces:
            return None
        filters = layer.weight.detach().float().flatten(1)
        return FILTER_NORMS[norm](filters / filters.norm().clamp_min(1e-12) if normalize else filters)

    return summed(group, of_layer)


FILTER_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "L2": lambda filters: filters.norm(dim=1),
    "L1": lambda filters: filters.abs().sum(1),
    "geometric_median": lambda filters: torch.cdist(filters, filters).sum(1),
}


def random_score(group: Any, seed: int) -> Tensor:
    """Uniform scores in [0, 1) of each root channel, shape (channels,)."""
    dep, channels = group[0]
    name = group._DG._module2name[dep.target.module]
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(len(channels), generator=generator)


def stored_score(group: Any, scores: Mapping[str, Sequence[float]]) -> Tensor:
    """What was measured of the units of the root layer, shared out among each one's channels, shape (channels,).

    Raises BadInput where it was measured of another model.
    """
    root, channels = group._DG._module2name[group[0].dep.target.module], len(group[0].idxs)
    of_units = scores.get(root, ())
    if not of_units or channels % len(of_units):
        raise BadInput(
            f"importance: the sensitivity has {len(of_units)} scores for {root} with {channels} channels; measure it "
            "with this model"
        )
    halves = channels // len(of_units)
    return torch.tensor(of_units, dtype=torch.float64).repeat(halves) / halves


def magnitude_score(group: Any, **options: Any) -> Tensor | None:
    """torch-pruning's own with these options, of each root channel, shape (channels,), >= 0."""
    score: Tensor | None = tp.importance.GroupMagnitudeImportance(**options)(group)
    return score
