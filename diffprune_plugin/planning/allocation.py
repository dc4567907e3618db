"""Where channels go: for each coupled group one of its widths, so that the summed error is least within a budget.

A multiple-choice knapsack. Errors add up; sizes do not, since a layer costs its input times its output channels, so the
size of a choice is taken with all others as they are.
"""

from __future__ import annotations

import itertools
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
MIXES = 4  # parts that the prices of several columns are mixed from
STEPS = 2  # that a group gets back at most when another pays
ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Menu:
    """The widths that a group can have: how many units each leaves out, from 0 on, and the error of each; both rise."""

    root: str
    removed: tuple[int, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Column:
    """A cost of the model as a sum over its layers, in the order of their costs.

    A layer with the channels (in, out) left costs ``product`` * in * out + ``into`` * in + ``out`` * out, each of shape
    (layers,), and the model ``rest`` more. In the product a number of channels counts as the next multiple of
    ``multiple``, as on hardware that works in blocks.
    """

    product: Numbers
    into: Numbers
    out: Numbers
    rest: float = 0.0
    multiple: int = 1


def size_columns(costs: Mapping[str, LayerCost]) -> dict[str, Column]:
    """Params and MACs: of a layer's elements its weights have an input and an output side, the others an output."""
    layers = list(costs.values())
    weights = np.array([cost.weights / max(cost.channels_in * cost.channels_out, 1) for cost in layers], np.float64)
    others = np.array([(cost.params - cost.weights) / max(cost.channels_out, 1) for cost in layers], np.float64)
    positions = np.array([cost.positions for cost in layers], np.float64)
    products, none = np.array([cost.products for cost in layers], np.float64), np.zeros(len(layers))
    macs = Column(weights * positions, none, others * positions + products)
    return dict(zip(KEYS, (Column(weights, none, others), macs), strict=True))


class SizeOf:
    """What the whole model costs when groups lose so many units: params, MACs, and further columns by name."""

    def __init__(
        self,
        groups: Sequence[CoupledGroup],
        costs: Mapping[str, LayerCost],
        further: Mapping[str, Column] | None = None,
    ) -> None:
        self.columns = size_columns(costs) | dict(further or {})
        self.keys = tuple(self.columns)
        rows = {name: row for row, name in enumerate(costs)}
        shape = (len(groups), len(costs))
        share = {"in": np.zeros(shape), "out": np.zeros(shape)}  # channels of a layer for one unit
        for place, group in enumerate(groups):
            for member in group.members:
                if member.layer in rows:  # a norm without weights costs nothing
                    share[member.side][place, rows[member.layer]] += len(member.channels) / group.units
        self.into, self.out = share["in"], share["out"]
        self.dense_in = np.array([cost.channels_in for cost in costs.values()], np.float64)
        self.dense_out = np.array([cost.channels_out for cost in costs.values()], np.float64)
        self.touched = [np.flatnonzero(self.into[place] + self.out[place]) for place in range(len(groups))]

    def __call__(self, removed: Sequence[int]) -> Numbers:
        """Params, MACs and the further columns, shape (columns,)."""
        lost = np.asarray(removed, np.float64)
        rest = np.array([column.rest for column in self.columns.values()])
        found: Numbers = self._of(slice(None), lost @ self.into, lost @ self.out) + rest
        return found

    def choices(self, removed: Sequence[int], place: int, counts: Sequence[int]) -> Numbers:
        """The columns of the layers that a group touches, for each count of its units, shape (counts, columns)."""
        layers, lost = self.touched[place], np.asarray(removed, np.float64)
        more = np.asarray(counts, np.float64)[:, None] - lost[place]
        into = (lost @ self.into[:, layers])[None] + more * self.into[place, layers]
        out = (lost @ self.out[:, layers])[None] + more * self.out[place, layers]
        return self._of(layers, into, out)

    def _of(self, layers: slice | npt.NDArray[np.int64], lost_in: Numbers, lost_out: Numbers) -> Numbers:
        # A whole block that is a choice takes what groups inside it have lost already.
        into, out = np.maximum(self.dense_in[layers] - lost_in, 0), np.maximum(self.dense_out[layers] - lost_out, 0)
        found = []
        for column in self.columns.values():
            product = in_multiples(into, column.multiple) * in_multiples(out, column.multiple)
            found.append(product @ column.product[layers] + into @ column.into[layers] + out @ column.out[layers])
        return np.stack(found, -1)


def in_multiples(channels: Numbers, multiple: int) -> Numbers:
    """Channels rounded up to a multiple."""
    return channels if multiple == 1 else np.ceil(channels / multiple - 1e-9) * multiple


@dataclass
class Search:
    """One allocation under way: ``chosen`` is the place in its menu of each group."""

    menus: Sequence[Menu]
    size_of: SizeOf
    limits: Numbers  # of each column, infinite where there is none
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
        whole = self.size_of(self.removed)
        for place, menu in enumerate(self.menus):
            sizes = self._sizes(self.removed, whole, place, menu.removed[: self.chosen[place]])
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
                whole = self.size_of(removed)
                for payer, paying in enumerate(self.menus):
                    if payer == place:
                        continue
                    price = self._price(removed, whole, payer, paying)
                    if price is not None and price[0] - gain < best - 1e-15:
                        best, moves = price[0] - gain, {place: other, payer: price[1]}
        for place, other in moves.items():
            self.chosen[place] = other
        return bool(moves)

    def _price(self, removed: Sequence[int], whole: Numbers, place: int, menu: Menu) -> tuple[float, int] | None:
        """The least error that a group adds by losing so much more that the model fits, and the width; None if none."""
        now = self.chosen[place]
        fits = (self._sizes(removed, whole, place, menu.removed[now + 1 :]) <= self.limits * ROUNDING).all(1)
        if not fits.any():
            return None
        chosen = now + 1 + int(np.argmax(fits))
        return menu.errors[chosen] - menu.errors[now], chosen

    def _sizes(self, removed: Sequence[int], whole: Numbers, place: int, counts: Sequence[int]) -> Numbers:
        """The columns of the whole model, ``whole`` as it is, for each count of one group's units."""
        parts = self.size_of.choices(removed, place, [*counts, removed[place]])
        found: Numbers = whole + parts[:-1] - parts[-1]
        return found


def allocate(menus: Sequence[Menu], size_of: SizeOf, limits: Mapping[str, float]) -> list[int]:
    """How many units each group loses, so that the summed error is least and the size within ``limits``.

    limits: the most of a column of the whole model, by its name. Lagrange multipliers are found by bisection, and
    single and paired moves follow: not always the best of small cases, by little (the tests compare with brute force).

    Raises BadInput for limits that are below the smallest model of the menus.
    """
    bound = np.array([limits.get(key, np.inf) for key in size_of.keys], np.float64)
    search = Search(menus, size_of, bound, [len(menu.removed) - 1 for menu in menus])
    if not search.fits():
        least, dense = size_of(search.removed), size_of([0] * len(menus))
        key = next(i for i in range(len(bound)) if least[i] > bound[i])
        asked, possible = bound[key] / dense[key], least[key] / dense[key]
        reason = f"is below {possible:.3f} of the dense model's, all that these settings can reach; raise it"
        raise BadInput.of(size_of.keys[key], round(float(asked), 4), reason)
    starts = [search, *(priced(menus, size_of, bound, weights) for weights in weightings(bound))]
    for start in starts:
        start.refine()
    return min(starts, key=lambda start: start.error).removed


def weightings(bound: Numbers) -> list[Numbers]:
    """How the prices of the limited columns relate: one alone, or of several their mixtures in quarters."""
    limited = np.flatnonzero(np.isfinite(bound))
    shares = [mix for mix in itertools.product(range(MIXES + 1), repeat=len(limited)) if sum(mix) == MIXES]
    found = np.zeros((len(shares), len(bound)))
    found[:, limited] = np.array(shares) / MIXES
    return list(found)


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
