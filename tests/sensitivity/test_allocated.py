"""A target spent by the sensitivity: through make_plan and the whole of `diffprune prune`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from tiny import FAST, make_unet, output_of
from tiny_transformers import make as make_transformer

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.allocated import choices
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.planning.planner import material_of
from diffprune_plugin.planning.widths import Fit
from diffprune_plugin.sensitivity.linear import measure_sensitivity
from diffprune_plugin.sensitivity.sensitivity import Sensitivity


@pytest.fixture(scope="module")
def sensitivity(images: np.ndarray) -> Sensitivity:
    scheduler = DDPMScheduler(num_train_timesteps=20)
    return measure_sensitivity(make_unet(), scheduler, images, samples=4, probes=2, progress=False)


def left(plan: PruningPlan, key: str) -> float:
    before, after = getattr(plan, key)
    return float(after / before)


def planted(sensitivity: Sensitivity, root: str, factor: float) -> Sensitivity:
    """The same with one group's errors times a factor."""
    values = tuple(factor * value for value in sensitivity.scores[root])
    return Sensitivity(**{**sensitivity.__dict__, "scores": {**sensitivity.scores, root: values}})


@pytest.mark.parametrize(
    "target", [{"macs_target": 0.6}, {"params_target": 0.5}, {"macs_target": 0.7, "params_target": 0.4}]
)
def test_a_target_is_met_with_less_predicted_error_than_by_one_ratio(
    target: dict[str, float], sensitivity: Any
) -> None:
    plan = dp.make_plan(make_unet(), "magnitude", sensitivity=sensitivity, allocation="linear", **target)
    for key, share in target.items():
        assert left(plan, key.removesuffix("_target")) <= share + 1e-3
    assert plan.allocation.error == pytest.approx(sum(plan.allocation.errors.values()))
    assert plan.allocation.sensitivity == sensitivity.sha256
    assert all(g.reason for g in plan.groups)
    if len(target) == 1:
        uniform = dp.make_plan(make_unet(), "magnitude", **target)
        assert plan.allocation.error < 0.7 * sum(sensitivity.error(g.root, g.removed) for g in uniform.groups)


def test_masks_torch_pruning_and_nncf_take_an_allocation_as_they_take_ratios(sensitivity: Sensitivity) -> None:
    asked: dict[str, Any] = {"macs_target": 0.6, "sensitivity": sensitivity}
    plan = dp.make_plan(make_unet(), "magnitude", **asked)
    removed, shares = plan.removed_units(), {len(group.removed) / group.units for group in plan.groups}
    assert len(shares) > 3
    unet = make_unet()
    pruner = dp.Pruner(
        unet, UNET_2D.example_inputs(unet), "magnitude", pruning_ratio=0.0, pruning_ratio_dict=plan.ratios()
    )
    pruner.step()
    assert pruner.plan.removed_units() == removed
    by_ratios = dp.make_plan(make_unet(), "magnitude", pruning_ratio=0.0, pruning_ratio_dict=plan.ratios())
    assert by_ratios.removed_units() == removed
    masked = make_unet()
    dp.mask_(masked, plan)
    small = make_unet()
    dp.remove_(small, plan)
    assert torch.allclose(output_of(masked), output_of(small), atol=1e-5)
    assert dp.nncf_prune(make_unet(), "magnitude", **asked).mask_report.plan.removed_units() == removed


@pytest.mark.parametrize("name", ["random", "magnitude", "filter_norm", "taylor", "fisher"])
def test_any_criterion_ranks_inside_the_groups(name: str, sensitivity: Sensitivity, images: np.ndarray) -> None:
    unet, criterion = make_unet(), dp.importance(name)
    if hasattr(criterion, "sweep"):
        scheduler = DDPMScheduler(num_train_timesteps=20)
        sweep = replace(criterion.sweep, samples=8, curve_samples=2)
        criterion.calibration = dp.calibrate(unet, scheduler, images, sweep, **FAST)
    plan = dp.make_plan(unet, criterion, sensitivity=sensitivity, macs_target=0.6)
    assert left(plan, "macs") == pytest.approx(0.6, abs=0.01)
    uniform = dp.make_plan(unet, criterion, macs_target=0.6)
    assert plan.allocation.error < sum(sensitivity.error(g.root, g.removed) for g in uniform.groups)


