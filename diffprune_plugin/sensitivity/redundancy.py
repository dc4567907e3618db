"""What is left of an error when the layers behind a cut are refitted: what the channels that stay cannot tell of those
that went.

To first order a refitted layer loses of a removed input x_c what no linear function of the inputs that stay gives, its
variance conditional on them: with P the inverse of the inputs' correlations and R those that go, [(P_RR)^-1]_cc of the
whole. The error of the output is that share of what the channel alone costs. Channels go one after another, each time
the one that adds least; each has what it added then as its score, so that scores of those that go together add up.

Backward elimination, by the sweep operator (Goodnight, The American Statistician 33, 1979); for single weights the same
is the optimal brain surgeon (Hassibi and Stork, 1993). What convolutions see of neighbouring positions is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffprune_plugin.graph.groups import CoupledGroup
from diffprune_plugin.utils.exact import exact_float32

BLOCK = 512  # input channels of a layer that are taken as related: of a large model there is no room for all
RIDGE = 1e-3  # of a variance; and as much as there are channels for each row
STEPS = 256  # in which a block is eliminated: several channels at a time where there are more

Floats = npt.NDArray[np.float64]


@dataclass
class Correlations:
    """Products of the centred inputs of layers, summed over rows: by layer a matrix for each block of channels."""

    products: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    @exact_float32()
    def add(self, layer: str, centred: Tensor) -> None:
        """Rows of inputs less their means, shape (..., channels)."""
        parts = torch.split(centred.float().flatten(0, -2), BLOCK, 1)
        found = [(part.T @ part).cpu() for part in parts]
        before = self.products.get(layer)
        self.products[layer] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]
        self.rows[layer] = self.rows.get(layer, 0) + len(parts[0])

    def vary(self, layer: str, channels: npt.NDArray[np.int64], means: Tensor) -> bool:
        """Whether any of some of a layer's channels, with these means, is not the same in all rows."""
        squares = torch.cat([part.diagonal() for part in self.products[layer]]) / self.rows[layer]
        at = torch.as_tensor(channels)
        return bool((squares[at] > 1e-10 * means.cpu()[at].square()).any())

    def between(self, layer: str, channels: npt.NDArray[np.int64]) -> Iterator[tuple[slice, Floats]]:
        """Of some of a layer's channels, rising, those in each block and their correlations, shrunk towards none by
        `RIDGE` and by how few rows there are."""
        for block, products in enumerate(self.products[layer]):
            inside = slice(*np.searchsorted(channels, [block * BLOCK, (block + 1) * BLOCK]))
            mine = channels[inside] - block * BLOCK
            if len(mine):
                some = products.double().numpy()[np.ix_(mine, mine)]
                scale = np.sqrt(np.maximum(np.diag(some), 1e-30))
                ridge = RIDGE + len(mine) / self.rows[layer]
                yield inside, (some / scale[:, None] / scale + ridge * np.eye(len(mine))) / (1 + ridge)


@dataclass
class Block:
    """Related channels under elimination: the unit of each, what each costs alone, and the swept inverse of their
    correlations: at those that went and those that stay what tells the first from the second."""

    units: npt.NDArray[np.int64]
    alone: Floats
    swept: Floats

    def costs(self, gone: npt.NDArray[np.bool_]) -> Floats:
        """What each channel that is left would add now: its own, and what those that went lose with it."""
        went = gone[self.units]
        own = self.alone + self.alone[went] @ np.square(self.swept[went])
        return np.asarray(own / np.maximum(np.diag(self.swept), 1e-12))

    def left(self, gone: npt.NDArray[np.bool_]) -> float:
        """The error with these units gone."""
        went = gone[self.units]
        return float(self.alone[went] @ np.diag(self.swept)[went])

    def sweep(self, units: npt.NDArray[np.int64]) -> None:
        """Take units out."""
        at = np.flatnonzero(np.isin(self.units, units))
        if len(at):
            inverse = np.linalg.inv(self.swept[np.ix_(at, at)])
            columns, rows = self.swept[:, at], self.swept[at]
            self.swept -= columns @ inverse @ rows
            self.swept[:, at], self.swept[at] = -columns @ inverse, inverse @ rows
            self.swept[np.ix_(at, at)] = inverse


def in_turn(group: CoupledGroup, alone: Floats, squares: Mapping[str, Floats], correlations: Correlations) -> Floats:
    """What each unit adds to the error when it goes in its turn and the others are refitted, shape (units,).

    alone: what each unit costs by itself, nothing refitted but a bias; squares: by layer that a unit goes into the same
    by way of this layer only, for each of the group's channels.
    """
    blocks = blocks_of(group, alone, squares, correlations)
    found, gone, count = np.zeros(group.units), np.zeros(group.units, bool), -(-group.units // STEPS)
    error = 0.0
    while not gone.all():
        costs = np.zeros(group.units)
        for block in blocks:
            np.add.at(costs, block.units, block.costs(gone))
        costs[gone] = np.inf
        next_ = np.argsort(costs, kind="stable")[: min(count, int((~gone).sum()))]
        gone[next_] = True
        for block in blocks:
            block.sweep(next_)
        before, error = error, sum(block.left(gone) for block in blocks)
        shares = costs[next_] / max(costs[next_].sum(), 1e-300)
        found[next_] = shares * max(error - before, 0.0)
    return found


def blocks_of(
    group: CoupledGroup, alone: Floats, squares: Mapping[str, Floats], correlations: Correlations
) -> list[Block]:
    """The blocks of each layer that a group goes into; the costs of a unit's channels sum to what it costs alone."""
    parts, total = [], np.zeros(group.units)
    for member in group.members:
        if member.side == "in" and member.layer in squares:
            order = np.argsort(member.channels, kind="stable")
            channels, roots = member.channels[order], member.roots[order]
            for inside, related in correlations.between(member.layer, channels):
                units, cost = roots[inside] % group.units, squares[member.layer][roots[inside]]
                np.add.at(total, units, cost)
                parts.append((units, cost, related))
    share = alone / np.maximum(total, 1e-300)
    return [
        Block(units, cost * share[units], np.linalg.inv(related).astype(np.float64)) for units, cost, related in parts
    ]
