"""What channels that stay lose with those that go: group norms take mean and variance over fewer channels.

A channel x of a norm group leaves it as y = w (x - m) / s + b. With some of its group gone m and s are m' and s', and y
changes by (s / s' - 1) (y - b) + w (m - m') / s'. A refit of the layer behind takes over what of this is nearest to one
linear function of y for all samples; what is left differs from sample to sample.

With g the gradient of a probe v . output where the norm ends, v . dy is the sum over channels that stay of
(s / s' - 1) sum_positions g (y - b) + w (m - m') / s' sum_positions g. Means and mean squares of each channel give m'
and s' for every choice of channels without another pass. Channels are taken as independent, so their squares add up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from diffprune_plugin.graph.groups import CoupledGroup

Floats = npt.NDArray[np.float64]
PRODUCTS = 3  # of the two sums with the gradient: each squared, and one by the other


@dataclass
class Norms:
    """The group norms that lose channels, of a model under measurement.

    moments: by norm the mean and the mean square of what goes into each channel, shape (samples, channels, 2).
    """

    model: nn.Module
    names: tuple[str, ...]
    moments: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, groups: Sequence[CoupledGroup]) -> Norms:
        layers = {member.layer for group in groups for member in group.members}
        return cls(model, tuple(sorted(n for n in layers if isinstance(model.get_submodule(n), nn.GroupNorm))))

    def empty(self, samples: int) -> dict[str, Tensor]:
        """What the products of `watched` are added to: by norm, shape (samples, channels, 3)."""
        shapes = {name: (samples, self.module(name).num_channels, PRODUCTS) for name in self.names}
        return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def module(self, name: str) -> Any:
        return self.model.get_submodule(name)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Forward passes inside add to ``moments``, in the order of their samples."""

        def note(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                given = args[0].detach().flatten(2).double()
                self.moments.setdefault(name, []).append(torch.stack([given.mean(2), given.square().mean(2)], 2).cpu())

            return hook

        with contextlib.ExitStack() as hooks:
            for name in self.names:
                hooks.callback(self.module(name).register_forward_pre_hook(note(name)).remove)
            yield

    @contextlib.contextmanager
    def watched(self) -> Iterator[dict[str, Tensor]]:
        """For each norm, after a backward of a forward inside: its products, (batch, channels, 3).

        What a hook of the graph refers to must not lead back to the graph: such a ring is never freed.
        """
        found: dict[str, Tensor] = {}

        def watch(name: str) -> Any:
            def hook(norm: Any, _: tuple[Any, ...], output: Any) -> Any:
                seen = output if output.requires_grad else output.detach().requires_grad_(True)
                bias = 0.0 if norm.bias is None else norm.bias.detach()[:, None]
                free = output.detach().flatten(2) - bias

                def back(gradient: Tensor) -> None:
                    flat = gradient.flatten(2).float()  # squares in half precision overflow
                    scaled, moved = (free * flat).sum(2), flat.sum(2)
                    product = torch.stack([scaled * scaled, scaled * moved, moved * moved], 2).double().cpu()
                    found[name] = found[name] + product if name in found else product

                seen.register_hook(back)
                return seen

            return hook

        with contextlib.ExitStack() as hooks:
            for name in self.names:
                hooks.callback(self.module(name).register_forward_hook(watch(name)).remove)
            yield found

    def errors(
        self, group: CoupledGroup, scores: Floats, products: Mapping[str, Floats], refitted: bool = True
    ) -> Floats:
        """What the channels that stay add to the error, shape (units of a part,): with none of each part gone, with the
        unit of the lowest score, with two ..; nothing for a group without norms.

        products: by norm, summed over probes and divided by their number, that of samples and that of output values.
        """
        size = group.units // group.parts
        order = np.argsort(scores.reshape(group.parts, size), axis=1, kind="stable")
        goes = (np.argsort(order, axis=1) + 1).flatten()  # with how many of its part a unit is gone
        layers: dict[str, npt.NDArray[np.int64]] = {}
        for member in group.members:
            if member.layer in self.names:
                of = layers.setdefault(member.layer, np.full(self.module(member.layer).num_channels, size + 1))
                of[member.channels] = goes[member.roots % group.units]
        found = [self.of_norm(name, of, size, products[name], refitted) for name, of in layers.items()]
        return np.sum(found, 0) if found else np.zeros(0)

    def of_norm(self, name: str, goes: npt.NDArray[np.int64], size: int, products: Floats, refitted: bool) -> Floats:
        """The same of one norm, whose channels are gone with so many of their part."""
        norm, moments = self.module(name), torch.cat(self.moments[name]).numpy()
        grouped = moments.reshape(len(moments), norm.num_groups, -1, 2)
        weight = np.ones(len(goes)) if norm.weight is None else norm.weight.detach().double().cpu().numpy()
        found, (mean, spread) = np.zeros(size), statistics(grouped, np.ones(grouped.shape[1:3], bool), norm.eps)
        centre, width = (np.repeat(each, grouped.shape[2], 1) for each in (mean, spread))
        first = weight * (moments[..., 0] - centre) / width
        second = weight**2 * (moments[..., 1] - 2 * centre * moments[..., 0] + centre**2) / width**2
        for gone in range(1, size):
            stay = goes > gone
            mean_, spread_ = statistics(grouped, stay.reshape(grouped.shape[1:3]), norm.eps)
            changes = spread / spread_ - 1, (mean - mean_) / spread_
            scaled, moved = (np.repeat(each, grouped.shape[2], 1) for each in changes)
            moved = moved * weight
            if refitted:
                scaled, moved = less_common(scaled, moved, first, second)
            of = scaled * scaled * products[..., 0] + 2 * scaled * moved * products[..., 1]
            found[gone] = (of + moved * moved * products[..., 2])[:, stay].sum()
        return found


def less_common(scaled: Floats, moved: Floats, first: Floats, second: Floats) -> tuple[Floats, Floats]:
    """A change scaled * y + moved of each sample, less that of the form p * y + q which is nearest to those of all: by
    least squares over samples and positions. ``first``, ``second``: the means of y and of its square over positions;
    all of shape (samples, channels)."""
    count, along, across = len(first), second.sum(0), first.sum(0)
    by_y, by_one = (second * scaled + first * moved).sum(0), (first * scaled + moved).sum(0)
    whole = np.maximum(along * count - across**2, 1e-12)
    return scaled - (count * by_y - across * by_one) / whole, moved - (along * by_one - across * by_y) / whole


def statistics(moments: Floats, stay: npt.NDArray[np.bool_], eps: float) -> tuple[Floats, Floats]:
    """Mean and standard deviation over the channels of each norm group that stay, shape (samples, groups) each; those
    of all where none stays."""
    weights = np.where(stay.any(1, keepdims=True), stay, True).astype(np.float64)
    mean, square = np.moveaxis((moments * weights[..., None]).sum(2) / weights.sum(1)[:, None], -1, 0)
    return mean, np.sqrt(np.maximum(square - mean * mean, 0) + eps)
