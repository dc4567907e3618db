"""Which timesteps count, and which of them a sample stands for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from diffprune_plugin.criteria.sweep import Sweep


def above_threshold(loss: npt.NDArray[np.float64], threshold: float) -> npt.NDArray[np.bool_]:
    """Which points of a loss curve count: L_t / L_max > threshold (Eq. 9-10 of arXiv 2305.10924).

    All of them at threshold 0; the largest always.
    """
    counts: npt.NDArray[np.bool_] = (loss / loss.max() > threshold) | (threshold == 0) | (loss == loss.max())
    return counts


def counts(
    losses: npt.NDArray[np.float64], sweep: Sweep, scale: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.bool_]:
    """Which points of the curve count, by their losses (points, samples), nan where the authors' loop had ended.

    ``scale``: what the threshold's loss is multiplied by, of each point, see `noise_form`; None for 1.
    """
    loss = losses.mean(axis=1) * (1 if scale is None else scale)
    if sweep.sampling == "stratified":
        return above_threshold(loss, sweep.threshold)
    largest = np.fmax.accumulate(loss)
    found: npt.NDArray[np.bool_] = ~np.isnan(loss) & ((loss >= sweep.threshold * largest) | sweep.include_last)
    return found


def counting(
    points: Sequence[npt.NDArray[np.int64]],
    losses: npt.NDArray[np.float64],
    sweep: Sweep,
    scale: npt.NDArray[np.float64] | None,
) -> npt.NDArray[np.int64]:
    """The timesteps of the points that count."""
    return np.concatenate([part for part, counted in zip(points, counts(losses, sweep, scale), strict=True) if counted])


def strata(num_train_timesteps: int, count: int) -> list[npt.NDArray[np.int64]]:
    """The timesteps 0 .. num_train_timesteps - 1 in ``count`` runs of nearly equal length."""
    return [part.astype(np.int64) for part in np.array_split(np.arange(num_train_timesteps), count)]


def share(timesteps: npt.NDArray[np.int64], index: int, count: int) -> npt.NDArray[np.int64]:
    """The timesteps that sample ``index`` of ``count`` stands for, when the samples are spread evenly over them."""
    first = len(timesteps) * index // count
    return timesteps[first : max(len(timesteps) * (index + 1) // count, first + 1)]
