"""A budget spent by measuring: trials beside the dense model and a whole compensation, the search, interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from processes import LAUNCH, ONE, TWO, call
from tiny import make_unet, output_of

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning import allocated
from diffprune_plugin.planning.allocated import menus_of
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.planning.planner import Material, material_of
from diffprune_plugin.sensitivity import measured
from diffprune_plugin.sensitivity.answers import Answers
from diffprune_plugin.sensitivity.linear import Run, measure_sensitivity
from diffprune_plugin.sensitivity.measured import Around, Question, search
from diffprune_plugin.sensitivity.sensitivity import Sensitivity
from diffprune_plugin.sensitivity.trials import Trials
from diffprune_plugin.utils.distributed import Processes

SCHEDULER = DDPMScheduler(num_train_timesteps=20)
ROOT = "down_blocks.1.resnets.0.conv1"
OPTIONS = PlanOptions.make({"macs_target": 0.6, "allocation": "measured"}, "test")
INNER = "target_layers=['*.conv1', '*.norm2', '*.time_emb_proj']"  # few groups, so that it takes seconds
FEW = ["sensitivity_samples=8", "sensitivity_probes=1", "macs_target=0.85", "importance=magnitude", INNER]
WORDS = [word for key in [*FEW, "allocation=measured"] for word in ("--set", key)]


@pytest.fixture(scope="module")
def trials(images: np.ndarray) -> Trials:
    return Trials.of(make_unet(), SCHEDULER, load_samples(images), UNET_2D, samples=16, seed=0)


@pytest.fixture(scope="module")
def sensitivity(images: np.ndarray) -> Sensitivity:
    return measure_sensitivity(make_unet(), SCHEDULER, images, samples=4, probes=1, progress=False)


@pytest.fixture(scope="module")
def material() -> Material:
    return material_of(OPTIONS, make_unet(), "magnitude")


def units_of(ratio: float) -> dict[str, list[int]]:
    return dp.make_plan(make_unet(), "magnitude", pruning_ratio=ratio).removed_units()


def test_a_pruned_model_in_the_dense_shape_has_its_weights_and_the_dense_ones_elsewhere(trials: Trials) -> None:
    units = units_of(0.5)
    small = trials.refitted(trials.dense, units, {})
    whole = trials.extended(small, units)
    again = trials.refitted(whole, units, {}, only=[])
    assert torch.allclose(output_of(again), output_of(small), atol=1e-5)
    assert not torch.allclose(output_of(again), output_of(trials.refitted(trials.dense, units, {}, only=[])), atol=1e-3)
    nothing = {root: [] for root in units}
    assert torch.equal(output_of(trials.extended(trials.dense, nothing)), output_of(trials.dense))


def test_giving_back_all_that_one_group_lost_is_the_dense_model_again(trials: Trials) -> None:
    answers = Answers(trials, Processes(), None)
    nothing = {root: [] for root in units_of(0.5)}
    lost = units_of(0.5)[ROOT]
    back = Question({**nothing, ROOT: lost}, {}, [(ROOT, [])])
    assert answers.error(back, 0) > 0
    assert answers.error(back, 1) == 0


def test_a_trial_is_what_a_whole_compensation_gives_where_nothing_else_is_cut(trials: Trials) -> None:
    answers = Answers(trials, Processes(), None)
    nothing = {root: [] for root in units_of(0.5)}
    lost = units_of(0.5)[ROOT]
    assert answers.error(Question(nothing, {}, [(ROOT, lost)]), 1) == pytest.approx(
        answers.error(Question({**nothing, ROOT: lost}, {}, []), 0), rel=1e-6
    )


def test_fewer_units_are_never_a_loss_nor_more_a_gain() -> None:
    plan = dp.make_plan(make_unet(), "magnitude", pruning_ratio=0.5)
    now = len(plan.removed_units()[ROOT])
    around = Around(plan, {ROOT: {now - 8: 0.2, now: 0.0, now + 8: -0.1}}, 0.75)
    assert [around.error(ROOT, range(now + more)) for more in (-8, 0, 8)] == [0, 0, 0]
    around = Around(plan, {ROOT: {now - 8: -0.3, now: 0.0, now + 8: 0.1}}, 0.75)
    assert [around.error(ROOT, range(now + more)) for more in (-8, 0, 8)] == pytest.approx([0, 0.3, 0.4])
    assert not around.knows(ROOT, now + 4)
    around = Around(plan, around.changes, 0.75, trust=0.5)
    assert [around.error(ROOT, range(now + more)) for more in (-8, 0, 8)] == pytest.approx([0, 0.15, 0.35])


def test_what_keeps_a_group_from_losing_anything_is_its_reason(sensitivity: Sensitivity) -> None:
    plan = dp.make_plan(make_unet(), "magnitude", macs_target=0.9, round_to=16, sensitivity=sensitivity)
    narrow = [group.reason for group in plan.groups if group.units == 16 and not group.removed]
    assert narrow
    assert all("16" in reason and "costs more" not in reason for reason in narrow), narrow
    assert all(group.reason.endswith("of the output's error") for group in plan.groups if group.removed)


def searched(
    material: Material, sensitivity: Sensitivity, error: Any, **changes: Any
) -> tuple[PruningPlan, list[Question]]:
    """What a search ends with, ``error`` of units giving the answers, and what it asked."""
    searching, asked, given = search(material, OPTIONS.model_copy(update=changes), None, sensitivity), [], None
    while True:
        try:
            asked.append(searching.send(given))
        except StopIteration as end:
            return end.value, asked
        plan = asked[-1].removed
        given = [error(plan), *(error({**plan, root: units}) for root, units in asked[-1].changes)]


def test_the_search_moves_to_where_the_measured_error_is_lower(material: Material, sensitivity: Sensitivity) -> None:
    """Linear thinks little of one group that is dear in truth: it gets channels back, and others pay."""
    blind = {**sensitivity.scores, ROOT: tuple(1e-9 * value for value in sensitivity.scores[ROOT])}
    blind_sensitivity = Sensitivity(**{**sensitivity.__dict__, "scores": blind})

    def error(units: dict[str, list[int]]) -> float:
        dear = sum(10 * sensitivity.error(root, some) for root, some in units.items() if root == ROOT)
        return 1e-3 + dear + sum(sensitivity.error(root, some) for root, some in units.items() if root != ROOT)

    plan, asked = searched(material, blind_sensitivity, error)
    assert len(plan.removed_units()[ROOT]) < len(asked[0].removed[ROOT])
    measured = plan.allocation.measured
    assert min(measured) == error(plan.removed_units()) < measured[0] == error(asked[0].removed)
    assert plan.macs[1] <= 0.601 * plan.macs[0]
    assert next(g for g in plan.groups if g.root == ROOT).reason.startswith("measured: ")
    assert plan == PruningPlan.model_validate_json(plan.model_dump_json())


@pytest.mark.parametrize("most", [3, 4, 5, 6, 7])
def test_each_group_can_stay_as_wide_as_it_is_however_many_widths_are_left_out(
    material: Material, sensitivity: Sensitivity, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(allocated, "WIDTHS", most)
    seen = []

    def plan_from(material: Material, options: Any, told: Any, errors: Any) -> PruningPlan:
        if isinstance(errors, Around):
            for group, (menu, _) in zip(errors.plan.groups, menus_of(material.items, options, errors), strict=True):
                seen.append(len(group.removed) in menu.removed)
        return made(material, options, told, errors)

    made = measured.plan_from
    monkeypatch.setattr(measured, "plan_from", plan_from)
    searched(material, sensitivity, lambda units: sum(sensitivity.error(root, some) for root, some in units.items()))
    assert len(seen) >= len(material.items)
    assert all(seen)


def test_what_is_tried_may_miss_a_target_and_what_is_found_not(
    material: Material, sensitivity: Sensitivity, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = measured.plan_from

    def missing(material: Material, options: Any, told: Any, errors: Any) -> PruningPlan:
        assert not options.strict, "it would end the search"
        plan = real(material, options, told, errors)
        return plan.model_copy(update={"target": {"macs_target": 0.1}}) if isinstance(errors, Around) else plan

    monkeypatch.setattr(measured, "plan_from", missing)
    first: list[dict[str, list[int]]] = []

    def error(units: dict[str, list[int]]) -> float:
        first.append(units)
        return 1.0 - 0.1 * (units != first[0])

    plan, asked = searched(material, sensitivity, error, strict=True)
    assert plan.removed_units() == asked[0].removed
    assert not plan.shortfalls()


def test_what_the_sensitivity_knows_nothing_of_is_not_tried(material: Material, sensitivity: Sensitivity) -> None:
    """It would cost nothing: inputs that never varied."""
    blind = Sensitivity(**{**sensitivity.__dict__, "unseen": (ROOT,)})
    plan, asked = searched(material, blind, lambda units: 1.0)
    assert not plan.removed_units()[ROOT]
    assert ROOT not in {root for question in asked for root, _ in question.changes}


def test_a_plan_that_turns_out_worse_is_not_taken(material: Material, sensitivity: Sensitivity) -> None:
    """Each single step looks like a gain, together they are none."""
    first: list[dict[str, list[int]]] = []

    def error(units: dict[str, list[int]]) -> float:
        first.append(units)
        changed = sum(units[root] != some for root, some in first[0].items())
        return 1.0 - 0.1 * (changed == 1) + changed * (changed > 1)

    plan, asked = searched(material, sensitivity, error)
    assert plan.removed_units() == asked[0].removed
    assert plan.allocation.measured[0] == min(plan.allocation.measured)


@pytest.mark.slow
def test_killed_and_started_again_it_gives_the_same_plan_and_measures_nothing_twice(
    run: Any, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, *_ = run("prune", config_file, *WORDS, "--json", "--output", tmp_path / "whole")
    assert code == 0
    error, asked = Answers.error, []

    def until_the_fifth(answers: Answers, question: Question, place: int) -> float:
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(question.keys[place])
        return error(answers, question, place)

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "error", until_the_fifth)
        assert run("prune", config_file, *WORDS)[0] == 130
    kept = list(tmp_path.glob("**/allocation-*.json"))
    assert len(json.loads(kept[0].read_text())) == 5
    monkeypatch.setattr(Answers, "error", lambda a, q, p: (asked.append(q.keys[p]), error(a, q, p))[1])
    assert run("prune", config_file, *WORDS)[0] == 0
    assert len(asked) == len(set(asked))
    plans = [PruningPlan.read(tmp_path / name / "unet" / "pruning_plan.json") for name in ("whole", "pruned")]
    assert plans[0] == plans[1]
    assert plans[0].allocation is not None
    assert plans[0].allocation.measured


def test_damaged_progress_and_what_cannot_be_measured_are_refused(
    run: Any, config_file: Path, trials: Trials, tmp_path: Path
) -> None:
    file = tmp_path / "allocation-0.json"
    file.write_text("[1]")
    with pytest.raises(BadInput, match="not the progress of an allocation"):
        Answers(trials, Processes(), file).take_up()
    code, _, err = run("prune", config_file, *WORDS, "--set", "compensate=false")
    assert code == 2
    assert "allocation: measured compares compensated models" in err
    with pytest.raises(BadInput, match="make_plan takes linear and uniform"):
        dp.make_plan(make_unet(), "magnitude", macs_target=0.5, allocation="measured")


def test_what_was_measured_is_not_measured_again_where_a_run_dies_after_it(
    run: Any, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("diffprune_plugin.workflow.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("prune", config_file, *WORDS)[0] == 130
    monkeypatch.setattr(Answers, "error", lambda *_: pytest.fail("tried again"))
    monkeypatch.setattr(Run, "add", lambda *_: pytest.fail("a pass again"))
    code, _, err = run("prune", config_file, *WORDS)
    assert code == 0, err
    assert [path.name for path in config_file.parent.glob(".*")] == []


def test_memory_that_does_not_suffice_for_trials_is_told_with_what_helps(run, config_file, monkeypatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Trials, "of", fails)
    code, _, err = run("prune", config_file, *WORDS)
    assert code == 2
    assert "out of memory while plans are tried; say 'allocation: linear'" in err


@pytest.mark.slow
def test_two_processes_give_the_plan_of_one(config_file: Path, tmp_path: Path) -> None:
    for name, how in (("one", ONE), ("two", TWO)):
        words = ["-m", "diffprune_plugin", "prune", config_file, *WORDS, "--output", tmp_path / name]
        done = call(*LAUNCH, *how, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    plans = [PruningPlan.read(tmp_path / name / "unet" / "pruning_plan.json") for name in ("one", "two")]
    assert plans[0].removed_units() == plans[1].removed_units()
    assert plans[0].allocation.measured == pytest.approx(plans[1].allocation.measured)
