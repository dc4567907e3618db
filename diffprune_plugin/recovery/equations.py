"""Ridge regression from rows that come in pieces: what is kept of them, the solution, the error on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

BLOCK = 512  # columns of a Gram matrix at a time: of its upper triangle only what is inside the blocks on the diagonal
SINGLE = 1e-5  # the weakest ridge that products in float32 are exact enough for
MARGIN = 16 * 2.0**-23  # what rounding to float32 moves an eigenvalue by, as a share of the largest, with room


def precision(strengths: Sequence[float]) -> torch.dtype:
    """What rows are multiplied in: float32, or float64 where a strength is so small that rounding would be seen."""
    return torch.float32 if min(strengths, default=1.0) >= SINGLE else torch.float64


class Training(Protocol):
    """Rows of features X and residuals R, and the ridge regression on them."""

    def add(self, features: Tensor, residuals: Tensor) -> None:
        """Take in rows: features (rows, unknowns), residuals (rows, outputs)."""

    def close(self) -> None:
        """No more rows will come."""

    def solve(self, strength: float) -> Tensor | None:
        """The D that minimises |R - X D|^2 + s |D|^2, in float64: (unknowns, outputs), and with a bias one more row.

        That row is what is added to X D; it is free. s is ``strength`` times the mean diagonal of X^T X: Eq. 3.44 of
        Hastie, Tibshirani, Friedman, ESL, 2nd edition. None if the system is singular.
        """


def training(rows: int, unknowns: int, outputs: int, bias: bool, like: Tensor) -> Training:
    """An empty one for so many rows, that multiplies in the dtype and on the device of ``like``."""
    if rows < unknowns:
        return FewRows(bias, like.dtype)
    return NormalEquations(unknowns, outputs, bias, like)


@dataclass
class NormalEquations:
    """Sums over rows of X^T X (its lower triangle) and X^T R, of rows less the means of the first piece.

    Products of a piece are in the dtype of ``like``, their sum over the pieces in float64.
    """

    unknowns: int
    outputs: int
    bias: bool
    like: Tensor
    rows: int = 0
    origin: Tensor = field(init=False)

    def __post_init__(self) -> None:
        sums: dict[str, Any] = {"dtype": torch.float64, "device": self.like.device}
        self.gram = torch.zeros(self.unknowns, self.unknowns, **sums)
        self.cross = torch.zeros(self.unknowns, self.outputs, **sums)
        self.sums = torch.zeros(self.unknowns, **sums)
        self.wanted = torch.zeros(self.outputs, **sums)

    def add(self, features: Tensor, residuals: Tensor) -> None:
        features, residuals = features.to(self.like.dtype), residuals.to(self.like.dtype)
        if not self.rows:
            self.origin = features.mean(0)
        features = features - self.origin
        self.rows += len(features)
        for first in range(0, self.unknowns, BLOCK):
            end = first + BLOCK
            self.gram[first:, first:end] += features[:, first:].T @ features[:, first:end]
        self.cross += features.T @ residuals
        self.sums += features.sum(0)
        self.wanted += residuals.sum(0)

    def close(self) -> None:
        origin = self.origin.double()
        self.means = origin + self.sums / self.rows, self.wanted / self.rows
        self.unit = float((self.gram.diagonal() + 2 * origin * self.sums + self.rows * origin.square()).mean())
        if self.bias:  # which takes over the means
            self.gram.addr_(self.sums, self.sums, alpha=-1 / self.rows)
            self.cross.addr_(self.sums, self.wanted, alpha=-1 / self.rows)
        else:
            self.gram.addr_(origin, self.sums).addr_(self.sums + self.rows * origin, origin)
            self.cross.addr_(origin, self.wanted)
        self.size = norm_of_lower(self.gram)

    def solve(self, strength: float) -> Tensor | None:
        update = solved(self.gram, strength * self.unit, self.cross, self.size, self.like.dtype)
        return with_bias(update, self.means) if self.bias else update


@dataclass
class FewRows:
    """Fewer rows than unknowns: D = X^T (X X^T + s)^-1 R is the same solution, and of a smaller system."""

    bias: bool
    dtype: torch.dtype
    features: list[Tensor] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)

    def add(self, features: Tensor, residuals: Tensor) -> None:
        self.features.append(features.to(self.dtype))
        self.residuals.append(residuals.double())

    def close(self) -> None:
        self.x, self.r = torch.cat(self.features), torch.cat(self.residuals)
        self.features, self.residuals = [], []
        self.unit = float(self.x.square().sum(dtype=torch.float64)) / self.x.shape[1]
        if self.bias:
            self.means = self.x.mean(0, dtype=torch.float64), self.r.mean(0)
            self.x -= self.means[0].to(self.dtype)
            self.r -= self.means[1]
        self.gram = (self.x @ self.x.T).double()
        self.size = norm_of_lower(self.gram)

    def solve(self, strength: float) -> Tensor | None:
        weights = solved(self.gram, strength * self.unit, self.r, self.size, self.dtype)
        update = None if weights is None else (self.x.T @ weights.to(self.dtype)).double()
        return with_bias(update, self.means) if self.bias else update


def norm_of_lower(gram: Tensor) -> float:
    """The Frobenius norm of the symmetric matrix that has this lower triangle: no eigenvalue is above it."""
    total = 0.0
    for first in range(0, len(gram), BLOCK):
        square, below = gram[first : first + BLOCK, first : first + BLOCK], gram[first + BLOCK :, first : first + BLOCK]
        total += float(square.norm()) ** 2 + 2 * float(below.norm()) ** 2
    return math.sqrt(total)


def solved(gram: Tensor, shift: float, right: Tensor, size: float, dtype: torch.dtype) -> Tensor | None:
    """(gram + shift)^-1 right in float64; factorised in float32 where the shift is far above its rounding."""
    wide = dtype == torch.float64 or shift < MARGIN * size
    system = gram.to(torch.float64 if wide else dtype, copy=True)
    system.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(system)
    return None if int(failed) else torch.cholesky_solve(right.to(system.dtype), factor).double()


def with_bias(update: Tensor | None, means: tuple[Tensor, Tensor]) -> Tensor | None:
    """An update of centred rows, with the row that takes the means of features and residuals to each other."""
    return None if update is None else torch.cat([update, (means[1] - means[0] @ update)[None]])


@dataclass
class HeldOut:
    """The rows that no solution sees, as they are; ``gains``: what the product is multiplied with on its way."""

    dtype: torch.dtype
    rows: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    def add(self, features: Tensor, residuals: Tensor, gains: Tensor | None = None) -> None:
        self.rows.append((features.to(self.dtype), residuals.to(self.dtype), gains))

    def error(self, update: Tensor | None = None) -> float:
        """|R - G * (X D)|^2 summed over the rows; for D = 0 without an update."""
        total = 0.0
        moved = None if update is None else update.to(self.dtype)
        for features, residuals, gains in self.rows:
            if moved is not None:
                unknowns = features.shape[1]
                product = torch.addmm(moved[unknowns:].sum(0), features, moved[:unknowns])
                residuals = residuals - (product if gains is None else product * gains.to(product))
            total += float(residuals.square().sum())
        return total


def best_update(
    training: Training,
    held_out: HeldOut,
    strengths: Sequence[float],
    written: Callable[[Tensor], Tensor] = lambda update: update,
) -> tuple[Tensor | None, float, float]:
    """(update, strength, held-out error) of the best strength; no update, and 0, unless one lowers the error.

    The error is that of the update as it is ``written``. From the middle of the strengths it goes on to the next one
    while that is better: along them the error falls, then rises.
    """
    grid = sorted(strengths)
    best: tuple[Tensor | None, float, float] = (None, 0.0, held_out.error())
    errors: dict[int, float] = {}
    place, untried = len(grid) // 2, [len(grid) // 2][: len(grid)]
    while untried:
        at = untried[0]
        update = training.solve(grid[at])
        errors[at] = float("inf") if update is None else held_out.error(written(update))
        if errors[at] < best[2]:
            best = (update, grid[at], errors[at])
        place = at if errors[at] < errors[place] else place
        untried = [i for i in (place - 1, place + 1) if 0 <= i < len(grid) and i not in errors]
    return best
