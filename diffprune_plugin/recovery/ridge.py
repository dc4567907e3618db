"""Ridge regression of layer outputs on layer inputs: rows of both, the normal equations, their solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffprune_plugin.errors import CheckFailed

ROWS = 32_768  # rows that a system is fitted on, or eight times its unknowns
CHUNK = 4_096  # rows in float64 at a time


def refusal(layer: nn.Module, output: Tensor) -> str:
    """Why a layer, which gave ``output``, is not a matrix times rows of its input as laid out here; empty if it is."""
    if isinstance(layer, nn.Linear):
        return "" if output.ndim < 4 else f"a linear layer on {output.ndim - 1} axes"
    if not isinstance(layer, nn.Conv2d):
        return f"a {type(layer).__name__}"
    if layer.groups != 1:
        return f"{layer.groups} convolution groups"
    return "" if layer.padding_mode == "zeros" and not isinstance(layer.padding, str) else f"padding {layer.padding}"


def by_position(tensor: Tensor) -> Tensor:
    """Activations (batch, channels, height, width) or (batch, ..., channels) as a view (batch, positions, channels)."""
    if tensor.ndim == 4:
        return tensor.flatten(2).transpose(1, 2)
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def rows_at(tensor: Tensor, positions: Tensor) -> Tensor:
    """The channels at some positions of each sample: (batch * n, channels) for positions (batch, n)."""
    samples = torch.arange(len(tensor), device=tensor.device)[:, None]
    return by_position(tensor)[samples, positions].flatten(0, 1)


def features_at(layer: nn.Module, inputs: Tensor, positions: Tensor) -> Tensor:
    """The inputs that a layer multiplies with its weights at some output positions (batch, n): (batch * n, unknowns).

    For a convolution the patches in the order of ``weight.flatten(1)``, as F.unfold gives them, but only these.
    """
    if not isinstance(layer, nn.Conv2d):
        return rows_at(inputs, positions)
    (high, wide), (down, right) = layer.kernel_size, layer.dilation
    vertical, horizontal = (int(side) for side in layer.padding)
    padded = F.pad(inputs, (horizontal, horizontal, vertical, vertical))
    width = padded.shape[-1]
    columns = (width - right * (wide - 1) - 1) // layer.stride[1] + 1
    corner = positions // columns * layer.stride[0] * width + positions % columns * layer.stride[1]
    rows, steps = torch.arange(high, device=inputs.device), torch.arange(wide, device=inputs.device)
    taps = (rows[:, None] * down * width + steps * right).flatten()
    patches = rows_at(padded, (corner[..., None] + taps).flatten(1))
    return patches.reshape(-1, len(taps), patches.shape[1]).transpose(1, 2).flatten(1)


class NormalEquations:
    """Sums over rows of X^T X, X^T R and |R|^2 in float64; with a ``bias`` X has a last column of ones."""

    def __init__(self, unknowns: int, outputs: int, bias: bool, device: torch.device) -> None:
        self.unknowns, self.bias = unknowns, bias
        columns = unknowns + bias
        self.gram = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self.cross = torch.zeros(columns, outputs, dtype=torch.float64, device=device)
        self.square = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, features: Tensor, residuals: Tensor) -> None:
        """Take in rows: features (rows, unknowns), residuals (rows, outputs)."""
        wide = F.pad(features.double(), (0, int(self.bias)), value=1.0)
        residuals = residuals.double()
        self.gram.addmm_(wide.T, wide)
        self.cross.addmm_(wide.T, residuals)
        self.square += residuals.square().sum()

    def solve(self, strength: float) -> Tensor | None:
        """The D (columns, outputs) that minimises |R - X D|^2 + s |D|^2, the bias row free; None if singular.

        s is ``strength`` times the mean diagonal of X^T X: Eq. 3.44 of Hastie, Tibshirani, Friedman, ESL, 2nd edition.
        """
        system = self.gram.clone()
        diagonal = system.diagonal()[: self.unknowns]
        diagonal += strength * diagonal.mean()
        factor, failed = torch.linalg.cholesky_ex(system)
        return None if int(failed) else torch.cholesky_solve(self.cross, factor)

    def error(self, update: Tensor | None = None) -> float:
        """|R - X D|^2 summed over the rows; for D = 0 without an update."""
        if update is None:
            return float(self.square)
        return float(self.square - 2 * (update * self.cross).sum() + (update * (self.gram @ update)).sum())


def best_update(
    training: NormalEquations,
    held_out: NormalEquations,
    strengths: Sequence[float],
    written: Callable[[Tensor], Tensor] = lambda update: update,
) -> tuple[Tensor | None, float, float]:
    """(update, strength, held-out error) of the best strength; no update, and 0, unless one lowers the error.

    The error is that of the update as it is ``written``.
    """
    best: tuple[Tensor | None, float, float] = (None, 0.0, held_out.error())
    for strength in strengths:
        update = training.solve(strength)
        if update is not None and (error := held_out.error(written(update))) < best[2]:
            best = (update, strength, error)
    return best


@dataclass(frozen=True)
class Repair:
    """One ridge regression: which layers it refits, to which module's output, and what that brought.

    before, after: squared error of the kept channels against the dense UNet's, on held-out images, as a share of the
        variance of the dense ones; equal where nothing on the grid helped, and then the layers keep their weights.
    strength: of the ridge, as a share of the mean diagonal of the Gram matrix; 0 where the weights were kept.
    """

    layers: tuple[str, ...]
    block: str
    unknowns: int
    rows: int
    before: float
    after: float
    strength: float

    @property
    def refitted(self) -> bool:
        return self.after < self.before


@dataclass(frozen=True)
class Part:
    """Input channels first .. last - 1 of a layer."""

    name: str
    layer: Any
    first: int
    last: int

    def weight(self) -> Tensor:
        """The part of the layer's weight: (outputs, channels, ...), a view."""
        return torch.as_tensor(self.layer.weight)[:, self.first : self.last]


