"""Whole blocks as choices beside widths: which of them go, so that the summed error within a target is least.

A block is one more item of the knapsack: its error is that of its removal, it takes all that its layers cost, and what
groups inside it lose then costs nothing. For one set of blocks that go the widths are allocated as ever; the sets tried
are those of the blocks that cost least for what they free, then those that differ from the best by one block or two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.costs import LayerCost
from diffprune_plugin.graph.groups import CoupledGroup, Member, Side
from diffprune_plugin.planning.allocated import Errors, menus_of, unreachable
from diffprune_plugin.planning.allocation import Menu, SizeOf, allocate, priced, weightings
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.plan import TARGETS, BlockChoice
from diffprune_plugin.planning.planner import Material

NEAR = 3  # blocks that go, and blocks that stay, trade places; sets whose widths are refined in the end


class BlockErrors(Errors, Protocol):
    """What a sensitivity says of blocks as well: the error of the output when one is gone, by its name."""

    @property
    def blocks(self) -> Mapping[str, float]: ...


@dataclass
class BlockSearch:
    """Menus of groups and, behind them, of blocks (0: stays, 1: goes); ``inside``: for each block the places of the
    groups that lie in it; ``limits``: the most of a column of the whole model, by its name."""

    menus: Sequence[Menu]
    blocks: Sequence[Menu]
    inside: Sequence[frozenset[int]]
    size_of: SizeOf
    limits: Mapping[str, float]
    known: dict[frozenset[int], float] = field(default_factory=dict)

    def with_gone(self, gone: frozenset[int]) -> list[Menu]:
        """The menus that are left when these blocks, by their places, go and the others stay."""
        lost = {place for block in gone for place in self.inside[block]}
        widths = [only(menu, 0) if place in lost else menu for place, menu in enumerate(self.menus)]
        return widths + [only(menu, int(block in gone)) for block, menu in enumerate(self.blocks)]

    def error(self, gone: frozenset[int]) -> float:
        """The least error with just these blocks gone, by prices alone; infinite where nothing fits."""
        if gone not in self.known:
            menus, bound = self.with_gone(gone), np.array([self.limits.get(key, np.inf) for key in self.size_of.keys])
            found = (priced(menus, self.size_of, bound, weights) for weights in weightings(bound))
            self.known[gone] = min((each.error for each in found if each.fits()), default=math.inf)
        return self.known[gone]

    def run(self) -> tuple[frozenset[int], list[int]]:
        """The blocks that go, and what each group and block loses; raises BadInput as `allocate` does."""
        order = sorted(range(len(self.blocks)), key=self.rate)
        best = min((frozenset(order[:count]) for count in range(len(order) + 1)), key=self.error)
        moved = True
        while moved:
            other = min(self.near(best, order), key=self.error, default=best)
            moved = self.error(other) < self.error(best)
            best = other if moved else best
        fitting = [gone for gone, error in self.known.items() if math.isfinite(error)]
        finalists = sorted(fitting, key=self.error)[:NEAR] or [frozenset(order)]
        found = [(gone, allocate(self.with_gone(gone), self.size_of, self.limits)) for gone in finalists]
        return min(found, key=lambda each: self.error_of(each[1]))

    def error_of(self, removed: Sequence[int]) -> float:
        """Summed over all menus, when each loses so many units."""
        menus = [*self.menus, *self.blocks]
        return sum(menu.errors[menu.removed.index(count)] for menu, count in zip(menus, removed, strict=True))

    def rate(self, block: int) -> float:
        """The error that a block costs for what it frees of that which is limited."""
        nothing = [0] * (len(self.menus) + len(self.blocks))
        alone = [*nothing[: len(self.menus)], *(int(block == other) for other in range(len(self.blocks)))]
        freed = 1 - self.size_of(alone) / self.size_of(nothing)
        limited = [float(freed[place]) for place, key in enumerate(self.size_of.keys) if key in self.limits]
        return self.blocks[block].errors[-1] / max(sum(limited), 1e-300)

    def near(self, gone: frozenset[int], order: Sequence[int]) -> list[frozenset[int]]:
        """One block more or less, or one in the place of another, of those nearest to the margin."""
        stay, go = [block for block in order if block not in gone], [block for block in order if block in gone]
        trades = [gone - {back} | {more} for back in go[-NEAR:] for more in stay[:NEAR]]
        return [*(gone ^ {block} for block in order), *trades]


def only(menu: Menu, count: int) -> Menu:
    """A menu with one choice left."""
    return Menu(menu.root, (count,), (menu.errors[menu.removed.index(count)],))


def choose_blocks(
    material: Material, lists: Sequence[tuple[Sequence[str], int]], options: PlanOptions, errors: BlockErrors
) -> BlockChoice:
    """The blocks that go so that the target of the options is met with the least error, widths given their part.

    lists: of each the blocks that may go, and how many it has; no more go than the share for which the errors hold.

    Raises BadInput for a target that is below what is left when all goes that may.
    """
    names = [name for mine, count in lists for name in offered(mine, count, errors)]
    groups, costs = [item.group for item in material.items], material.costs
    menus = [menu for menu, _ in menus_of(material.items, options, errors)]
    size_of = SizeOf([*groups, *(as_group(name, costs) for name in names)], costs)
    dense = dict(zip(size_of.keys, size_of([0] * (len(groups) + len(names))), strict=True))
    limits = {TARGETS[key]: share * dense[TARGETS[key]] for key, share in options.target.items()}
    blocks = [Menu(name, (0, 1), (0.0, errors.blocks[name])) for name in names]
    inside = [frozenset(place for place, group in enumerate(groups) if lies_in(group, name)) for name in names]
    search = BlockSearch(menus, blocks, inside, size_of, limits)
    try:
        gone, removed = search.run()
    except BadInput as error:
        raise unreachable(error, options) from None
    return BlockChoice(
        gone=tuple(name for place, name in enumerate(names) if place in gone),
        errors=dict(errors.blocks),
        error=search.error_of(removed),
        target=options.target,
        params=round(dense["params"]),
        macs=round(dense["macs"]),
        sensitivity=errors.sha256,
    )


def offered(mine: Sequence[str], count: int, errors: BlockErrors) -> list[str]:
    """Those of a list's blocks that are offered: those of the least error, as many as may go, in the list's order."""
    least = sorted(mine, key=errors.blocks.__getitem__)[: int(errors.most * count)]
    return [name for name in mine if name in least]


def as_group(name: str, costs: Mapping[str, LayerCost]) -> CoupledGroup:
    """A block as a group of one unit, which takes all channels of all its layers."""

    def member(layer: str, side: Side, channels: int) -> Member:
        return Member(layer, side, np.arange(channels), np.zeros(channels, np.int64))

    mine = {layer: cost for layer, cost in costs.items() if is_in(layer, name)}
    into = [member(layer, "in", cost.channels_in) for layer, cost in mine.items()]
    out = [member(layer, "out", cost.channels_out) for layer, cost in mine.items()]
    return CoupledGroup(name, 1, 1, 1, (*into, *out), None)


def lies_in(group: CoupledGroup, block: str) -> bool:
    """Whether all layers of a group are a block's."""
    return all(is_in(member.layer, block) for member in group.members)


def is_in(layer: str, block: str) -> bool:
    return f"{layer}.".startswith(f"{block}.")
