"""The ridge regression of a compensation done plainly: float64 throughout, whole Gram matrices, every strength.

What `diffprune_plugin.recovery.equations` is compared with, in its test and in the benchmark of what it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class PlainSums:
    """Sums over rows of X^T X, X^T R and |R|^2 in float64; with a ``bias`` X has a last column of ones."""

    def __init__(self, unknowns: int, outputs: int, bias: bool) -> None:
        self.unknowns, self.bias, columns = unknowns, bias, unknowns + bias
        self.gram = torch.zeros(columns, columns, dtype=torch.float64)
        self.cross = torch.zeros(columns, outputs, dtype=torch.float64)
        self.square = torch.zeros((), dtype=torch.float64)

    def add(self, features: Tensor, residuals: Tensor) -> None:
        wide, residuals = F.pad(features.double(), (0, int(self.bias)), value=1.0), residuals.double()
        self.gram.addmm_(wide.T, wide)
        self.cross.addmm_(wide.T, residuals)
        self.square += residuals.square().sum()

    def close(self) -> None:
        pass

    def solve(self, strength: float) -> Tensor | None:
        system = self.gram.clone()
        diagonal = system.diagonal()[: self.unknowns]
        diagonal += strength * diagonal.mean()
        factor, failed = torch.linalg.cholesky_ex(system)
        return None if int(failed) else torch.cholesky_solve(self.cross, factor)

    def error(self, update: Tensor | None = None) -> float:
        if update is None:
            return float(self.square)
        return float(self.square - 2 * (update * self.cross).sum() + (update * (self.gram @ update)).sum())


class PlainHeldOut:
    """The sums of the held-out rows, whose sizes come with the first of them; whether with a bias, with an update."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.sums: PlainSums | None = None

    def add(self, features: Tensor, residuals: Tensor) -> None:
        self.sums = self.sums or PlainSums(features.shape[1], residuals.shape[1], bias=True)
        self.sums.add(features, residuals)

    def error(self, update: Tensor | None = None) -> float:
        assert self.sums is not None
        return self.sums.error(None if update is None else F.pad(update, (0, 0, 0, len(self.sums.gram) - len(update))))


def plain_training(rows: int, unknowns: int, outputs: int, bias: bool, like: Tensor) -> PlainSums:
    return PlainSums(unknowns, outputs, bias)


def plain_best_update(
    training: Any,
    held_out: Any,
    strengths: Sequence[float],
    written: Callable[[Tensor], Tensor] = lambda update: update,
) -> tuple[Tensor | None, float, float]:
    """(update, strength, held-out error) of the best of all strengths; no update and 0 unless one lowers the error."""
    best: tuple[Tensor | None, float, float] = (None, 0.0, held_out.error())
    for strength in strengths:
        update = training.solve(strength)
        if update is not None and (error := held_out.error(written(update))) < best[2]:
            best = (update, strength, error)
    return best


PLAIN = {"training": plain_training, "HeldOut": PlainHeldOut, "best_update": plain_best_update}  # names in ridge.py
