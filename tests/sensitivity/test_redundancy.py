"""What a refit leaves of an error, against regressions solved one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diffprune_plugin.graph.groups import CoupledGroup, Member
from diffprune_plugin.sensitivity import redundancy
from diffprune_plugin.sensitivity.redundancy import RIDGE, Correlations, in_turn

ROWS = 400


def group_of(layers: dict[str, list[int]], units: int, pairs: int = 1) -> CoupledGroup:
    """By layer the root channel of each of its input channels."""
    members = [Member(name, "in", np.arange(len(roots)), np.array(roots)) for name, roots in layers.items()]
    return CoupledGroup("root", units * pairs, pairs, 1, tuple(members), None)


def related(rows: np.ndarray) -> np.ndarray:
    """Correlations of centred rows, with the ridge added and taken out of the diagonal again."""
    found, ridge = np.corrcoef(rows.T), RIDGE + rows.shape[1] / len(rows)
    return np.asarray((found + ridge * np.eye(len(found))) / (1 + ridge))


def left(correlations: np.ndarray, gone: list[int]) -> np.ndarray:
    """The share of each of the gone channels' variance that regressions on those that stay leave."""
    stay = np.setdiff1d(np.arange(len(correlations)), gone)
    if not len(stay):
        return np.ones(len(gone))
    across = correlations[np.ix_(gone, stay)]
    told = across @ np.linalg.solve(correlations[np.ix_(stay, stay)], across.T)
    return 1 - np.diag(told)


def data(seed: int, units: int) -> np.ndarray:
    source = np.random.default_rng(seed)
    rows = source.standard_normal((ROWS, units)) @ source.standard_normal((units, units))
    return np.asarray(rows - rows.mean(0))


def correlations_of(rows: dict[str, np.ndarray]) -> Correlations:
    found = Correlations()
    for name, values in rows.items():
        for part in np.array_split(values, 3):  # in batches, as they come
            found.add(name, torch.from_numpy(part[None]))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_what_each_step_of_a_backward_elimination_adds(seed: int) -> None:
    units, source = 7, np.random.default_rng(seed + 10)
    rows = {"a": data(seed, units), "b": data(seed + 100, 4)}
    layers = {"a": list(range(units)), "b": [1, 3, 4, 6]}
    squares = {name: source.random(units) for name in layers}
    alone = squares["a"] + np.where(np.isin(np.arange(units), layers["b"]), squares["b"], 0)
    found = in_turn(group_of(layers, units), alone, squares, correlations_of(rows))

    def error(gone: list[int]) -> float:
        total = 0.0
        for name, roots in layers.items():
            at = [place for place, root in enumerate(roots) if root in gone]
            if at:
                cost = squares[name][[roots[place] for place in at]]
                total += float(cost @ left(related(rows[name]), at))
        return total

    gone: list[int] = []
    while len(gone) < units:
        next_ = min((error([*gone, unit]), unit) for unit in range(units) if unit not in gone)
        assert found[next_[1]] == pytest.approx(next_[0] - error(gone), rel=1e-4, abs=1e-9)
        gone.append(next_[1])
    assert found.sum() == pytest.approx(alone.sum())


def test_one_of_two_that_say_the_same_goes_for_nothing_and_then_the_other_costs_both() -> None:
    rows = np.random.default_rng(0).standard_normal((ROWS, 4))
    rows[:, 2] = rows[:, 0] + 1e-3 * rows[:, 2]
    rows -= rows.mean(0)
    alone = np.array([1.0, 0.5, 1.0, 0.5])
    found = in_turn(group_of({"a": [0, 1, 2, 3]}, 4), alone, {"a": alone}, correlations_of({"a": rows}))
    twins = sorted(found[[0, 2]])
    assert twins[0] < 0.05
    assert twins[1] == pytest.approx(2.0, rel=0.05)
    assert found[[1, 3]] == pytest.approx(0.5, rel=0.05)  # unrelated: what they cost alone


def test_more_rows_are_needed_than_channels_to_believe_that_they_tell_of_each_other() -> None:
    rows = np.random.default_rng(0).standard_normal((4, 16))  # four rows: every channel is a sum of others
    rows -= rows.mean(0)
    alone = np.ones(16)
    found = in_turn(group_of({"a": list(range(16))}, 16), alone, {"a": alone}, correlations_of({"a": rows}))
    assert found.min() > 0.3


def test_halves_that_go_together_are_one_unit_and_blocks_know_nothing_of_each_other(monkeypatch: Any) -> None:
    rows, alone = data(0, 6), np.arange(1.0, 7)
    whole = in_turn(group_of({"a": list(range(6))}, 6), alone, {"a": alone}, correlations_of({"a": rows}))
    paired = group_of({"a": list(range(6))}, 6, pairs=2)
    twice = {"a": np.concatenate([alone, np.zeros(6)])}
    assert in_turn(paired, alone, twice, correlations_of({"a": rows})) == pytest.approx(whole)
    monkeypatch.setattr(redundancy, "BLOCK", 3)
    split = in_turn(group_of({"a": list(range(6))}, 6), alone, {"a": alone}, correlations_of({"a": rows}))
    parts = [
        in_turn(group_of({"a": [0, 1, 2]}, 3), alone[part], {"a": alone[part]}, correlations_of({"a": rows[:, part]}))
        for part in (slice(0, 3), slice(3, 6))
    ]
    assert split == pytest.approx(np.concatenate(parts))


def test_several_at_a_time_add_as_much_in_the_end(monkeypatch: Any) -> None:
    rows, alone = data(1, 12), np.ones(12)
    monkeypatch.setattr(redundancy, "STEPS", 4)
    found = in_turn(group_of({"a": list(range(12))}, 12), alone, {"a": alone}, correlations_of({"a": rows}))
    assert found.sum() == pytest.approx(12)
    assert found.min() >= 0
