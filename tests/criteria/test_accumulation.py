"""What is accumulated over timesteps, and with which weights, against hand-written loops."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from test_criteria import TwoLayers, hidden_group, oracle_score
from tiny import make_unet

import diffprune_plugin as dp
from diffprune_plugin import hookspecs
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.diffusion.loss import noise_prediction_loss
from diffprune_plugin.errors import BadInput, MissingGradients
from diffprune_plugin.graph.groups import trace_groups
from diffprune_plugin.plugins import plugin_manager, weights_of_timesteps

FAST = {"batch_size": 2, "timesteps": 5, "progress": False}


def calibrated(sweep: Sweep, scheduler: Any, images: Any, **settings: Any) -> tuple[Calibration, list[Any], Any]:
    """A calibration, the (clean, noise, timesteps) of every pass with gradients, and the UNet."""
    unet, seen, add_noise = make_unet(), [], scheduler.add_noise
    scheduler.add_noise = lambda *a: (seen.append(a) if torch.is_grad_enabled() else None) or add_noise(*a)
    calibration = dp.calibrate(unet, scheduler, images, sweep, **{**FAST, **settings})
    scheduler.add_noise = add_noise
    return calibration, seen, unet


def gradient(unet: Any, scheduler: Any, clean: Any, noise: Any, timesteps: Any) -> dict[str, torch.Tensor]:
    """Of the mean loss of these samples."""
    unet.zero_grad()
    noise_prediction_loss(unet, scheduler, clean, noise, timesteps, {}).mean().backward()
    return {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal up to rounding, which also leaves its traces where a gradient is zero (the keys' biases)."""
    assert found.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=1e-6 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("name", "power"), [("fisher", 2), ("taylor_absolute", 1)])
def test_powers_of_micro_batches_are_summed_as_in_the_hand_written_loop(
    name: str, power: int, images: np.ndarray, scheduler: DDPMScheduler
) -> None:
    """Micro-batches of three in passes of two and one; the timesteps weigh differently."""
    options = {"samples": 10, "curve_samples": 2, "micro_batch": 3, "timestep_weights": "log_decrease"}
    criterion = dp.importance(name, normalizer=None, **options)
    calibration, seen, unet = calibrated(criterion.sweep, scheduler, images)
    clean, noise, timesteps = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert len(clean) == calibration.backward == 9, "whole micro-batches"
    expected = {key: torch.zeros_like(value) for key, value in unet.named_parameters()}
    summed = {key: torch.zeros_like(value) for key, value in unet.named_parameters()}
    for rows in (slice(0, 3), slice(3, 6), slice(6, 9)):
        (t,) = set(timesteps[rows].tolist())
        weight = 0.8 + 0.4 * math.log(1 + t) / math.log(100)
        for key, value in gradient(unet, scheduler, clean[rows], noise[rows], timesteps[rows]).items():
            expected[key] += 100 / 3 * weight * value.abs() ** power
            summed[key] += 100 / 3 * weight * value
    same(calibration.gradients, expected)
    with pytest.raises(AssertionError):  # the power is taken before the sum, not after
        same(calibration.gradients, {key: value.abs() ** power for key, value in summed.items()})
    criterion.calibration = calibration
    root = {key: value.detach().abs() ** power for key, value in unet.named_parameters()}
    for group in trace_groups(unet, UNET_2D):
        score = torch.tensor(oracle_score(group, calibration.gradients, root, 1))
        torch.testing.assert_close(criterion(group.graph_group), score, rtol=0, atol=1e-5 * score.max().item())


def test_the_authors_loop_takes_each_pass_as_a_micro_batch(images: np.ndarray) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=6)
    sweep = Sweep(accumulate="square", sampling="reference", threshold=0.0, timestep_weights="min_snr")
    calibration, seen, unet = calibrated(sweep, scheduler, images, timesteps=None)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    expected = {key: torch.zeros_like(value) for key, value in unet.named_parameters()}
    for t, batch in enumerate(seen):
        for key, value in gradient(unet, scheduler, *batch).items():
            expected[key] += min(1.0, 5 / snr[t].item()) * value**2
    same(calibration.gradients, expected)


