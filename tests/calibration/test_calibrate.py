"""Calibration: deterministic, resumable to the bit, and loud about what is wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from tiny import FAST, SMALL, make_unet

import diffprune_plugin as dp
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.calibration.gradients import GradientSums
from diffprune_plugin.calibration.parts import parts_of
from diffprune_plugin.calibration.progress import Progress
from diffprune_plugin.calibration.timesteps import above_threshold, share, strata
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.criteria.timestep_weights import alphas_of
from diffprune_plugin.diffusion.loss import min_snr_weights, noise_prediction_loss, target_of
from diffprune_plugin.diffusion.schedulers import noise_form, trained_for, training_scheduler
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.plugins import weights_of_timesteps
from diffprune_plugin.sensitivity.linear import measure_sensitivity


def same_bits(first: Calibration, second: Calibration) -> bool:
    return first.gradients.keys() == second.gradients.keys() and all(
        torch.equal(first.gradients[name], second.gradients[name]) for name in first.gradients
    )


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(unet, scheduler, images) -> None:
    first, again, other = (dp.calibrate(unet, scheduler, images, SMALL, seed=s, **FAST) for s in (1, 1, 2))
    assert same_bits(first, again)
    assert np.array_equal(first.loss, again.loss)
    assert not same_bits(first, other)


def test_the_batch_size_changes_nothing_but_rounding(unet, scheduler, images) -> None:
    one, five = (dp.calibrate(unet, scheduler, images, SMALL, **{**FAST, "batch_size": b}) for b in (1, 5))
    np.testing.assert_allclose(one.loss, five.loss, rtol=1e-5)
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(gradient, five.gradients[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("accumulate", ["sum", "square"])
def test_so_many_blocks_at_once_give_the_same_gradients(unet, scheduler, images, blocks, accumulate) -> None:
    """The parts are all parameters, each once, and a pass leaves gradients in its own part alone."""
    sweep = Sweep(samples=8, curve_samples=2, accumulate=accumulate)
    whole = dp.calibrate(unet, scheduler, images, sweep, **FAST)
    parts = parts_of(unet, blocks)
    assert len(parts) == math.ceil(4 / blocks), "two blocks down, two up"
    assert sorted(name for part in parts for name in part) == sorted(name for name, _ in unet.named_parameters())
    seen: list[set[str]] = []
    finish = GradientSums.finish

    def watched(sums: GradientSums, processes: Any) -> None:
        seen.append(set(sums.totals))
        finish(sums, processes)

    with mock.patch.object(GradientSums, "finish", watched):
        found = dp.calibrate(unet, scheduler, images, sweep, **FAST, blocks_at_once=blocks)
    assert all(names <= part for names, part in zip(seen, parts, strict=True))
    assert found.gradients.keys() == whole.gradients.keys()
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-5, atol=1e-9)
    assert found.backward == len(parts) * whole.backward
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_stopped_between_two_parts_it_goes_on_to_the_same_bits(unet, scheduler, images, tmp_path) -> None:
    asked = {**FAST, "blocks_at_once": 1}
    unbroken = dp.calibrate(unet, scheduler, images, SMALL, **asked)
    write, count = Progress.write, iter(range(100))

    def stop(progress: Progress, tensors: dict[str, torch.Tensor]) -> None:
        write(progress, tensors)
        if progress.part == 2 and next(count) == 1:
            raise KeyboardInterrupt

    stored = {"checkpoint": tmp_path, "checkpoint_seconds": 0}
    with mock.patch.object(Progress, "write", stop), pytest.raises(KeyboardInterrupt):
        dp.calibrate(unet, scheduler, images, SMALL, **asked, **stored)
    assert list(tmp_path.glob("progress-*"))
    assert same_bits(unbroken, dp.calibrate(unet, scheduler, images, SMALL, **asked, **stored))


def test_blocks_at_once_is_refused_where_there_is_nothing_to_take_apart(unet, scheduler, images) -> None:
    with pytest.raises(BadInput, match="blocks_at_once: 2: the authors' loop"):
        dp.calibrate(unet, scheduler, images, Sweep(sampling="reference"), **FAST, blocks_at_once=2)
    with pytest.raises(BadInput, match="blocks_at_once: 1: Linear has no list of blocks"):
        parts_of(torch.nn.Linear(2, 2), 1)


def test_the_unet_is_left_as_it_was(unet, scheduler, images) -> None:
    unet.train()
    unet.conv_in.weight.requires_grad_(False)
    unet.conv_out.weight.grad = torch.ones_like(unet.conv_out.weight)
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    calibration = dp.calibrate(unet, scheduler, images, SMALL, **FAST)
    assert unet.training
    assert not unet.conv_in.weight.requires_grad
    assert unet.conv_in.weight.grad is None
    assert unet.conv_out.weight.grad.eq(1).all()
    assert all(torch.equal(before[name], p) for name, p in unet.named_parameters())
    assert "conv_in.weight" in calibration.gradients


# Where a process of its own finds this file and what it imports.
PLACES = os.pathsep.join(map(str, Path(__file__).parents[:2]))
VICTIM = """
import os, sys, time, torch
from pathlib import Path
from typing import Any
from unittest import mock
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_calibrate import calibrate_slowly
calibrate_slowly(sys.argv[2], Path("progress"), 0.5)
"""


def calibrate_slowly(sampling: str, checkpoint: Path | None, pause: float) -> Calibration:
    """A short calibration that stores its progress at every batch and rests before each batch with gradients."""
    sweep = Sweep(samples=12, curve_samples=2, sampling=sampling, threshold=0.0)
    scheduler = DDPMScheduler(num_train_timesteps=20)
    add_noise = scheduler.add_noise
    scheduler.add_noise = lambda *a: (time.sleep(pause * torch.is_grad_enabled()), add_noise(*a))[1]
    settings = {"batch_size": 2, "timesteps": 5, "checkpoint": checkpoint, "checkpoint_seconds": 0, "progress": False}
    return dp.calibrate(make_unet(), scheduler, "images.npz", sweep, **settings)


@pytest.mark.parametrize("sampling", ["stratified", pytest.param("reference", marks=pytest.mark.slow)])
def test_killed_at_any_point_it_resumes_to_the_same_bits(sampling, tmp_path, images, monkeypatch) -> None:
    """A process of its own is killed with SIGKILL once it has stored gradients; another goes on."""
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", images=images)
    unbroken = calibrate_slowly(sampling, None, 0)
    command = [sys.executable, "-c", VICTIM, PLACES, sampling]
    victim = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    stored = tmp_path / "progress"
    while not holds_gradients(stored) and victim.poll() is None:
        time.sleep(0.02)
    victim.kill()
    assert victim.wait() == -signal.SIGKILL
    assert list(stored.glob("progress-*"))
    resumed = calibrate_slowly(sampling, stored, 0)
    assert same_bits(unbroken, resumed)
    assert np.array_equal(unbroken.loss, resumed.loss)
    assert not list(stored.glob("progress-*")), "finished progress is cleared away"


def holds_gradients(directory: Path) -> bool:
    """Whether the stored progress is past the loss curve: its file has grown by the gradients."""
    return any(file.stat().st_size > 100_000 for file in directory.glob("progress-*"))


def test_progress_of_other_settings_is_not_taken_up(unet, scheduler, images, tmp_path) -> None:
    """Stop in the middle with one seed; a run with another gives what it gives without any progress stored."""
    stop = scheduler.add_noise
    calls = iter(range(100))
    scheduler.add_noise = lambda *a: stop(*a) if next(calls) < 4 else (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        dp.calibrate(unet, scheduler, images, SMALL, seed=1, checkpoint=tmp_path, checkpoint_seconds=0, **FAST)
    scheduler.add_noise = stop
    assert list(tmp_path.glob("progress-*"))
    other = dp.calibrate(unet, scheduler, images, SMALL, seed=2, checkpoint=tmp_path, checkpoint_seconds=0, **FAST)
    assert same_bits(other, dp.calibrate(unet, scheduler, images, SMALL, seed=2, **FAST))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_of_what_the_scheduler_says_is_predicted(kind) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=10, prediction_type=kind)
    sample, noise, t = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0), torch.tensor([4])
    alpha = scheduler.alphas_cumprod[4]
    target = {"epsilon": 2.0, "sample": 1.0, "v_prediction": float(alpha.sqrt() * 2 - (1 - alpha).sqrt())}[kind]

    def zero(noisy, timesteps, return_dict):
        return (torch.zeros_like(noisy),)

    assert noise_prediction_loss(zero, scheduler, sample, noise, t, {}).item() == pytest.approx(target**2, rel=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_threshold_is_applied_to_the_loss_of_the_noise_that_a_prediction_implies(kind) -> None:
    scheduler, generator = DDIMScheduler(prediction_type=kind), torch.Generator().manual_seed(0)
    sample, noise, miss = (torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0, 200, 600, 999])
    noisy, wrong = scheduler.add_noise(sample, noise, t), target_of(scheduler, sample, noise, t) + miss
    a = scheduler.alphas_cumprod[t].double().reshape(-1, 1, 1, 1)
    implied = {
        "epsilon": lambda: wrong,
        "v_prediction": lambda: a.sqrt() * wrong + (1 - a).sqrt() * noisy,
        "sample": lambda: (noisy - a.sqrt() * wrong) / (1 - a).sqrt(),
    }[kind]()
    expected = (implied - noise).square().flatten(1).mean(1) / miss.square().flatten(1).mean(1)
    np.testing.assert_allclose(noise_form(scheduler)[t], expected, rtol=1e-3)


def test_an_unknown_prediction_type_is_refused(unet, images) -> None:
    with pytest.raises(BadInput, match="prediction_type 'score'"):
        dp.calibrate(unet, DDPMScheduler(num_train_timesteps=10, prediction_type="score"), images, **FAST)


def test_a_sampler_in_sigmas_is_calibrated_with_its_training_noise_and_flow_matching_refused(unet, images) -> None:
    settings = {"num_train_timesteps": 100}
    euler, ddpm = (cls(**settings) for cls in (EulerDiscreteScheduler, DDPMScheduler))
    first, second = (dp.calibrate(unet, scheduler, images, SMALL, **FAST) for scheduler in (euler, ddpm))
    assert same_bits(first, second)
    with pytest.raises(BadInput, match="Scheduler has no alphas_cumprod: it is for flow matching, and a UNet2DModel"):
        dp.calibrate(unet, FlowMatchEulerDiscreteScheduler(**settings), images, SMALL, **FAST)


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(100, 0.0002, 0.03),  # by place: diffusers would take its own defaults instead
        HeunDiscreteScheduler(num_train_timesteps=100),  # whose defaults are not the DDPM's
        PNDMScheduler(100, prediction_type="v_prediction"),  # which has no velocity
        DDIMInverseScheduler(100),  # which adds no noise
        EulerDiscreteScheduler(100, trained_betas=np.linspace(1e-4, 0.02, 100, dtype=np.float32)),
    ],
)
def test_a_sampler_is_replaced_by_the_ddpm_of_its_own_betas(scheduler) -> None:
    found = training_scheduler(scheduler)
    assert type(found) is DDPMScheduler
    np.testing.assert_allclose(alphas_of(found), alphas_of(scheduler), rtol=1e-5)
    assert found.config.prediction_type == scheduler.config.prediction_type
    facts = trained_for(found)
    assert json.loads(json.dumps(facts)) == facts


def test_a_sampler_with_other_alphas_than_its_betas_give_is_refused() -> None:
    scheduler = PNDMScheduler(100)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    with pytest.raises(BadInput, match="PNDMScheduler has other alphas_cumprod than a DDPM makes of its config"):
        training_scheduler(scheduler)
    with pytest.raises(BadInput, match="EulerDiscreteScheduler is a sampler for flow matching"):
        training_scheduler(EulerDiscreteScheduler(100, prediction_type="flow_prediction"))


def test_alphas_that_noise_was_added_with_on_a_gpu_are_read_from_there() -> None:
    class OnGpu:
        """As a tensor of a GPU: numpy cannot read it, its copy on the CPU it can."""

        def __init__(self, values: torch.Tensor) -> None:
            self.cpu = lambda: values

        def __array__(self, *_: object, **__: object) -> None:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    scheduler = DDPMScheduler(100)
    expected = weights_of_timesteps("min_snr", scheduler)
    scheduler.alphas_cumprod = OnGpu(scheduler.alphas_cumprod)
    assert np.array_equal(weights_of_timesteps("min_snr", scheduler), expected)
    weights = min_snr_weights(scheduler, torch.arange(100), gamma=5.0)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)


def test_a_nan_stops_with_the_timestep_and_the_image(unet, scheduler, images) -> None:
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(
        CheckFailed, match=r"loss is nan at timestep \d+, image \d+ \(batch at sample 0 of stage curve\)"
    ):
        dp.calibrate(unet, scheduler, images, SMALL, **FAST)


def test_another_threshold_reuses_the_gradients_only_if_they_are_of_the_same_timesteps() -> None:
    curve = np.array([1.0, 0.2, 0.04])
    nothing = {"gradients": {}, "forward": 0, "backward": 0, "seed": 0, "batch_size": 1, "weights": "", "images": ""}
    calibration = Calibration(
        sweep=SMALL, timesteps=np.arange(3), loss=curve, stderr=curve, counts=above_threshold(curve, 0.05), **nothing
    )
    assert calibration.with_threshold(0.1).sweep.threshold == 0.1
    with pytest.raises(BadInput, match="keeps 1 of 3 points"):
        calibration.with_threshold(0.5)
    with pytest.raises(BadInput, match="samples 7, but calibrated with 12"):
        dp.importance("diff_taylor", calibration=calibration, samples=7)
    with pytest.raises(BadInput, match="keeps 1 of 3 points"):
        dp.importance("diff_taylor", calibration=calibration, threshold=0.9)


def test_a_saved_calibration_is_the_same_when_loaded_and_damage_is_noticed(unet, scheduler, images, tmp_path) -> None:
    calibration = dp.calibrate(unet, scheduler, images, SMALL, **FAST)
    calibration.save(tmp_path / "stored")
    loaded = Calibration.load(tmp_path / "stored")
    assert same_bits(calibration, loaded)
    assert loaded.sweep == calibration.sweep == replace(SMALL, condition_dropout=0.0)
    weights = tmp_path / "stored" / "gradients.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadInput, match="truncated or damaged"):
        Calibration.load(tmp_path / "stored")


def test_altered_files_and_those_of_two_calibrations_or_of_an_older_version_are_refused(
    unet, scheduler, images, tmp_path
) -> None:
    for seed, name in enumerate(("one", "two")):
        dp.calibrate(unet, scheduler, images, SMALL, seed=seed, **FAST).save(tmp_path / name)
    one, two = tmp_path / "one" / "calibration.json", tmp_path / "two" / "calibration.json"
    text = one.read_text()
    content = json.loads(text)
    content["loss"][0] *= 2
    old = {key: value for key, value in json.loads(text).items() if key != "sha256"}
    bad = {
        json.dumps(content): r"calibration.json: altered since it was written .*; calibrate again",
        json.dumps(old): "calibration.json: without a sha256, of an older version; calibrate again",
        two.read_text(): r"one: gradients.safetensors is of another calibration than calibration.json; calibrate",
        "[" * 100_000: "calibration.json: not valid json: nested too deeply; calibrate again",
        "[]": "one: not a calibration, or damaged",
    }
    for damaged, words in bad.items():
        one.write_text(damaged)
        with pytest.raises(BadInput, match=words):
            Calibration.load(tmp_path / "one")
    one.write_text(text)
    assert Calibration.load(tmp_path / "one").seed == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timesteps": 101}, "outside 1..100"),
        ({"timesteps": 0}, "outside 1..100"),
        ({"batch_size": 0}, "below 1"),
    ],
)
def test_impossible_settings_are_refused(unet, scheduler, images, change, words) -> None:
    with pytest.raises(BadInput, match=words):
        dp.calibrate(unet, scheduler, images, **{**FAST, **change})


def test_images_of_another_size_and_missing_labels_are_refused(scheduler, images) -> None:
    with pytest.raises(BadInput, match=r"samples are \(1, 16, 16\).*the UNet takes \(3, 16, 16\)"):
        dp.calibrate(make_unet(in_channels=3, out_channels=3), scheduler, images, **FAST)
    with pytest.raises(BadInput, match="class_labels"):
        dp.calibrate(make_unet(num_class_embeds=4), scheduler, images, **FAST)


def test_class_labels_come_from_the_npz(scheduler, images, tmp_path) -> None:
    np.savez(tmp_path / "labelled.npz", images=images, class_labels=np.arange(16) % 4)
    calibration = dp.calibrate(make_unet(num_class_embeds=4), scheduler, tmp_path / "labelled.npz", SMALL, **FAST)
    assert calibration.gradients["class_embedding.weight"].abs().sum(1).gt(0).sum() > 1


def test_the_threshold_keeps_what_is_above_its_share_of_the_largest_loss() -> None:
    loss = np.array([2.0, 1.0, 0.1, 0.05])
    assert above_threshold(loss, 0.05).tolist() == [True, True, False, False]
    assert above_threshold(loss, 0.0).all()
    assert above_threshold(loss, 1.0).tolist() == [True, False, False, False]


def test_strata_and_shares_cover_every_timestep_once() -> None:
    assert np.concatenate(strata(10, 3)).tolist() == list(range(10))
    assert [len(s) for s in strata(10, 3)] == [4, 3, 3]
    kept = np.arange(10)
    assert np.concatenate([share(kept, i, 5) for i in range(5)]).tolist() == list(range(10))
    assert [share(kept, i, 20).tolist() for i in range(4)] == [[0], [0], [1], [1]]


@pytest.mark.parametrize("away", ["never loaded", "offloaded"])
def test_a_model_whose_numbers_are_not_there_is_refused_in_one_line(away, scheduler, images, tmp_path) -> None:
    unet = make_unet()
    if away == "offloaded":
        cpu_offload(unet, torch.device("cpu"))
    else:
        unet.to("meta")
    told = "carries Accelerate's AlignDevicesHook" if away == "offloaded" else "is on torch's meta device"
    options = {"samples": 2, "progress": False}
    for call in (
        lambda: dp.make_plan(unet, "magnitude", pruning_ratio=0.3),
        lambda: dp.calibrate(unet, scheduler, images, SMALL, **FAST),
        lambda: measure_sensitivity(unet, scheduler, images, **options),
    ):
        with pytest.raises(BadInput, match=told):
            call()
    with pytest.raises(BadInput, match=r"^\S+ is on torch's meta device.*load the weights first.*remove_all_hooks"):
        dp.save(unet, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 2.5}, {"batch_size": "8"}, {"timesteps": "3"}, {"blocks_at_once": -1}]
)
def test_a_number_that_is_none_is_told(unet, scheduler, images, wrong) -> None:
    with pytest.raises(BadInput, match=f"calibration: {next(iter(wrong))} .* no whole number of at least 1"):
        dp.calibrate(unet, scheduler, images, **wrong)
