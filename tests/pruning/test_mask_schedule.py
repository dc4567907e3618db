"""Masks that follow a schedule: nested, at the schedule's level, and removable at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import make_unet, output_of

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.config.dialects.nncf_schedules import levels
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.criteria.taylor import TaylorImportance
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.pruning.mask_schedule import at_dense_scale
from diffprune_plugin.pruning.masked_layers import STOCK, KeptQuery

nncf = pytest.importorskip("nncf")
from nncf.torch.function_hook.pruning.scheduler_fns import exponential_ratio_scheduler  # noqa: E402

LEVELS = levels("exponential", pruning_init=0.1, pruning_target=0.6, pruning_steps=4)

SWEEP = Sweep(samples=8, curve_samples=2)


def train(unet: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = UNET_2D.example_inputs(unet, batch=2, seed=seed)
    optimizer.zero_grad()
    (unet(**inputs).sample - inputs["sample"].roll(1, -1)).square().mean().backward()
    optimizer.step()


def removed_by(plan: dp.PruningPlan) -> dict[str, set[int]]:
    return {root: set(units) for root, units in plan.removed_units().items()}


@pytest.mark.parametrize("options", [{}, {"global_pruning": True}], ids=["local", "global"])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_over_a_schedule_what_was_masked_stays_masked_and_the_end_is_removed_exactly(unet, criterion, options) -> None:
    """Random scores change with nothing, magnitudes with training: both have to stay nested."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    schedule = dp.MaskSchedule(unet, LEVELS, criterion, **options)
    before: dict[str, set[int]] = {}
    for epoch, level in enumerate(LEVELS):
        report = schedule.step()
        assert report.plan is schedule.plan is unet.mask_report.plan
        assert report.plan.pruning_ratio == schedule.current_ratio == level
        now = removed_by(report.plan)
        assert all(before.get(root, set()) <= now[root] for root in now)
        assert sum(map(len, now.values())) > sum(map(len, before.values()))
        dense, left = report.plan.params
        assert nncf.pruning_statistic(unet).global_pruning_ratio == (dense - left) / dense
        before = now
        train(unet, optimizer, seed=epoch)
    assert schedule.step() is None  # the schedule is at its end
    expected = output_of(unet)
    dp.remove_(unet, dp.fold_(unet).plan)
    torch.testing.assert_close(output_of(unet), expected, rtol=0, atol=1e-5)


def test_nncfs_own_schedule_drives_it_and_a_level_that_does_not_grow_changes_nothing(unet) -> None:
    theirs = [exponential_ratio_scheduler(e, initial_ratio=0.1, target_ratio=0.6, target_epoch=3) for e in range(4)]
    assert theirs == pytest.approx(LEVELS)
    schedule = dp.MaskSchedule(unet, [theirs[0], 0.0, theirs[0], *theirs[1:]], "magnitude")
    first = schedule.step()
    assert [schedule.step(), schedule.step()] == [None, None]
    assert unet.mask_report is first
    assert schedule.step(epoch=5).plan.pruning_ratio == theirs[3]
    assert schedule.step() is None
    assert schedule.step(epoch=99) is None


def test_each_growth_calibrates_the_masked_model_anew_and_scores_what_the_masks_leave(images) -> None:
    """The gradient comes from the masked UNet; what training did under the masks is gone before anything is scored."""
    unet, seen, calls = make_unet(), [], []

    class Watched(TaylorImportance):
        def __call__(self, group: Any) -> torch.Tensor | None:
            seen.append((id(self.calibration), int((unet.conv_in.weight == 0).sum())))
            return super().__call__(group)

    def calibrate(model: torch.nn.Module) -> Any:
        report = getattr(model, "mask_report", None)
        calls.append(report.plan.pruning_ratio if report else 0.0)
        return calibrated(images)(model)

    criterion = Watched(SWEEP)
    schedule = dp.MaskSchedule(unet, [0.5, 0.5, 0.6], criterion, calibrate=calibrate)
    for _ in range(3):
        schedule.step()
    assert calls == [0.0, 0.5]
    assert criterion.calibration is None
    assert len({calibration for calibration, _ in seen}) == 2
    assert seen[0][1] == 0 < seen[-1][1]


def test_a_schedule_goes_on_from_a_loaded_checkpoint(unet, tmp_path) -> None:
    straight = dp.MaskSchedule(unet, LEVELS, "magnitude")
    straight.step(0)
    dp.save_masked(unet, tmp_path / "epoch0")
    straight.step(1)
    again = make_unet()
    dp.load_masked_(again, tmp_path / "epoch0")
    resumed = dp.MaskSchedule(again, LEVELS, "magnitude")
    assert resumed.step(0) is None
    assert resumed.step(1) == unet.mask_report
    assert torch.equal(output_of(again), output_of(unet))