def test_weights_scale_each_timesteps_gradient_in_the_plain_sum(images: np.ndarray, scheduler: DDPMScheduler) -> None:
    sweep = Sweep(samples=6, curve_samples=2, threshold=0.0, timestep_weights="log_decrease")
    calibration, seen, unet = calibrated(sweep, scheduler, images)
    expected = {key: torch.zeros_like(value) for key, value in unet.named_parameters()}
    for batch in seen:
        for i in range(len(batch[0])):
            weight = 0.8 + 0.4 * math.log(1 + int(batch[2][i])) / math.log(100)
            for key, value in gradient(unet, scheduler, *(part[i : i + 1] for part in batch)).items():
                expected[key] += weight * 100 / 6 * value
    same(calibration.gradients, expected)


def test_the_rule_of_flow_matching_is_told_that_it_is_one() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=10)
    sigma = np.arange(1, 11) / 10
    expected = np.minimum(((1 - sigma) / sigma) ** 2, 5) * sigma**2
    np.testing.assert_allclose(weights_of_timesteps("min_snr", scheduler), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_predicted_samples_loss_by_at_most_five(kind: str) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=50, prediction_type=kind)
    weights = weights_of_timesteps("min_snr", scheduler)
    for t, alpha in enumerate(scheduler.alphas_cumprod.tolist()):
        snr = alpha / (1 - alpha)
        by_hand = min(snr, 5) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
        assert weights[t] == pytest.approx(by_hand, rel=1e-4)


def test_the_batch_size_changes_no_power_but_by_rounding(images: np.ndarray, scheduler: DDPMScheduler) -> None:
    sweep = Sweep(samples=8, curve_samples=1, accumulate="absolute", micro_batch=4)
    one, four = (calibrated(sweep, scheduler, images, batch_size=size)[0] for size in (1, 4))
    same(one.gradients, four.gradients)


