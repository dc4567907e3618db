"""UNets that take more channels than they predict: noise and target are the first ones, a clean condition is behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import save_file
from tiny import FAST, SMALL, make_unet

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.config.finetuning import FinetuneConfig
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.diffusion.inputs import fitting, noised_channels
from diffprune_plugin.diffusion.loss import noise_prediction_loss, noised
from diffprune_plugin.errors import BadInput
from diffprune_plugin.evaluation.evaluate import evaluate
from diffprune_plugin.evaluation.prompts import check_drawable
from diffprune_plugin.evaluation.settings import Drawing
from diffprune_plugin.recovery.finetune import finetune
from diffprune_plugin.workflow import prune

SCHEDULER = DDPMScheduler(num_train_timesteps=20)
TIMESTEPS = torch.tensor([1, 5, 10, 19])


def whole(count: int = 8) -> torch.Tensor:
    """Grey images and beside each a condition of two channels, as uint8 gives them, all floats."""
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return pixels / 127.5 - 1


def written(path: Path) -> Path:
    """The same as uint8 arrays: images and condition."""
    pixels = ((whole() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.savez(path, images=pixels[..., :1], condition=pixels[..., 1:])
    return path


@pytest.mark.parametrize(
    ("taken", "given", "variance", "expected"),
    [
        (2, 1, "fixed_small", 1),
        (6, 3, "fixed_small", 3),
        (9, 4, "fixed_small", 4),
        (4, 4, "fixed_small", 4),
        (3, 6, "fixed_small", 3),  # the second half, not asked for, is left out
        (3, 6, "learned_range", 3),
        (6, 6, "learned_range", 3),  # DeepFloyd IF's super-resolution
        (7, 6, "learned", 3),  # the consistency decoder
        (7, 6, "fixed_small", 6),
    ],
)
def test_as_many_channels_are_noised_as_are_predicted(taken: int, given: int, variance: str, expected: int) -> None:
    unet, scheduler = make_unet(in_channels=taken, out_channels=given), DDPMScheduler(variance_type=variance)
    assert noised_channels(unet, UNET_2D, scheduler) == expected


def test_the_loss_of_who_predicts_the_noise_of_the_first_channels_is_zero() -> None:
    sample, noise = whole(4), torch.randn(4, 1, 16, 16)
    loss = noise_prediction_loss(lambda *_, **__: (noise,), SCHEDULER, sample, noise, TIMESTEPS, {})  # type: ignore[arg-type]
    assert loss.tolist() == [0.0] * 4


def test_noise_for_more_channels_than_are_predicted_is_refused_rather_than_broadcast() -> None:
    sample, noise = whole(4), torch.randn(4, 3, 16, 16)
    with pytest.raises(BadInput, match="noise: 3 channels, the model predicts 1"):
        noise_prediction_loss(lambda *_, **__: (noise[:, :1],), SCHEDULER, sample, noise, TIMESTEPS, {})  # type: ignore[arg-type]


def test_the_condition_stays_as_it_is_in_the_data() -> None:
    sample, noise = whole(4), torch.randn(4, 1, 16, 16)
    noisy, target, times = noised(SCHEDULER, sample, noise, TIMESTEPS, UNET_2D)
    assert torch.equal(noisy[:, 1:], sample[:, 1:])
    assert torch.equal(noisy[:, :1], SCHEDULER.add_noise(sample[:, :1], noise, TIMESTEPS))
    assert torch.equal(target, noise)
    assert times is TIMESTEPS


def test_the_condition_may_lie_beside_the_images_or_behind_them_in_the_latents(tmp_path: Path) -> None:
    """uint8 beside uint8, floats beside uint8, whole latents: one calibration."""
    unet = make_unet(in_channels=3, out_channels=1)
    pixels = np.load(written(tmp_path / "a.npz"))["images"]
    np.savez(tmp_path / "b.npz", images=pixels, condition=whole()[:, 1:].numpy())
    save_file({"latents": whole()}, tmp_path / "c.safetensors")
    first, *others = (
        dp.calibrate(unet, SCHEDULER, tmp_path / name, SMALL, **FAST) for name in ("a.npz", "b.npz", "c.safetensors")
    )
    assert np.isfinite(first.loss).all()
    for other in others:
        np.testing.assert_allclose(other.loss, first.loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": (3, "uint8")}, "noised channels and behind them 2 clean ones, a condition; give it by the name"),
        ({"images": (1, "uint8")}, "samples are .1, 16, 16."),
        (
            {"images": (1, "uint8"), "condition": (1, "uint8")},
            "condition is torch.uint8 .* takes 2 channels of 16 x 16",
        ),
    ],
    ids=["images with more channels", "no condition", "another condition"],
)
def test_images_without_their_condition_are_refused(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{name: np.zeros((4, 16, 16, n), kind) for name, (n, kind) in arrays.items()})
    with pytest.raises(BadInput, match=words):
        fitting(load_samples(tmp_path / "a.npz"), make_unet(in_channels=3, out_channels=1), UNET_2D, SCHEDULER)


def test_what_is_made_of_a_conditioned_unet_is_calibrated_compensated_tuned_and_measured(tmp_path: Path) -> None:
    data, model, output = written(tmp_path / "a.npz"), tmp_path / "dense", tmp_path / "pruned"
    dp.save(DDPMPipeline(make_unet(in_channels=3, out_channels=1), SCHEDULER), model)
    sweep = {"name": "diff_taylor", "samples": 8, "curve_samples": 2}
    config = PruningConfig(
        model=str(model), output=str(output), data=str(data), importance=sweep, timesteps=4, batch_size=4
    )
    assert prune(config, progress=False).compensation is not None
    tuning = FinetuneConfig(
        model=str(output), output=str(tmp_path / "tuned"), data=str(data), steps=2, batch_size=2, tracker="none"
    )
    assert np.isfinite(finetune(tuning, progress=False).curve["loss"]).all()
    tuned = dp.load(tmp_path / "tuned")
    drawing = Drawing(count=0, steps=5, loss_samples=2)
    facts = evaluate(DDPMPipeline(tuned, SCHEDULER), reference=data, drawing=drawing, progress=False).facts
    assert 0 < facts["models"]["model"]["loss"] < 10


def test_images_are_not_drawn_without_the_condition() -> None:
    pipeline = DDPMPipeline(make_unet(in_channels=3, out_channels=1), SCHEDULER)
    with pytest.raises(BadInput, match=r"takes 3 channels and predicts 1: .* evaluate with --count 0"):
        check_drawable(pipeline, ())
