"""Scores from the weights alone: filter norms, and none at all (random)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from diffprune_plugin.criteria.sweep import check_option
from diffprune_plugin.errors import BadInput, nearest


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


class FilterImportance(tp.importance.Importance):  # type: ignore[misc]
    """NNCF 2's score of a coupled group: the norms of its filters, added up over the layers that produce the channels.

    norm: ``L2``, ``L1``, or ``geometric_median``, the sum of a filter's distances to the layer's others. normalize:
    each weight is divided by its L2 norm first, as NNCF does to rank all groups together (``all_weights``).
    """

    def __init__(self, norm: str = "L2", normalize: bool = False) -> None:
        check_option("normalize", normalize, bool)
        if norm not in FILTER_NORMS:
            hint = nearest(str(norm), FILTER_NORMS)
            raise BadInput(f"importance: norm {norm!r} is none of {', '.join(FILTER_NORMS)}{hint}")
        self.norm, self.normalize = norm, normalize

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Score of each root channel of a torch-pruning group, shape (channels,), >= 0."""
        return summed(group, lambda dep: self._filter_scores(dep, group))

    def _filter_scores(self, dep: Any, group: Any) -> Tensor | None:
        layer = dep.target.module
        produces = isinstance(layer, (nn.Conv2d, nn.Linear)) and group._DG.is_out_channel_pruning_fn(dep.handler)
        if not produces:
            return None
        filters = layer.weight.detach().float().flatten(1)
        return FILTER_NORMS[self.norm](filters / filters.norm().clamp_min(1e-12) if self.normalize else filters)


FILTER_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "L2": lambda filters: filters.norm(dim=1),
    "L1": lambda filters: filters.abs().sum(1),
    "geometric_median": lambda filters: torch.cdist(filters, filters).sum(1),
}


class RandomImportance(tp.importance.Importance):  # type: ignore[misc]
    """Uniform scores that depend on the seed and the root layer's name only, not on the order of the groups."""

    def __init__(self, seed: int = 0) -> None:
        check_option("seed", seed, int)
        self.seed = seed

    def __call__(self, group: Any) -> Tensor:
        """Scores in [0, 1), shape (channels,)."""
        dep, channels = group[0]
        name = group._DG._module2name[dep.target.module]
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.rand(len(channels), generator=generator)


def magnitude(p: int = 2) -> Any:
    """torch-pruning's group magnitude: |w| ** p summed over a layer's weights, the mean over the coupled layers."""
    check_option("p", p, int)
    return tp.importance.GroupMagnitudeImportance(p=p)