@pytest.mark.parametrize("passes", [1, 4, 5])
def test_interrupted_in_or_after_a_micro_batch_it_resumes_to_the_same_bits(
    images: np.ndarray, scheduler: DDPMScheduler, tmp_path: Path, passes: int
) -> None:
    """Three micro-batches of three samples, in passes of two and one."""
    sweep = Sweep(samples=9, curve_samples=1, accumulate="square", micro_batch=3)
    unbroken = calibrated(sweep, scheduler, images)[0].gradients
    add_noise, left = scheduler.add_noise, iter(range(passes))

    def interrupted(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and next(left, None) is None:
            raise KeyboardInterrupt
        return add_noise(*inputs)

    scheduler.add_noise = interrupted
    stored = {"checkpoint": tmp_path, "checkpoint_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        dp.calibrate(make_unet(), scheduler, images, sweep, **FAST, **stored)
    scheduler.add_noise = add_noise
    resumed, seen, _ = calibrated(sweep, scheduler, images, **stored)
    assert len(seen) == 6 - passes // 2 * 2
    assert all(torch.equal(resumed.gradients[name], value) for name, value in unbroken.items())


def test_a_plugin_brings_weights_of_its_own(images: np.ndarray, scheduler: DDPMScheduler) -> None:
    plugins = plugin_manager(entry_points=False)
    plugins.register(offering("last", lambda alphas, kind: np.arange(len(alphas))), "mine", "mine", "1")
    plugins.register(offering("short", lambda alphas, kind: np.ones(3)), "wrong", "wrong", "1")
    plugins.register(offering("minus", lambda alphas, kind: -alphas), "minus", "minus", "1")
    assert weights_of_timesteps("last", scheduler, plugins)[-1] == 99
    wrong = {"complex": lambda alphas, kind: 1j * alphas, "none": lambda *given: None, "words": lambda *given: "one"}
    for name, rule in {**wrong, "raising": lambda alphas, kind: 1 / 0, "ending": lambda *given: sys.exit(0)}.items():
        plugins.register(offering(name, rule), name, name, "1")
    plugins.register(offering("backwards", lambda alphas, kind: alphas[::-1].astype(np.longdouble)), "b", "b", "1")
    assert torch.from_numpy(weights_of_timesteps("backwards", scheduler, plugins))[0] < 1
    for name in ("short", "minus", *wrong, "raising", "ending"):
        with pytest.raises(BadInput, match=rf"timestep_weights '{name}' of \w+ .*mend the plugin"):
            weights_of_timesteps(name, scheduler, plugins)
    assert dp.importance("fisher", timestep_weights="last", plugins=plugins).sweep.timestep_weights == "last"
    with pytest.raises(BadInput, match=r"'min-snr'; did you mean 'min_snr'\?; known: log_decrease, min_snr, uniform"):
        calibrated(Sweep(timestep_weights="min-snr"), scheduler, images)


def offering(name: str, rule: Any) -> Any:
    @hookspecs.hookimpl
    def diffprune_register_timestep_weights(register: Any) -> None:
        register(name, rule)

    return SimpleNamespace(diffprune_register_timestep_weights=diffprune_register_timestep_weights)


def test_the_file_says_what_was_accumulated(images: np.ndarray, scheduler: DDPMScheduler, tmp_path: Path) -> None:
    sweep = Sweep(samples=4, curve_samples=1, accumulate="square", micro_batch=2)
    calibrated(sweep, scheduler, images)[0].save(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "calibration.json").read_text())["sweep"]["accumulate"] == "square"
    loaded = Calibration.load(tmp_path / "new").sweep
    assert (loaded.accumulate, loaded.micro_batch) == ("square", 2)


def test_gradients_of_one_kind_are_never_scored_as_another(images: np.ndarray, scheduler: DDPMScheduler) -> None:
    squares = calibrated(Sweep(samples=2, curve_samples=1, accumulate="square", micro_batch=2), scheduler, images)[0]
    for name in ("diff_taylor", "taylor"):
        with pytest.raises(BadInput, match="accumulate 'sum', but calibrated with 'square'"):
            dp.importance(name, calibration=squares)
    with pytest.raises(MissingGradients):  # .grad holds a sum
        dp.importance("fisher")(hidden_group(TwoLayers()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate": "squares"}, "did you mean 'square'"),
        ({"accumulate": "square", "power": 2}, "power 2 is for accumulate 'sum'"),
        ({"accumulate": "square", "samples": 4}, "micro_batch 8 is more than samples 4"),
        ({"micro_batch": 0}, r"micro_batch 0 is outside \[1, 65536\]"),
        ({"micro_batch": True}, "micro_batch True is no int"),
        ({"timestep_weights": 3}, "timestep_weights 3 is no str"),
        ({"timestep_weights": "min-snr"}, r"'min-snr'; did you mean 'min_snr'\?; known: log_decrease"),
    ],
)
def test_a_wrong_option_is_one_clear_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        dp.importance("diff_taylor", **options)
    with pytest.raises(BadInput, match="this criterion's is 'square'"):
        dp.importance("fisher", accumulate="sum")


def test_a_config_names_the_criterion_and_its_weights(run: Any, config_file: Path, tmp_path: Path) -> None:
    importance = "importance={name: fisher, samples: 8, micro_batch: 2, curve_samples: 1, timestep_weights: min_snr}"
    assert run("prune", config_file, "--set", importance, "--set", "compensate=false")[0] == 0
    assert (
        json.loads((tmp_path / "pruned" / "unet" / "pruning_plan.json").read_text())["criterion"]["accumulate"]
        == "square"
    )
