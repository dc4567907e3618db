"""What a criterion gives for a coupled group, checked before anything is decided by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffprune_plugin.adapters.state import not_loaded
from diffprune_plugin.errors import CheckFailed, DiffPruneError, first_line
from diffprune_plugin.graph.groups import CoupledGroup
from diffprune_plugin.hookspecs import Criterion

Scores = npt.NDArray[np.float64]


def unit_scores(group: CoupledGroup, criterion: Criterion) -> Scores:
    """Score of each unit, shape (units,): the criterion's score of its channels, summed over paired halves.

    Raises CheckFailed as `channel_scores` does.
    """
    score = channel_scores(criterion, group.graph_group)
    folded: Scores = score.numpy().reshape(group.pairs, group.units).sum(0)
    return folded


def channel_scores(criterion: Criterion, group: Any) -> Tensor:
    """The criterion's score of each channel of a torch-pruning group, shape (channels,), float64.

    Raises CheckFailed, which names the criterion, where it fails or gives anything but finite real numbers >= 0;
    BadInput for one that reads weights which are not loaded.
    """
    root, count = group._DG._module2name[group[0].dep.target.module], len(group[0].idxs)
    try:
        score: Any = criterion(group)
    except DiffPruneError:
        raise
    except Exception as error:  # of a plugin
        raise CheckFailed(
            f"{name_of(criterion)} failed on {root}: {type(error).__name__}: {first_line(error)}"
        ) from error
    if score is not None and not isinstance(score, Tensor):
        raise CheckFailed(f"{name_of(criterion)} scored {root} with a {type(score).__name__}, not a tensor ({count},)")
    if score is None or tuple(score.shape) != (count,):
        shape = None if score is None else tuple(score.shape)
        raise CheckFailed(f"{name_of(criterion)} scored {root} with shape {shape}, not ({count},)")
    if score.is_meta:
        raise not_loaded(root)
    if score.is_complex() or not bool(torch.isfinite(score).all()) or bool((score < 0).any()):
        raise CheckFailed(f"{name_of(criterion)} gave {root} a score that is complex, negative or not finite")
    return score.detach().double().cpu()


def name_of(criterion: Criterion) -> str:
    """The criterion's class or function with its module, which tells the plugin."""
    kind = criterion if hasattr(criterion, "__qualname__") else type(criterion)
    return f"{kind.__module__}.{kind.__qualname__}"
