"""Ridge regression of layer outputs on layer inputs: the rows of both, and the layers that the solution moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffprune_plugin.errors import CheckFailed
from diffprune_plugin.recovery.equations import HeldOut, Training, best_update, precision, training
from diffprune_plugin.utils.exact import exact_float32

ROWS = 32_768  # rows that a system is fitted on, or eight times its unknowns
CHUNK = 2**25  # numbers in the rows that are taken at a time
CLOSED = 1e-3  # of a row's mean squared gate: what a channel's own has to be above, to be asked for much


def refusal(layer: nn.Module, output: Tensor) -> str:
    """Why a layer, which gave ``output`` of one sample, is not a matrix times rows of its input as laid out here; empty
    if it is."""
    if len(output) != 1:  # PixArt's embedders of height and width take both as one batch
        return f"run on {len(output)} values of a sample as if they were samples"
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
    return by_position(tensor).contiguous()[samples, positions].flatten(0, 1)


def features_at(layer: nn.Module, inputs: Tensor, positions: Tensor) -> Tensor:
    """The inputs that a layer multiplies with its weights at some output positions (batch, n): (batch * n, unknowns).

    For a convolution the patches, in the order of `matrix_of`.
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
    return rows_at(padded, (corner[..., None] + taps).flatten(1)).reshape(corner.numel(), -1)


def matrix_of(weight: Tensor) -> Tensor:
    """A weight (outputs, channels, ...) as what features are multiplied with: (unknowns, outputs), channels fastest."""
    return weight.reshape(*weight.shape[:2], -1).permute(2, 1, 0).flatten(0, 1)


def weight_of(matrix: Tensor, like: Tensor) -> Tensor:
    """The weight that a matrix of `matrix_of` is of, in the shape of ``like``."""
    return matrix.reshape(-1, like.shape[1], len(like)).permute(2, 1, 0).reshape(like.shape)


def let_through(rows: Tensor, left: Tensor, gate: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Rows of features, with one for a bias behind, and of residuals (samples, positions, channels) as a gate (samples,
    1, channels) lets them through: see `System`."""
    weight = gate.square().mean(2, keepdim=True).sqrt()
    wanted = weight * left * gate / (gate.square() + CLOSED * weight.square() + 1e-30)
    weights = weight.expand(-1, left.shape[1], -1).flatten(0, 1)
    features = torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if bias else rows
    return features * weights, wanted.flatten(0, 1)


@dataclass(frozen=True)
class Repair:
    """One ridge regression: which layers it refits, to which module's output, and what that brought.

    before, after: squared error of the kept channels against the dense UNet's, on held-out images, as a share of the
        variance of the dense ones (of their square where all are the same); equal where nothing on the grid helped,
        and then the layers keep their weights.
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

    The target is the dense block's output at the ``kept`` channels, times ``factor``: (samples, positions, channels);
    ``source``: the dense module that gives it, where that has another name.
    Where a gate G multiplies it instead (``gated``), rows X and residuals R become w X and w R G / (G^2 + a little of
    w^2) for the rows' own w^2, the mean of G^2 over channels: each row then counts as its gate lets it through, and
    R / G is what it asks for where the gate is open. On held-out rows the error is |R - G * (X D)|^2, as it is.
    """

    block: str
    parts: list[Part]
    kept: Tensor
    coupling: float
    factor: float
    source: str = ""
    positions: Tensor = field(default_factory=lambda: torch.empty(0))
    targets: Tensor = field(default_factory=lambda: torch.empty(0))
    inputs: dict[str, Tensor] = field(default_factory=dict)
    equations: tuple[Training, HeldOut] | None = None

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

    @property
    def gated(self) -> bool:
        return self.coupling == 0

    @exact_float32()
    def collect(
        self, output: Tensor, batch: slice, held_out: Tensor, strengths: Sequence[float], gate: Tensor | None = None
    ) -> None:
        """Take in what is left to explain of the target, and the layers' inputs, for ridges of these strengths.

        gate: (batch, 1, channels), of a system that is ``gated``.
        Raises CheckFailed where either UNet's activations are not finite.
        """
        positions, wanted = self.positions[batch], self.targets[batch].flatten(0, 1)
        residuals = (wanted - rows_at(output, positions).float()) / (self.coupling or 1.0)
        if not bool(torch.isfinite(residuals).all()):
            which = "pruned" if bool(torch.isfinite(wanted).all()) else "dense"
            raise CheckFailed(
                f"compensate: the {which} UNet's output of {self.block} is not finite; check its weights and the images"
            )
        count = positions.shape[1]
        if self.equations is None:
            like = residuals.new_empty(0, dtype=precision(strengths))
            extra = self.gated and bool(self.biases)  # what is added is gated too: a feature, no row that is free
            bias = bool(self.biases) and not extra
            sizes = (int((~held_out).sum()) * count, self.unknowns + extra, residuals.shape[1], bias)
            self.equations = training(*sizes, like), HeldOut(like.dtype)
        of_sample, out = residuals.reshape(len(positions), count, -1), held_out[batch]
        size = max(1, CHUNK // (count * self.unknowns))
        for add, chosen in ((self.equations[0].add, ~out), (self.equations[1].add, out)):
            for some in torch.split(chosen.nonzero().flatten(), size):
                features = [self.features(part, some, positions) for part in self.parts]
                rows, left = features[0] if len(features) == 1 else torch.cat(features, 1), of_sample[some]
                if gate is None:
                    add(rows, left.flatten(0, 1))
                elif chosen is out:
                    self.equations[1].add(rows, left.flatten(0, 1), gate[some].expand_as(left).flatten(0, 1))
                else:
                    add(*let_through(rows, left, gate[some].to(left), bool(self.biases)))
        self.inputs.clear()

    def features(self, part: Part, some: Tensor, positions: Tensor) -> Tensor:
        inputs = self.inputs[part.name]
        inputs = inputs[:, part.first : part.last] if inputs.ndim == 4 else inputs[..., part.first : part.last]
        return features_at(part.layer, inputs[some], positions[some])

    @exact_float32()
    def solve(self, strengths: Sequence[float], held_out: Tensor) -> Repair:
        """Solve, and update the layers if that lowers the held-out error."""
        assert self.equations is not None
        wanted = self.targets[held_out].flatten(0, 1).double() / (self.coupling or 1.0)
        power, variance = float(wanted.square().sum()), float((wanted - wanted.mean(0)).square().sum())
        spread = max(variance if variance > 1e-9 * power else power, 1e-30)
        before = self.equations[1].error()
        self.equations[0].close()
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
        found = [(weight, weight_of(share, weight)) for weight, share in zip(weights, shares, strict=True)]
        return [*found, *((bias, update[-1]) for bias in self.biases[:1])]

    def written(self, update: Tensor) -> Tensor:
        """The update as the layers' dtype takes it up: half precision rounds what is added."""
        if self.parts[0].weight().element_size() >= 4:
            return update
        moved = [(tensor + share.to(tensor)).double() - tensor.double() for tensor, share in self.pieces(update)]
        return torch.cat([matrix_of(change) if change.ndim > 1 else change[None] for change in moved]).to(update)

    def apply_(self, update: Tensor) -> None:
        """Add an update to the layers."""
        for tensor, share in self.pieces(update):
            tensor.add_(share.to(tensor))
