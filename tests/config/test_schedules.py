"""NNCF's schedules, against levels that NNCF 2.14 itself set (tests/golden/make_nncf.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from diffprune_plugin.config.dialects.nncf_schedules import levels
from diffprune_plugin.errors import BadInput

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "nncf.json").read_text())["schedules"]
UNSOLVED = [case for case in GOLDEN if case["schedule"] == "exponential_with_bias" and case["pruning_steps"] > 20]


def ours(case: dict) -> list[float]:
    return levels(**{key: value for key, value in case.items() if key != "levels"}, epochs=len(case["levels"]))


@pytest.mark.parametrize("case", [case for case in GOLDEN if case not in UNSOLVED], ids=str)
def test_every_epoch_has_the_level_that_nncf_sets(case) -> None:
    assert ours(case) == pytest.approx(case["levels"], abs=1e-9)


@pytest.mark.parametrize("case", UNSOLVED, ids=str)
def test_where_nncfs_solver_gives_up_the_equations_still_hold(case) -> None:
    """3/4 of the target an eighth of the way: ours passes there, NNCF's (its first guess, rate 1) does not."""
    last, target = case["pruning_steps"] - 1, case["pruning_target"]

    def eighth(found: list[float]) -> float:
        rate = math.log((found[1] - found[0]) / (found[2] - found[1]))
        return target * math.expm1(-rate * last / 8) / math.expm1(-rate * last)

    assert eighth(ours(case)) == pytest.approx(0.75 * target, abs=1e-6)
    assert eighth(case["levels"]) > 0.99 * target


def test_a_multistep_level_holds_from_its_epoch_on() -> None:
    assert levels("multistep", steps={0: 0.1, 3: 0.3}, epochs=6) == [0.1, 0.1, 0.1, 0.3, 0.3, 0.3]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"schedule": "exponentail"}, "did you mean 'exponential'"),
        ({"schedule": "multistep"}, "steps: None: schedule 'multistep' needs it"),
        ({"steps": {0: 0.1}}, "no other does"),
        ({"schedule": "multistep", "steps": {1: 0.1}}, "steps: epochs [1]"),
        ({"schedule": "multistep", "steps": {0: 1.5}}, "steps[0]: 1.5 is outside [0, 1)"),
        ({"pruning_target": 1}, "pruning_target: 1 is outside"),
        ({"pruning_init": 0.6}, "pruning_init: 0.6 is above pruning_target 0.5, which is never reached"),
        ({"pruning_steps": 0}, "pruning_steps: 0 is no whole number of at least 1"),
        ({"num_init_steps": -1}, "num_init_steps: -1"),
        ({"epochs": 50}, "reaches its target at epoch 99, but there are 50 epochs"),
        ({"schedule": "exponential_with_bias", "pruning_steps": 1}, "too short"),
        ({"schedule": "exponential_with_bias", "pruning_init": 0.36}, "start below 0.357"),
    ],
)
def test_a_schedule_that_cannot_be_is_one_line(params, words) -> None:
    with pytest.raises(BadInput) as caught:
        levels(**params)
    assert words in str(caught.value)