def test_a_planted_insensitive_group_is_emptied_first_and_a_critical_one_stays(sensitivity: Sensitivity) -> None:
    root = "down_blocks.1.resnets.0.conv1"
    for factor, most in ((1e-9, True), (1e9, False)):
        plan = dp.make_plan(make_unet(), "magnitude", sensitivity=planted(sensitivity, root, factor), macs_target=0.7)
        group = next(g for g in plan.groups if g.root == root)
        assert len(group.removed) == (0.75 * group.units if most else 0)


def test_what_is_asked_of_single_groups_holds(sensitivity: Sensitivity) -> None:
    asked = {"ignored_layers": ["mid_block.*"], "pruning_ratio_dict": {"down_blocks.0.resnets.0.conv1": 0.5}}
    asked |= {"max_pruning_ratio": 0.5, "round_to": 8}
    plan = dp.make_plan(make_unet(), "magnitude", sensitivity=sensitivity, macs_target=0.75, **asked)
    groups = {g.root: g for g in plan.groups}
    assert not groups["mid_block.resnets.0.conv1"].removed
    assert len(groups["down_blocks.0.resnets.0.conv1"].removed) == 8
    assert all(len(g.removed) <= g.units / 2 for g in plan.groups)
    assert all((g.units - len(g.removed)) % 8 == 0 for g in plan.groups if g.removed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"macs_target": 0.5, "allocation": "linear"}, "allocation: linear needs a sensitivity"),
        (
            {"allocation": "linear"},
            "linear spends a budget; add macs_target, params_target, latency_target or max_latency_ms",
        ),
        ({"macs_target": 0.5, "allocation": "linear", "global_pruning": True}, "drop one"),
        ({"macs_target": 0.5, "params_target": 0.5}, "say allocation: linear, which holds all of them"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        dp.make_plan(make_unet(), "magnitude", **options)


def test_a_target_below_all_widths_is_refused_with_the_least(sensitivity: Sensitivity) -> None:
    with pytest.raises(BadInput, match=r"macs_target: 0.01 cannot be reached: it is below 0\.\d+ of the dense"):
        dp.make_plan(make_unet(), "magnitude", sensitivity=sensitivity, macs_target=0.01)


def test_the_target_that_cannot_be_reached_is_named_and_one_ratio_only_where_it_helps(sensitivity: Sensitivity) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(BadInput) as error:
            dp.make_plan(make_unet(), "magnitude", sensitivity=sensitivity, **options)
        return str(error.value)

    both = refused(macs_target=0.5, params_target=0.01, allocation="linear")
    assert both.startswith("params_target: 0.01 cannot be reached")
    assert "uniform" not in both
    between = 0.127  # of the least by one ratio, 0.126, and that by allocation, 0.128
    assert refused(macs_target=between).endswith("raise it, or say allocation: uniform, which reaches further")
    assert dp.make_plan(make_unet(), "magnitude", macs_target=between, allocation="uniform").macs[1]
    assert "uniform" not in refused(macs_target=0.3, max_pruning_ratio=0.1)


def test_of_two_targets_one_that_is_held_with_room_is_no_miss_but_both_missed_are(sensitivity: Sensitivity) -> None:
    options: dict[str, Any] = {"sensitivity": sensitivity, "allocation": "linear"}
    plan = dp.make_plan(make_unet(), "magnitude", macs_target=0.6, params_target=0.9, strict=True, **options)
    assert plan.params[1] < 0.89 * plan.params[0]
    assert not plan.shortfalls()

    def missed(**target: float) -> list[str]:
        lines = plan.model_copy(update={"target": target}).shortfalls()
        assert all("allow no nearer size below it" in line for line in lines)
        return [line.split(":")[0] for line in lines]

    assert missed(macs_target=0.8, params_target=0.9) == ["macs_target", "params_target"]  # neither is met
    assert missed(macs_target=0.6, params_target=0.1) == ["params_target"]  # a limit that is not held


def test_a_width_that_is_no_multiple_can_come_down_to_every_multiple() -> None:
    assert list(Fit(8).counts(20, 15)) == [4, 12]  # 16 and 8 are left
    assert list(Fit(8).counts(16, 12)) == [0, 8]


def test_a_config_with_a_target_and_images_is_allocated_and_another_budget_needs_no_new_pass(
    run: Any, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "sensitivity.json"
    words = ["--set", f"sensitivity={stored}", "--set", "sensitivity_samples=4", "--set", "sensitivity_probes=1"]
    code, out, err = run("prune", config_file, *words, "--set", "macs_target=0.7", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["allocation"]["sensitivity"] == Sensitivity.load(stored).sha256
    assert PruningPlan.read(tmp_path / "pruned" / "unet" / "pruning_plan.json").allocation is not None
    monkeypatch.setattr("diffprune_plugin.sensitivity.stored.measure_sensitivity", lambda *a, **k: pytest.fail("again"))
    more = ["--set", "params_target=0.5", "--dry-run", "--plot", tmp_path / "widths.png"]
    assert run("prune", config_file, *words, *more, "--json")[0] == 0
    assert Image.open(tmp_path / "widths.png").size[0] > 600, "no heat map"
    assert run("prune", config_file, *words, *more)[0] == 2
    code, _, err = run("prune", config_file, *words, "--set", "params_target=0.5", "--set", "seed=3", "--dry-run")
    assert code == 2
    assert "measured with other seed" in err


def test_uniform_and_a_plain_ratio_need_no_sensitivity(run: Any, config_file: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("diffprune_plugin.sensitivity.stored.measure_sensitivity", lambda *a, **k: pytest.fail("made"))
    for setting in (
        ["macs_target=0.7", "allocation=uniform"],
        ["pruning_ratio=0.3"],
        ["macs_target=0.7", "global_pruning=true"],
    ):
        words = [word for value in setting for word in ("--set", value)]
        code, out, err = run("prune", config_file, *words, "--dry-run", "--json")
        assert code == 0, err
        assert json.loads(out)["allocation"] is None


def test_linear_without_images_is_refused(dense_dir: Path) -> None:
    config = PruningConfig(model=str(dense_dir), importance={"name": "magnitude"}, macs_target=0.5, allocation="linear")
    from diffprune_plugin.workflow import prune

    with pytest.raises(BadInput, match="allocation: linear needs 'data' and a pipeline directory"):
        prune(config, dry_run=True)


@pytest.mark.parametrize("asked", [{"max_pruning_ratio": 0.3}, {"max_pruning_ratio": 0.1}, {"round_to": 16}])
def test_no_choice_of_width_is_beyond_what_a_group_may_lose_whole_heads_as_well(asked: dict[str, Any]) -> None:
    options = PlanOptions(macs_target=0.5, **asked)
    material = material_of(options, make_transformer("SD 3"), dp.importance("magnitude"))
    found = [(item, plans) for item, plans in zip(material.items, choices(material.items, options, 0.75), strict=True)]
    assert any(item.heads for item, _ in found)
    for item, plans in found:
        most, multiple = options.max_pruning_ratio * item.group.units, asked.get("round_to", 1)
        assert all(lost <= most for lost in plans), item.group.root
        assert all((item.group.units - lost) % multiple == 0 for lost in plans), item.group.root
    assert any(len(plans) > 1 for item, plans in found if item.heads) == (options.max_pruning_ratio > 0.25)
