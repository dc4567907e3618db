"""Allocation: the knapsack against brute force, what is limited, and what goes first."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.costs import LayerCost
from diffprune_plugin.graph.groups import CoupledGroup, Member
from diffprune_plugin.planning.allocation import Menu, SizeOf, allocate

UNITS = 8


def chain(widths: int) -> tuple[list[CoupledGroup], dict[str, LayerCost]]:
    """Layers in a row: the outputs of each are the inputs of the next, so that what a layer costs is a product."""
    groups = [CoupledGroup(f"l{i}", UNITS, 1, 1, members_of(i), None) for i in range(widths)]
    costs = {f"l{i}": LayerCost(UNITS, UNITS, UNITS * UNITS + UNITS, UNITS * UNITS, 4**i) for i in range(widths + 1)}
    return groups, costs


def members_of(place: int) -> tuple[Member, ...]:
    every = np.arange(UNITS)
    return Member(f"l{place}", "out", every, every), Member(f"l{place + 1}", "in", every, every)


def menus_of(groups: list[CoupledGroup], seed: int) -> list[Menu]:
    """Four widths each, with random errors that grow with what goes, at very different rates."""
    rng = np.random.default_rng(seed)
    rates = 10 ** rng.uniform(-3, 0, len(groups))
    return [
        Menu(group.root, (0, 2, 4, 6), (0.0, *np.cumsum(rate * rng.uniform(0.2, 2, 3)).tolist()))
        for group, rate in zip(groups, rates, strict=True)
    ]


def brute_force(menus: list[Menu], size_of: SizeOf, limits: dict[str, float]) -> float:
    """The least error of all combinations that fit."""
    bound = np.array([limits.get("params", np.inf), limits.get("macs", np.inf)])
    fitting = (
        sum(menu.errors[i] for menu, i in zip(menus, places, strict=True))
        for places in itertools.product(*(range(len(menu.removed)) for menu in menus))
        if (size_of([menu.removed[i] for menu, i in zip(menus, places, strict=True)]) <= bound).all()
    )
    return min(fitting)


def error_of(menus: list[Menu], removed: list[int]) -> float:
    return sum(menu.errors[menu.removed.index(count)] for menu, count in zip(menus, removed, strict=True))


@pytest.mark.parametrize("keys", [("macs",), ("params",), ("params", "macs")])
def test_the_knapsack_is_mostly_that_of_brute_force_and_never_far_from_it(keys: tuple[str, ...]) -> None:
    groups, costs = chain(4)
    size_of = SizeOf(groups, costs)
    dense, ratios = dict(zip(("params", "macs"), size_of([0] * 4), strict=True)), []
    for seed, share in itertools.product(range(10), (0.3, 0.5, 0.8)):
        menus, limits = menus_of(groups, seed), {key: share * dense[key] for key in keys}
        removed = allocate(menus, size_of, limits)
        assert (size_of(removed) <= [limits.get("params", np.inf), limits.get("macs", np.inf)]).all()
        ratios.append(error_of(menus, removed) / brute_force(menus, size_of, limits))
    assert min(ratios) > 1 - 1e-9
    assert np.mean(np.array(ratios) < 1 + 1e-9) >= 0.9
    assert np.mean(ratios) < 1.01
    assert max(ratios) < 1.2


def test_sizes_are_those_of_the_layers() -> None:
    groups, costs = chain(2)
    assert SizeOf(groups, costs)([0, 0]).tolist() == [3 * 72, 72 * (1 + 4 + 16)]
    # l0 loses 4 outputs; l1 4 inputs and 2 outputs; l2 2 inputs.
    layers = [(64 + 8) * 0.5, (64 * 0.5 + 8) * 0.75, 64 * 0.75 + 8]
    assert SizeOf(groups, costs)([4, 2]).tolist() == [sum(layers), layers[0] + 4 * layers[1] + 16 * layers[2]]


def test_a_layer_that_does_not_matter_is_emptied_first_and_a_critical_one_stays() -> None:
    groups, costs = chain(4)
    menus = [Menu(group.root, (0, 2, 4, 6), (0.0, 1.0, 2.0, 3.0)) for group in groups]
    menus[1] = Menu("l1", (0, 2, 4, 6), (0.0, 0.0, 0.0, 0.0))
    menus[2] = Menu("l2", (0, 2, 4, 6), (0.0, 50.0, 60.0, 70.0))
    size_of = SizeOf(groups, costs)
    removed = allocate(menus, size_of, {"macs": 0.7 * size_of([0] * 4)[1]})
    assert removed[1] == 6
    assert removed[2] == 0


def test_a_budget_that_no_width_reaches_is_refused_with_the_least() -> None:
    groups, costs = chain(3)
    size_of = SizeOf(groups, costs)
    with pytest.raises(BadInput, match=r"macs: 0.01 is below 0.\d+ of the dense model's, all that these settings"):
        allocate(menus_of(groups, 0), size_of, {"macs": 0.01 * size_of([0] * 3)[1]})
