"""Sampling: the spacing of the timesteps, the scheduler, and what the noise depends on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from tiny import make_unet

import diffprune_plugin as dp
from diffprune_plugin.diffusion.schedulers import training_scheduler
from diffprune_plugin.errors import BadInput
from diffprune_plugin.evaluation.evaluate import evaluate
from diffprune_plugin.evaluation.sampling import AnyStepDDIM, quadratic, sample_images, sampler
from diffprune_plugin.evaluation.settings import Drawing, SamplingSettings


def draw(pipeline: Any, **asked: Any) -> list[Any]:
    return sample_images(pipeline, SamplingSettings(**asked), progress=False)


def arrays(images: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_quadratic_timesteps_are_squares_of_an_even_spacing_by_hand() -> None:
    top = math.sqrt(0.8 * 1000)
    by_hand = {int((top * k / 9) ** 2) for k in range(10)}
    assert quadratic(1000, 10) == sorted(by_hand, reverse=True)
    assert quadratic(1000, 5) == [800, 450, 200, 50, 0]


def test_quadratic_timesteps_repeat_none() -> None:
    steps = quadratic(1000, 50)
    assert len(steps) == len(set(steps)) < 50


def ddim_by_hand(pipeline: DDPMPipeline, timesteps: list[int], noise: torch.Tensor) -> torch.Tensor:
    """Eq. 12 of arXiv 2010.02502 with sigma 0; the authors' x_0 is clipped as the scheduler's config says."""
    alphas, x = pipeline.scheduler.alphas_cumprod, noise
    for t, before in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha, alpha_before = alphas[t], alphas[before] if before is not None else torch.tensor(1.0)
        with torch.no_grad():
            epsilon = pipeline.unet(x, t).sample
        start = ((x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()).clamp(-1, 1)
        x = alpha_before.sqrt() * start + (1 - alpha_before).sqrt() * epsilon
    return x


@pytest.mark.parametrize("skip", ["uniform", "quad"])
def test_ddim_is_the_equation_over_the_spacing(pipeline: DDPMPipeline, skip: str) -> None:
    timesteps = [80, 60, 40, 20, 0] if skip == "uniform" else quadratic(100, 5)
    noise = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    expected = (ddim_by_hand(pipeline, timesteps, noise) / 2 + 0.5).clamp(0, 1)[:, 0].numpy()
    drawn = arrays(draw(pipeline, count=2, seed=3, steps=5, skip=skip))
    assert np.abs(drawn / 255 - expected).max() < 0.51 / 255 + 1e-4


def test_any_step_ddim_with_equal_steps_is_diffusers_own() -> None:
    own, ours = DDIMScheduler(100), AnyStepDDIM(100)
    own.set_timesteps(5)
    ours.set_timesteps(timesteps=own.timesteps.tolist())
    x = y = torch.randn(1, 1, 4, 4)
    for t in own.timesteps:
        output = torch.randn(1, 1, 4, 4)
        x, y = own.step(output, t, x).prev_sample, ours.step(output, t, y).prev_sample
    assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["ddim", "dpm", "UniPCMultistepScheduler"])
def test_a_sampler_that_adds_no_noise_draws_the_same_images_at_any_batch_size(
    pipeline: DDPMPipeline, name: str
) -> None:
    drawn = [arrays(draw(pipeline, count=3, steps=4, scheduler=name, batch_size=size)) for size in (3, 2)]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm"])
def test_quadratic_timesteps_reach_every_scheduler_that_takes_its_own(pipeline: DDPMPipeline, name: str) -> None:
    seen: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append(int(args[1])))
    draw(pipeline, count=1, steps=6, scheduler=name, skip="quad")
    hook.remove()
    assert seen == quadratic(100, 6)


@pytest.mark.parametrize("name", ["ddpm", "dpm", "UniPCMultistepScheduler"])
def test_words_that_a_scheduler_does_not_take_are_kept_from_it(name: str) -> None:
    """DDIMPipeline tells every scheduler what only DDIM's takes."""
    pipeline = DDIMPipeline(make_unet(), DDIMScheduler(100))
    first, again = (draw(pipeline, count=1, steps=3, scheduler=name) for _ in range(2))
    assert np.array_equal(np.asarray(first[0]), np.asarray(again[0]))


def test_the_pipeline_keeps_its_scheduler(pipeline: DDPMPipeline) -> None:
    before = pipeline.scheduler
    draw(pipeline, count=1, steps=2, skip="quad")
    assert pipeline.scheduler is before
    assert not pipeline.unet._forward_hooks


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_only_what_was_clipped_is_clipped(name: str) -> None:
    """DDIM's and DDPM's own default is to clip, which latents do not outlive."""
    assert not sampler(DPMSolverMultistepScheduler(), name, 4, "uniform").config.clip_sample
    assert not sampler(DDIMScheduler(clip_sample=False), name, 4, "uniform").config.clip_sample
    assert sampler(DDPMScheduler(), name, 4, "uniform").config.clip_sample


