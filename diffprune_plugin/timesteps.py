"""Which timesteps count: what a criterion wants calibrated, and the rule of the loss threshold."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from diffprune_plugin.errors import BadInput, nearest

Sampling = Literal["stratified", "reference", "fresh"]
CONDITION_DROPOUT = 0.1  # what text-conditional models are trained with for classifier-free guidance
SAMPLINGS: tuple[Sampling, ...] = ("stratified", "reference", "fresh")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a criterion wants calibrated.

    threshold: a timestep counts if its loss is above this share of the largest loss (T of arXiv 2305.10924); 0 keeps
        all of them.
    sampling: ``stratified`` measures the loss curve first and then takes gradients of batches that mix the timesteps
        that count, with images and noise drawn anew for each sample. ``reference`` is the authors' loop: one batch and
        one noise tensor at every timestep from 0 on, until the loss falls below the threshold. ``fresh`` is the same
        loop with a new batch and new noise at each timestep (their latent model).
    include_last: whether the timestep that ends the authors' loop still counts.
    samples: gradient samples of the stratified sampling.
    curve_samples: samples for each point of its loss curve.
    condition_dropout: share of the samples that are taken without their condition, as classifier-free guidance is
        trained and sampled; by default 0.1 where the data knows what stands for no condition, else 0.
    """

    threshold: float = 0.05
    sampling: Sampling = "stratified"
    include_last: bool = False
    samples: int = 1024
    curve_samples: int = 16
    condition_dropout: float | None = None

    def __post_init__(self) -> None:
        for key, expected in (("threshold", float), ("include_last", bool), ("samples", int), ("curve_samples", int)):
            check_option(key, getattr(self, key), expected)
        if self.condition_dropout is not None:
            check_option("condition_dropout", self.condition_dropout, float)
            if not 0 <= self.condition_dropout <= 1:
                raise BadInput(f"importance: condition_dropout {self.condition_dropout} is outside [0, 1]")
        if not 0 <= self.threshold <= 1:
            raise BadInput(f"importance: threshold {self.threshold} is outside [0, 1]; useful values are 0.01 to 0.1")
        if self.sampling not in SAMPLINGS:
            hint = nearest(str(self.sampling), SAMPLINGS)
            raise BadInput(f"importance: sampling {self.sampling!r} is none of {', '.join(SAMPLINGS)}{hint}")
        for key in ("samples", "curve_samples"):
            if getattr(self, key) < 1:
                raise BadInput(f"importance: {key} {getattr(self, key)} is below 1")

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_option(key: str, value: Any, expected: type) -> None:
    """Raises BadInput unless an option has the type it needs; a whole number is a float too, a truth value neither."""
    fits = isinstance(value, (int, float) if expected is float else expected)
    if not fits or (isinstance(value, bool) and expected is not bool):
        raise BadInput(f"importance: {key} {value!r} is no {expected.__name__}")


def above_threshold(loss: npt.NDArray[np.float64], threshold: float) -> npt.NDArray[np.bool_]:
    """Which points of a loss curve count: L_t / L_max > threshold (Eq. 9-10 of arXiv 2305.10924).

    All of them at threshold 0; the largest always.
    """
    counts: npt.NDArray[np.bool_] = (loss / loss.max() > threshold) | (threshold == 0) | (loss == loss.max())
    return counts


def strata(num_train_timesteps: int, count: int) -> list[npt.NDArray[np.int64]]:
    """The timesteps 0 .. num_train_timesteps - 1 in ``count`` runs of nearly equal length."""
    return [part.astype(np.int64) for part in np.array_split(np.arange(num_train_timesteps), count)]


def share(timesteps: npt.NDArray[np.int64], index: int, count: int) -> npt.NDArray[np.int64]:
    """The timesteps that sample ``index`` of ``count`` stands for, when the samples are spread evenly over them."""
    first = len(timesteps) * index // count
    return timesteps[first : max(len(timesteps) * (index + 1) // count, first + 1)]