def test_a_level_that_would_take_masks_away_is_refused_and_leaves_them(unet) -> None:
    dp.nncf_prune(unet, "magnitude", ratio=0.1, pruning_ratio_dict={"down_blocks.1.*": 0.6})
    before, output = removed_by(unet.mask_report.plan), output_of(unet)
    schedule = dp.MaskSchedule(unet, [0.3, 0.7], "magnitude")
    with pytest.raises(BadInput, match=r"levels: 0\.3 masks fewer channels of down_blocks\S* than are masked already"):
        schedule.step()
    assert removed_by(unet.mask_report.plan) == before
    torch.testing.assert_close(output_of(unet), output, rtol=0, atol=1e-5)
    after = removed_by(schedule.step(1).plan)
    assert all(before[root] <= after[root] for root in before)


def test_a_plan_that_cannot_be_made_leaves_the_masks_as_they_were(unet) -> None:
    schedule = dp.MaskSchedule(unet, [0.3, 0.97], "magnitude")
    first, before = schedule.step(), output_of(unet)
    schedule.options["strict"] = True
    with pytest.raises(CheckFailed, match="strict"):
        schedule.step()
    assert (unet.mask_report, schedule.current_ratio) == (first, 0.3)
    torch.testing.assert_close(output_of(unet), before, rtol=0, atol=1e-5)
    fresh = make_unet()
    with pytest.raises(CheckFailed, match="strict"):
        dp.MaskSchedule(fresh, [0.97], "magnitude", strict=True).step()
    assert not any(type(layer) in STOCK for layer in fresh.modules())
    assert torch.equal(output_of(fresh), output_of(make_unet()))


@pytest.mark.parametrize(("given", "words"), [([], "levels: is empty"), ([0.1, 1.0], "levels[1]: 1.0 is outside")])
def test_levels_that_are_none_are_refused(unet, given, words) -> None:
    with pytest.raises(BadInput) as error:
        dp.MaskSchedule(unet, given, "magnitude")
    assert words in str(error.value)


def test_query_gradients_of_a_masked_unet_are_brought_to_the_dense_scale(images) -> None:
    """The oracle: the score of each weight, w * g, is the same whether the query holds w / gain or w."""
    unet = make_unet()
    schedule = dp.MaskSchedule(unet, [0.5, 0.75], "diff_taylor", calibrate=calibrated(images))
    schedule.step()
    gains = {name: m.gain for name, m in unet.named_modules() if isinstance(m, KeptQuery)}
    assert len(gains) == 4
    held = {name: unet.get_submodule(name).weight.detach().clone() for name in gains}
    raw = schedule.calibrate(unet)
    scaled = at_dense_scale(raw, gains)
    for name, gain in gains.items():
        key = f"{name}.weight"
        assert gain > 1.2
        torch.testing.assert_close(held[name] * gain * scaled.gradients[key], held[name] * raw.gradients[key])
    others = [name for name in raw.gradients if name.rpartition(".")[0] not in gains]
    assert all(torch.equal(scaled.gradients[name], raw.gradients[name]) for name in others)


def test_a_schedule_refuses_a_calibration_that_its_criterion_does_not_take(unet, images) -> None:
    with pytest.raises(BadInput, match="calibrate: GroupMagnitudeImportance takes no calibration"):
        dp.MaskSchedule(unet, [0.5], "magnitude", calibrate=calibrated(images))
    with pytest.raises(BadInput, match="accumulate 'square', but calibrated with 'sum'"):
        dp.MaskSchedule(unet, [0.5], "fisher", calibrate=calibrated(images)).step()
    schedule = dp.MaskSchedule(unet, [0.5], "magnitude")
    schedule.step()
    assert schedule.plan.criterion == {"name": "magnitude"}


def calibrated(images) -> Any:
    return lambda unet: dp.calibrate(unet, DDPMScheduler(), images, SWEEP, batch_size=8, timesteps=4, progress=False)


def test_a_step_that_fails_is_taken_again_from_the_same_gradients(unet, monkeypatch) -> None:
    schedule = dp.MaskSchedule(unet, [0.3, 0.5], TaylorImportance(SWEEP))
    unet(**UNET_2D.example_inputs(unet)).sample.square().mean().backward()
    schedule.step()
    unet(**UNET_2D.example_inputs(unet)).sample.square().mean().backward()
    before = {name: p.grad.clone() for name, p in unet.named_parameters()}

    def fails(plan: Any, ratio: float) -> None:
        raise BadInput("levels")

    monkeypatch.setattr(schedule, "check_nested", fails)
    for _ in range(2):
        with pytest.raises(BadInput, match="levels"):
            schedule.step()
        assert schedule.epoch == 1
        assert all(torch.equal(p.grad, before[name]) for name, p in unet.named_parameters())