def test_what_was_given_by_place_is_kept() -> None:
    flow = FlowMatchEulerDiscreteScheduler(1000, 3.0)
    assert training_scheduler(flow).config.shift == sampler(flow, "ddim", 4, "uniform").config.shift == 3.0
    lcm = LCMScheduler(1000, 0.001, 0.05, "linear")
    assert torch.equal(sampler(lcm, "ddim", 4, "uniform").alphas_cumprod, lcm.alphas_cumprod)


def test_another_kind_of_noise_is_drawn_from_with_its_own_scheduler() -> None:
    assert isinstance(sampler(EDMEulerScheduler(), "ddim", 4, "uniform"), EDMEulerScheduler)
    with pytest.raises(BadInput, match="a pipeline of EDMEulerScheduler's noise is drawn from with its own scheduler"):
        sampler(EDMEulerScheduler(), "ddpm", 4, "uniform")


def test_a_schedule_of_betas_that_ddpm_does_not_know_is_one_line() -> None:
    with pytest.raises(BadInput, match="HeunDiscreteScheduler has other alphas_cumprod than a DDPM makes"):
        training_scheduler(HeunDiscreteScheduler(beta_schedule="exp"))


@pytest.mark.parametrize("name", ["ddim", "dpm", "ddpm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_model_that_tells_its_variances_too_is_drawn_from_by_every_scheduler(channels: int, name: str) -> None:
    unet = make_unet(in_channels=channels, out_channels=2 * channels)
    drawn = draw(
        DDPMPipeline(unet, DDPMScheduler(100, variance_type="learned_range")), count=1, steps=3, scheduler=name
    )
    assert np.asarray(drawn[0]).shape[:2] == (16, 16)


def test_a_progress_bar_is_the_callers_again(pipeline: DDPMPipeline) -> None:
    pipeline.set_progress_bar_config(desc="mine")
    draw(pipeline, count=1, steps=2)
    assert pipeline._progress_bar_config == {"desc": "mine"}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"scheduler": "dddim"}, "did you mean 'ddim'"),
        ({"scheduler": "EulerDiscreteScheduler"}, "works in sigmas"),
        ({"scheduler": "DEISMultistepScheduler", "skip": "quad"}, "takes no timesteps of one's own"),
        ({"skip": "square"}, "--skip .square.; did you mean .quad.?"),
        ({"skip": "quad", "steps": 1}, "--steps 1 is below 2"),
        ({"steps": 101}, "more than the 100"),
        ({"batch_size": 0}, "--batch-size 0"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(pipeline: DDPMPipeline, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        draw(pipeline, count=1, **{"steps": 4, **asked})


def test_more_channels_than_a_picture_has_are_refused_before_the_drawing() -> None:
    pipeline = DDPMPipeline(make_unet(in_channels=5, out_channels=5), DDPMScheduler(num_train_timesteps=10))
    with pytest.raises(BadInput, match=r"DDPMPipeline draws 5 channels, a picture has up to 4; draw with diffusers"):
        draw(pipeline, count=1, steps=2)


def test_a_scheduler_longer_than_a_learned_time_table_is_one_line_wherever_the_two_meet() -> None:
    pipeline = DDIMPipeline(make_unet(time_embedding_type="learned", num_train_timesteps=7), DDIMScheduler())
    words = r"its timesteps go from 0 to 999, this \w+ has learned those to 6; .*num_train_timesteps: 7"
    grey = np.zeros((4, 16, 16, 1), np.uint8)
    for meet in (
        lambda: draw(pipeline, count=1, steps=2),
        lambda: dp.calibrate(pipeline.unet, pipeline.scheduler, grey, progress=False),
        lambda: evaluate(pipeline, reference=grey, drawing=Drawing(count=0), progress=False),
        lambda: evaluate(pipeline, drawing=Drawing(count=1, steps=2), progress=False),
    ):
        with pytest.raises(BadInput, match=words):
            meet()


def test_an_image_that_is_not_finite_is_no_black_one(pipeline: DDPMPipeline, run: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    dp.save(pipeline, tmp_path / "bad")
    code, _, err = run("sample", tmp_path / "bad", "-o", tmp_path / "grid.png", "--count", 2, "--steps", 2)
    assert code == 1
    assert f"error: {tmp_path / 'bad'}: image 0 is not finite; the model has diverged" in err
    assert not (tmp_path / "grid.png").exists()


def test_a_place_for_the_picture_that_is_none_is_refused_before_the_drawing(
    pipeline: DDPMPipeline, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffprune_plugin.evaluation.sampling.sample_images", pytest.fail)
    dp.save(pipeline, tmp_path / "good")
    (tmp_path / "file").touch()
    for place, told in ((tmp_path, "is a directory"), (tmp_path / "file" / "grid.png", "is not a directory that can")):
        code, _, err = run("sample", tmp_path / "good", "-o", place, "--overwrite")
        assert (code, told in err) == (2, True), err


def test_another_pipeline_class_samples_too(pipeline: DDPMPipeline) -> None:
    ddim = DDIMPipeline(pipeline.unet, sampler(pipeline.scheduler, "ddim", 4, "uniform"))
    assert len(draw(ddim, count=1, steps=3, skip="quad")) == 1