@dataclass
class System:
    """One ridge regression: the parts of layers whose sum, times ``coupling``, goes into the output of ``block``.

    The target is the dense block's output at the ``kept`` channels, times ``factor``: (samples, positions, channels).
    """

    block: str
    parts: list[Part]
    kept: Tensor
    coupling: float
    factor: float
    positions: Tensor = field(default_factory=lambda: torch.empty(0))
    targets: Tensor = field(default_factory=lambda: torch.empty(0))
    inputs: dict[str, Tensor] = field(default_factory=dict)
    equations: tuple[NormalEquations, NormalEquations] | None = None

    @property
    def unknowns(self) -> int:
        return sum(part.weight()[0].numel() for part in self.parts)

    @property
    def biases(self) -> list[Tensor]:
        return [part.layer.bias for part in self.parts if part.layer.bias is not None]

    def keep_target(self, output: Tensor, batch: slice, samples: int, seed: int) -> None:
        """Take the dense block's output for a batch of samples, at random positions of each."""
        if not len(self.positions):
            total = by_position(output).shape[1]
            count = min(total, -(-max(ROWS, 8 * self.unknowns) // samples))
            order = torch.rand((samples, total), generator=torch.Generator().manual_seed(seed)).argsort(1)
            self.positions = order[:, :count].to(output.device)
            self.targets = output.new_empty((samples, count, len(self.kept)), dtype=torch.float32)
        rows = rows_at(output, self.positions[batch])[:, self.kept].float() * self.factor
        self.targets[batch] = rows.reshape(self.targets[batch].shape)

    def collect(self, output: Tensor, batch: slice, held_out: Tensor) -> None:
        """Add what is left to explain of the target, and the layers' inputs, to the normal equations.

        Raises CheckFailed where either UNet's activations are not finite.
        """
        positions, wanted = self.positions[batch], self.targets[batch].flatten(0, 1)
        residuals = (wanted - rows_at(output, positions).float()) / self.coupling
        if not bool(torch.isfinite(residuals).all()):
            which = "pruned" if bool(torch.isfinite(wanted).all()) else "dense"
            raise CheckFailed(
                f"compensate: the {which} UNet's output of {self.block} is not finite; check its weights and the images"
            )
        if self.equations is None:
            sizes = (self.unknowns, residuals.shape[1], bool(self.biases), residuals.device)
            self.equations = NormalEquations(*sizes), NormalEquations(*sizes)
        count = positions.shape[1]
        step = max(1, CHUNK // count)
        for first in range(0, len(positions), step):
            some = slice(first, first + step)
            features = torch.cat([self.features(part, some, positions) for part in self.parts], 1)
            rows = residuals[first * count : (first + step) * count]
            out = held_out[batch][some].repeat_interleave(count)
            for equations, chosen in zip(self.equations, (~out, out), strict=True):
                equations.add(features[chosen], rows[chosen])
        self.inputs.clear()

    def features(self, part: Part, some: slice, positions: Tensor) -> Tensor:
        inputs = self.inputs[part.name][some]
        inputs = inputs[:, part.first : part.last] if inputs.ndim == 4 else inputs[..., part.first : part.last]
        return features_at(part.layer, inputs, positions[some])

    def solve(self, strengths: Sequence[float], held_out: Tensor) -> Repair:
        """Solve, and update the layers if that lowers the held-out error."""
        assert self.equations is not None
        wanted = self.targets[held_out].flatten(0, 1).double() / self.coupling
        spread = max(float((wanted - wanted.mean(0)).square().sum()), 1e-30)
        before = self.equations[1].error()
        update, strength, after = best_update(*self.equations, strengths, self.written)
        rows = self.positions.numel()
        if update is not None:
            self.apply_(update)
        self.equations, self.targets, self.positions = None, torch.empty(0), torch.empty(0)
        names = tuple(part.name for part in self.parts)
        return Repair(names, self.block, self.unknowns, rows, before / spread, after / spread, strength)

    def pieces(self, update: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The weights, and one bias if there is any, each with its share of an update (unknowns and bias, outputs)."""
        weights = [part.weight() for part in self.parts]
        shares = torch.split(update[: self.unknowns], [weight[0].numel() for weight in weights])
        found = [(weight, share.T.reshape(weight.shape)) for weight, share in zip(weights, shares, strict=True)]
        return [*found, *((bias, update[-1]) for bias in self.biases[:1])]

    def written(self, update: Tensor) -> Tensor:
        """The update as the layers' dtype takes it up: half precision rounds what is added."""
        if self.parts[0].weight().element_size() >= 4:
            return update
        moved = [(tensor + share.to(tensor)).double() - tensor.double() for tensor, share in self.pieces(update)]
        return torch.cat([change.flatten(1).T if change.ndim > 1 else change[None] for change in moved]).to(update)

    def apply_(self, update: Tensor) -> None:
        """Add an update to the layers."""
        for tensor, share in self.pieces(update):
            tensor.add_(share.to(tensor))
