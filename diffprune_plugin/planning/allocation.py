"""Where channels go: for each coupled group one of its widths, so that the summed error is least within a budget.

A multiple-choice knapsack. Errors add up; sizes do not, since a layer costs its input times its output channels, so the
size of a choice is taken with all others as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.costs import LayerCost
from diffprune_plugin.graph.groups import CoupledGroup

Numbers = npt.NDArray[np.float64]
KEYS = ("params", "macs")
HALVINGS = 50  # of the interval that holds a multiplier
SWEEPS = 20  # over all groups, until none changes its width
STEPS = 2  # that a group gets back at most when another pays
ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Menu:
    """The widths that a group can have: how many units each leaves out, from 0 on, and the error of each; both rise."""

    root: str
    removed: tuple[int, ...]
    errors: tuple[float, ...]


class SizeOf:
    """Params and MACs of the whole model when groups lose so many units, from the layers' costs."""

    def __init__(self, groups: Sequence[CoupledGroup], costs: Mapping[str, LayerCost]) -> None:
        rows = {name: row for row, name in enumerate(costs)}
        shape = (len(groups), len(costs))
        share = {"in": np.zeros(shape), "out": np.zeros(shape)}  # of a layer's channels that one unit takes
        for place, group in enumerate(groups):
            for member in group.members:
                cost = costs[member.layer]
                width = cost.channels_in if member.side == "in" else cost.channels_out
                share[member.side][place, rows[member.layer]] += len(member.channels) / group.units / max(width, 1)
        self.into, self.out = share["in"], share["out"]
        self.weights = np.array([cost.weights for cost in costs.values()], np.float64)
        self.rest = np.array([cost.params - cost.weights for cost in costs.values()], np.float64)
        self.positions = np.array([cost.positions for cost in costs.values()], np.float64)
        self.touched = [np.flatnonzero(self.into[place] + self.out[place]) for place in range(len(groups))]

    def __call__(self, removed: Sequence[int]) -> Numbers:
        """(params, MACs), shape (2,)."""
        lost = np.asarray(removed, np.float64)
        return self._of(slice(None), lost @ self.into, lost @ self.out)

    def choices(self, removed: Sequence[int], place: int, counts: Sequence[int]) -> Numbers:
        """(params, MACs) of the layers that a group touches, for each count of its units, shape (counts, 2)."""
        layers, lost = self.touched[place], np.asarray(removed, np.float64)
        more = np.asarray(counts, np.float64)[:, None] - lost[place]
        into = (lost @ self.into[:, layers])[None] + more * self.into[place, layers]
        out = (lost @ self.out[:, layers])[None] + more * self.out[place, layers]
        return self._of(layers, into, out)

    def _of(self, layers: slice | npt.NDArray[np.int64], into: Numbers, out: Numbers) -> Numbers:
        params = (self.weights[layers] * (1 - into) + self.rest[layers]) * (1 - out)
        return np.stack([params.sum(-1), (params * self.positions[layers]).sum(-1)], -1)


