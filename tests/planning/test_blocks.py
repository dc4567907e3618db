"""Whole blocks as choices beside widths: the search against brute force, what goes first, what is never offered."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.costs import LayerCost
from diffprune_plugin.graph.groups import CoupledGroup, Member
from diffprune_plugin.planning.allocation import Menu, SizeOf
from diffprune_plugin.planning.blocks import BlockSearch, as_group, lies_in, offered

UNITS, BLOCKS = 8, 3
EVERY = np.arange(UNITS)
Layers = tuple[list[CoupledGroup], dict[str, LayerCost]]


def residual(seed: int) -> Layers:
    """Blocks of two pairs of layers each, at random numbers of positions; only what is between a pair may shrink."""
    rng, groups, costs = np.random.default_rng(seed), [], {"out": LayerCost(UNITS, UNITS, 64, 64, 4)}
    for block, pair in itertools.product(range(BLOCKS), range(2)):
        up, down = (f"b.{block}.{pair}.{name}" for name in ("up", "down"))
        costs |= {name: LayerCost(UNITS, UNITS, 72, 64, int(rng.integers(1, 5))) for name in (up, down)}
        members = Member(up, "out", EVERY, EVERY), Member(down, "in", EVERY, EVERY)
        groups.append(CoupledGroup(up, UNITS, 1, 1, members, None))
    return groups, costs


def search_of(layers: Layers, menus: list[Menu], errors: list[float], share: float) -> BlockSearch:
    """For so much of the MACs."""
    groups, costs = layers
    names = [f"b.{block}" for block in range(BLOCKS)]
    size_of = SizeOf([*groups, *(as_group(name, costs) for name in names)], costs)
    blocks = [Menu(name, (0, 1), (0.0, error)) for name, error in zip(names, errors, strict=True)]
    inside = [frozenset(place for place, group in enumerate(groups) if lies_in(group, name)) for name in names]
    return BlockSearch(menus, blocks, inside, size_of, {"macs": share * size_of([0] * (len(groups) + BLOCKS))[1]})


def widths(groups: list[CoupledGroup], seed: int) -> list[Menu]:
    rng = np.random.default_rng(seed)
    rates = 10 ** rng.uniform(-3, 0, len(groups))
    return [
        Menu(group.root, (0, 3, 6), (0.0, *np.cumsum(rate * rng.uniform(0.2, 2, 2)).tolist()))
        for group, rate in zip(groups, rates, strict=True)
    ]


def brute_force(search: BlockSearch) -> float:
    """The least error of all sets of blocks and all widths of the others that fit."""
    best = np.inf
    for count in range(BLOCKS + 1):
        for gone in itertools.combinations(range(BLOCKS), count):
            lost = set().union(*(search.inside[block] for block in gone))
            error = sum(search.blocks[block].errors[1] for block in gone)
            states = [int(block in gone) for block in range(BLOCKS)]
            menus = [list(zip(m.removed, m.errors, strict=True)) for m in search.menus]
            choices = ([(0, 0.0)] if place in lost else menu for place, menu in enumerate(menus))
            for taken in itertools.product(*choices):
                whole = error + sum(each for _, each in taken)
                if whole < best and search.size_of([*(n for n, _ in taken), *states])[1] <= search.limits["macs"]:
                    best = whole
    return best


def test_the_search_is_mostly_that_of_brute_force_and_never_far_from_it() -> None:
    ratios, kinds = [], set()
    for seed, share in itertools.product(range(3), (0.35, 0.7)):
        layers, rng = residual(seed), np.random.default_rng(seed)
        errors = (10 ** rng.uniform(-2, 0.5, BLOCKS)).tolist()
        search = search_of(layers, widths(layers[0], seed), errors, share)
        gone, removed = search.run()
        assert search.size_of(removed)[1] <= search.limits["macs"] * (1 + 1e-9)
        menus = [*search.menus, *search.blocks]
        error = sum(menu.errors[menu.removed.index(n)] for menu, n in zip(menus, removed, strict=True))
        ratios.append(error / brute_force(search))
        kinds.add((bool(gone), any(removed[: len(search.menus)])))
    assert min(ratios) > 1 - 1e-9
    assert np.mean(np.array(ratios) < 1 + 1e-9) >= 0.85
    assert max(ratios) < 1.05
    assert len(kinds) > 1, "depth and width were never both an answer"


def test_a_block_takes_all_its_layers_and_what_its_groups_lost_is_counted_once() -> None:
    layers = residual(0)
    size_of = search_of(layers, widths(layers[0], 0), [1.0] * BLOCKS, 0.5).size_of
    nothing = [0] * (len(layers[0]) + BLOCKS)
    gone = [*nothing[:-BLOCKS], 1, 0, 0]
    cost = sum(cost.params for name, cost in layers[1].items() if name.startswith("b.0."))
    assert size_of(nothing)[0] - size_of(gone)[0] == cost
    assert size_of([6, 6, *gone[2:]])[0] == size_of(gone)[0], "groups inside a block that is gone cost nothing more"


def test_a_block_that_does_nothing_goes_first_and_a_critical_one_stays() -> None:
    layers = residual(1)
    menus = [Menu(group.root, (0, 3, 6), (0.0, 1.0, 3.0)) for group in layers[0]]
    gone, removed = search_of(layers, menus, [50.0, 0.0, 50.0], 0.62).run()
    assert gone == {1}
    assert removed[:6] == [*removed[:2], 0, 0, *removed[4:6]]
    assert search_of(layers, menus, [50.0, 50.0, 50.0], 0.62).run()[0] == set()


@dataclass(frozen=True)
class Known:
    """Errors by block."""

    blocks: dict[str, float]
    most: float = 0.75
    sha256: str = ""


def test_of_a_list_no_more_blocks_are_offered_than_the_errors_hold_for() -> None:
    known = Known({"a.0": 3.0, "a.1": 1.0, "a.2": 4.0, "a.3": 2.0, "b.1": 1.0})
    first, second = ["a.0", "a.1", "a.2", "a.3"], ["b.1"]
    assert offered(first, 4, known) == ["a.0", "a.1", "a.3"]  # type: ignore[arg-type]
    assert offered(second, 2, known) == ["b.1"]  # type: ignore[arg-type]
    assert offered(second, 1, known) == []  # type: ignore[arg-type]


def test_a_target_below_all_that_may_go_is_refused_with_the_least() -> None:
    layers = residual(2)
    with pytest.raises(BadInput, match=r"macs: 0.001 is below 0.\d+ of the dense model's"):
        search_of(layers, widths(layers[0], 2), [1.0] * BLOCKS, 0.001).run()
