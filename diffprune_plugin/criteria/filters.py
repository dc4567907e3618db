"""Scores from the weights alone: filter norms, magnitude, and none at all (random); computed in `scores`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffprune_plugin.criteria.sweep import check_option
from diffprune_plugin.errors import BadInput, nearest

if TYPE_CHECKING:
    from torch import Tensor

NORMS = ("L2", "L1", "geometric_median")


class FilterImportance:
    """NNCF 2's score of a coupled group: the norms of its filters, added up over the layers that produce the channels.

    norm: ``L2``, ``L1``, or ``geometric_median``, the sum of a filter's distances to the layer's others. normalize:
    each weight is divided by its L2 norm first, as NNCF does to rank all groups together (``all_weights``).
    """

    def __init__(self, norm: str = "L2", normalize: bool = False) -> None:
        check_option("normalize", normalize, bool)
        if norm not in NORMS:
            raise BadInput(f"importance: norm {norm!r} is none of {', '.join(NORMS)}{nearest(str(norm), NORMS)}")
        self.norm, self.normalize = norm, normalize

    def __call__(self, group: Any) -> Tensor | None:
        """Score of each root channel of a torch-pruning group, shape (channels,), >= 0."""
        from diffprune_plugin.criteria.scores import filter_score

        return filter_score(group, self.norm, self.normalize)


class RandomImportance:
    """Uniform scores that depend on the seed and the root layer's name only, not on the order of the groups."""

    def __init__(self, seed: int = 0) -> None:
        check_option("seed", seed, int, 0, 2**63 - 1)
        self.seed = seed

    def __call__(self, group: Any) -> Tensor:
        """Scores in [0, 1), shape (channels,)."""
        from diffprune_plugin.criteria.scores import random_score

        return random_score(group, self.seed)


class GroupMagnitudeImportance:
    """torch-pruning's group magnitude: |w| ** p summed over a layer's weights, the mean over the coupled layers.

    Attributes that are set on it (``normalizer``, ``group_reduction`` ...) are arguments of torch-pruning's own.
    """

    def __init__(self, p: int = 2) -> None:
        check_option("p", p, int, 1, 10)
        self.p = p

    def __call__(self, group: Any) -> Tensor | None:
        """Score of each root channel of a torch-pruning group, shape (channels,), >= 0."""
        from diffprune_plugin.criteria.scores import magnitude_score

        wishes = ("round_to", "halves")  # of whoever plans with it
        return magnitude_score(group, **{key: value for key, value in vars(self).items() if key not in wishes})