@dataclass
class Search:
    """One allocation under way: ``chosen`` is the place in its menu of each group."""

    menus: Sequence[Menu]
    size_of: SizeOf
    limits: Numbers  # (params, MACs), infinite where there is none
    chosen: list[int]

    @property
    def removed(self) -> list[int]:
        return [menu.removed[place] for menu, place in zip(self.menus, self.chosen, strict=True)]

    @property
    def error(self) -> float:
        return sum(menu.errors[place] for menu, place in zip(self.menus, self.chosen, strict=True))

    def fits(self) -> bool:
        return bool((self.size_of(self.removed) <= self.limits * ROUNDING).all())

    def relax(self, multipliers: Numbers) -> None:
        """Each group takes the width of least error plus price, given the others, until none changes."""
        for _ in range(SWEEPS):
            before = list(self.chosen)
            for place, menu in enumerate(self.menus):
                prices = self.size_of.choices(self.removed, place, menu.removed) @ multipliers
                self.chosen[place] = int(np.argmin(np.asarray(menu.errors) + prices))
            if self.chosen == before:
                return

    def refine(self) -> None:
        """Give channels back to one group, or to one at the cost of another, while that fits and the error falls."""
        while self._give_back() or self._exchange():
            pass

    def _give_back(self) -> bool:
        """The one change of a single group that lowers the error most and fits; whether there was one."""
        found = []
        for place, menu in enumerate(self.menus):
            sizes = self._sizes(self.removed, place, menu.removed[: self.chosen[place]])
            for other in np.flatnonzero((sizes <= self.limits * ROUNDING).all(1)):
                found.append((menu.errors[other] - menu.errors[self.chosen[place]], place, int(other)))
        best = min(found, default=(0.0, 0, 0))
        if best[0] < 0:
            self.chosen[best[1]] = best[2]
        return best[0] < 0

    def _exchange(self) -> bool:
        """One group gets steps back and another pays, where that lowers the error most; whether there was a pair."""
        best, moves = 0.0, dict[int, int]()
        for place, menu in enumerate(self.menus):
            for other in range(max(self.chosen[place] - STEPS, 0), self.chosen[place]):
                gain = menu.errors[self.chosen[place]] - menu.errors[other]
                removed = [*self.removed[:place], menu.removed[other], *self.removed[place + 1 :]]
                for payer, paying in enumerate(self.menus):
                    if payer == place:
                        continue
                    price = self._price(removed, payer, paying)
                    if price is not None and price[0] - gain < best - 1e-15:
                        best, moves = price[0] - gain, {place: other, payer: price[1]}
        for place, other in moves.items():
            self.chosen[place] = other
        return bool(moves)

    def _price(self, removed: Sequence[int], place: int, menu: Menu) -> tuple[float, int] | None:
        """The least error that a group adds by losing so much more that the model fits, and the width; None if none."""
        now = self.chosen[place]
        fits = (self._sizes(removed, place, menu.removed[now + 1 :]) <= self.limits * ROUNDING).all(1)
        if not fits.any():
            return None
        chosen = now + 1 + int(np.argmax(fits))
        return menu.errors[chosen] - menu.errors[now], chosen

    def _sizes(self, removed: Sequence[int], place: int, counts: Sequence[int]) -> Numbers:
        """(params, MACs) of the whole model for each count of one group's units, the others as given."""
        parts = self.size_of.choices(removed, place, [*counts, removed[place]])
        whole: Numbers = self.size_of(removed) + parts[:-1] - parts[-1]
        return whole


def allocate(menus: Sequence[Menu], size_of: SizeOf, limits: Mapping[str, float]) -> list[int]:
    """How many units each group loses, so that the summed error is least and the size within ``limits``.

    limits: the most ``params`` and ``macs`` of the whole model. Lagrange multipliers are found by bisection, and single
    and paired moves follow: not always the best of small cases, by little (the tests compare with brute force).

    Raises BadInput for limits that are below the smallest model of the menus.
    """
    bound = np.array([limits.get(key, np.inf) for key in KEYS], np.float64)
    search = Search(menus, size_of, bound, [len(menu.removed) - 1 for menu in menus])
    if not search.fits():
        least, dense = size_of(search.removed), size_of([0] * len(menus))
        key = next(i for i in range(2) if least[i] > bound[i])
        raise BadInput(
            f"{KEYS[key]}: {bound[key] / dense[key]:.3f} of the dense model's is below {least[key] / dense[key]:.3f}, "
            "all that these settings can reach; raise it"
        )
    starts = [search, *(priced(menus, size_of, bound, weights) for weights in weightings(bound))]
    for start in starts:
        start.refine()
    return min(starts, key=lambda start: start.error).removed


def weightings(bound: Numbers) -> list[Numbers]:
    """How the prices of params and MACs relate: one alone, or where both are limited several mixtures."""
    limited = np.isfinite(bound)
    shares = [1.0] if limited.sum() < 2 else [0.0, 0.25, 0.5, 0.75, 1.0]
    return [np.where(limited, (share, 1 - share) if limited.all() else 1.0, 0.0) for share in shares]


def priced(menus: Sequence[Menu], size_of: SizeOf, bound: Numbers, weights: Numbers) -> Search:
    """The cheapest multiplier, as a share of error for the dense size, with which the relaxed choice fits."""
    dense = size_of([0] * len(menus))
    best = Search(menus, size_of, bound, [len(menu.removed) - 1 for menu in menus])
    low, high = -30.0, 10.0  # of the multiplier's decimal logarithm, per dense size
    scale = max(sum(menu.errors[-1] for menu in menus), 1e-300)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = Search(menus, size_of, bound, [0] * len(menus))
        tried.relax(10.0**middle * scale * weights / dense)
        if tried.fits():
            high = middle
            best = min(best, tried, key=lambda search: search.error)
        else:
            low = middle
    return best
