"""Drawing from prompts: which image gets which, with what noise, by which sampler; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from tiny_pipelines import PIPELINES

import diffprune_plugin as dp
from diffprune_plugin.diffusion.schedulers import config_of
from diffprune_plugin.errors import BadInput
from diffprune_plugin.evaluation.prompts import own_guidance, read_prompts
from diffprune_plugin.evaluation.sampling import sample_images, sampler, seeded
from diffprune_plugin.evaluation.settings import SamplingSettings

PROMPTED = [family for family in PIPELINES if family != "ddim"]
COMPATIBLE = sorted(cls.__name__ for cls in DDIMScheduler(100).compatibles if cls.__name__ != "DPMSolverSDEScheduler")
SIGMAS = [name for name in COMPATIBLE if any(word in name for word in ("Euler", "Heun", "KDPM2", "LMS"))]
BAR, NOTHING = "a bar at the top", "nothing"
STRONG = 30.0  # guidance by which images of different prompts differ, through the 16 codes of latent diffusion's too


@pytest.fixture
def prompted(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return PIPELINES[getattr(request, "param", "stable diffusion")][0](tmp_path / "pipeline")


def drawn(pipeline: Any, count: int, **options: Any) -> np.ndarray:
    """int (count, height, width, 3), from 0 to 255."""
    images = sample_images(pipeline, SamplingSettings(count=count, **{"steps": 2, **options}), progress=False)
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize("prompted", PROMPTED, indirect=True)
def test_image_i_is_the_pipelines_own_of_prompt_i_in_turn_whatever_the_batch_size(prompted: Any) -> None:
    prompted.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(3), "output_type": "np"}
    by_hand = prompted(prompt=[BAR, NOTHING, BAR, NOTHING], guidance_scale=STRONG, **options).images * 255
    for size in (4, 3):
        images = drawn(prompted, 4, seed=3, batch_size=size, prompts=[BAR, NOTHING], guidance_scale=STRONG)
        assert np.abs(images - by_hand).max() <= 1


@pytest.mark.parametrize("prompted", PROMPTED, indirect=True)
def test_the_prompt_and_the_seed_decide_and_nothing_else(prompted: Any) -> None:
    asked = {"prompts": [BAR], "guidance_scale": STRONG}
    images = drawn(prompted, 1, **asked)
    torch.randn(5)
    assert np.array_equal(drawn(prompted, 1, **asked), images)
    for other in ({"prompts": [NOTHING]}, {"seed": 1}, {"guidance_scale": 9.0}):
        assert not np.array_equal(drawn(prompted, 1, **asked | other), images), other


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", COMPATIBLE)
def test_every_compatible_scheduler_draws_at_every_step_count_what_the_pipeline_draws_with_it(
    prompted: Any, name: str, steps: int
) -> None:
    # Stable Diffusion's own; with Runge-Kutta steps diffusers' PNDM fails below 4 steps.
    trained = {"num_train_timesteps": 100, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    prompted.scheduler = PNDMScheduler(**trained, skip_prk_steps=True, prediction_type="epsilon", trained_betas=None)
    images = drawn(prompted, 1, prompts=[BAR], scheduler=name, steps=steps, guidance_scale=1.0)
    # Where nothing says otherwise, diffusers' DDIM and DDPM would begin to clip, latents too.
    prompted.scheduler = getattr(diffusers, name).from_config({"clip_sample": False, **prompted.scheduler.config})
    options = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    assert np.abs(images - prompted(prompt=[BAR], guidance_scale=1.0, **options).images * 255).max() <= 1


def test_another_scheduler_keeps_what_was_set_by_place_or_by_the_pipeline() -> None:
    """diffusers' from_config takes both for defaults, and gives the other scheduler its own instead."""
    own = DDIMScheduler(50)
    own.register_to_config(clip_sample=False)
    for cls in (DDIMScheduler, DDPMScheduler):
        assert cls.from_config(own.config).config.num_train_timesteps == 1000
        config = cls.from_config(config_of(own)).config
        assert (config.num_train_timesteps, config.clip_sample) == (50, False)
    heun = HeunDiscreteScheduler()
    assert DDIMScheduler.from_config(heun.config).config.beta_end == 0.02
    assert DDIMScheduler.from_config(config_of(heun)).config.beta_end == heun.config.beta_end == 0.012


@pytest.mark.parametrize("prompted", ["latent diffusion"], indirect=True)
def test_a_sampler_whose_noise_takes_no_generator_draws_the_same_images_again(prompted: Any) -> None:
    """LDMTextToImagePipeline gives its scheduler no generator."""
    images = drawn(prompted, 2, prompts=[BAR], scheduler="ddpm", steps=3)
    torch.randn(5)
    assert np.array_equal(drawn(prompted, 2, prompts=[BAR], scheduler="ddpm", steps=3), images)
    assert not np.array_equal(drawn(prompted, 2, prompts=[BAR], scheduler="ddpm", steps=3, seed=1), images)


def test_noise_without_a_generator_is_not_the_first_noise_again_and_leaves_torchs_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    with seeded(0, torch.device("cpu")):
        inside = torch.randn(3)
    assert torch.equal(torch.randn(3), expected)
    with seeded(0, torch.device("cpu")):
        assert torch.equal(torch.randn(3), inside)
    assert not torch.equal(inside, torch.randn(3, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", SIGMAS)
@pytest.mark.parametrize("prompted", ["latent diffusion", "ddim"], indirect=True)
def test_samplers_in_sigmas_are_refused_where_the_pipeline_scales_no_noise(prompted: Any, name: str) -> None:
    prompts = [BAR] if hasattr(prompted, "tokenizer") else []
    with pytest.raises(BadInput, match=f"--scheduler {name}: it works in sigmas"):
        drawn(prompted, 1, prompts=prompts, scheduler=name, steps=3)
    assert len(sampler(prompted.scheduler, name, 3, "uniform", sigmas=True).timesteps) >= 3


@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_quadratic_timesteps_reach_prompted_pipelines_too(prompted: Any, name: str) -> None:
    seen: list[int] = []
    prompted.unet.register_forward_pre_hook(lambda _, args: seen.append(int(args[1])))
    drawn(prompted, 1, prompts=[BAR], steps=5, scheduler=name, skip="quad")
    assert seen == [80, 45, 20, 5, 0]


def test_a_distilled_model_is_drawn_from_with_its_own_scheduler(prompted: Any) -> None:
    prompted.scheduler = LCMScheduler.from_config(prompted.scheduler.config, original_inference_steps=20)
    expected = LCMScheduler.from_config(prompted.scheduler.config)
    expected.set_timesteps(3)
    seen: list[int] = []
    prompted.unet.register_forward_pre_hook(lambda _, args: seen.append(int(args[1])))
    drawn(prompted, 1, prompts=[BAR], steps=3)
    assert seen == expected.timesteps.tolist()
    with pytest.raises(BadInput, match="a pipeline of a distilled model is drawn from with its own scheduler"):
        drawn(prompted, 1, prompts=[BAR], steps=3, scheduler="dpm")
    with pytest.raises(BadInput, match=r"--steps 21: .* 20"):
        drawn(prompted, 1, prompts=[BAR], steps=21)


def test_a_pipeline_without_what_reads_its_prompts_is_refused_and_a_fault_of_a_pipeline_is_one_line(
    prompted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompted.tokenizer, "model_max_length", None)
    with pytest.raises(BadInput, match="StableDiffusionPipeline cannot draw: "):
        drawn(prompted, 1, prompts=[BAR])
    prompted.register_modules(text_encoder=None)
    with pytest.raises(BadInput, match="was saved without its text encoder"):
        drawn(prompted, 1, prompts=[BAR])


def test_images_have_the_size_asked_for_else_the_pipelines_own(prompted: Any) -> None:
    assert drawn(prompted, 1, prompts=[BAR]).shape == (1, 16, 16, 3)
    assert drawn(prompted, 1, prompts=[BAR], size=(32, 48)).shape == (1, 32, 48, 3)


def test_without_a_guidance_scale_it_is_the_pipelines_own(prompted: Any) -> None:
    own = drawn(prompted, 1, prompts=[BAR])
    assert own_guidance(prompted) == 7.5
    assert np.array_equal(drawn(prompted, 1, prompts=[BAR], guidance_scale=7.5), own)
    assert not np.array_equal(drawn(prompted, 1, prompts=[BAR], guidance_scale=0.0), own)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "StableDiffusionPipeline draws from prompts: give --prompts FILE.*captions of --reference"),
        ({"prompts": BAR}, "is one text; give a list"),
        ({"prompts": [BAR], "guidance_scale": -1.0}, "--guidance-scale -1.0: not a number >= 0"),
        ({"prompts": [BAR], "guidance_scale": float("nan")}, "--guidance-scale nan"),
        ({"prompts": [BAR], "size": (12, 16)}, "StableDiffusionPipeline cannot draw: .*divisible by 8"),
    ],
)
def test_what_a_prompted_pipeline_does_not_take_is_one_line(prompted: Any, asked: dict[str, Any], words: str) -> None:
    before = prompted.scheduler
    with pytest.raises(BadInput, match=words):
        drawn(prompted, 1, **asked)
    assert prompted.scheduler is before


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"prompts": [BAR]}, "--prompts: DDPMPipeline draws without prompts"),
        ({"guidance_scale": 2.0}, "--guidance-scale 2.0: DDPMPipeline takes none"),
        ({"size": (16, 16)}, "DDPMPipeline draws images of one size"),
    ],
)
def test_an_unconditional_pipeline_takes_nothing_of_it(pipeline: DDPMPipeline, asked: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        drawn(pipeline, 1, **asked)


def test_a_pipeline_that_changes_images_is_refused(prompted: Any) -> None:
    changing = StableDiffusionImg2ImgPipeline(**prompted.components, requires_safety_checker=False)
    with pytest.raises(BadInput, match="StableDiffusionImg2ImgPipeline draws from image, which cannot be given here"):
        drawn(changing, 1, prompts=[BAR])


def test_prompts_are_the_lines_that_are_not_empty(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa bar\r\n\n  bars\u2028and bars \n\n".encode())
    assert read_prompts(file) == ("a bar", "bars\u2028and bars")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"", "no prompt in it"), (b" \n\n", "no prompt in it"), (b"\xff\xfe", "not UTF-8")],
)
def test_a_file_without_prompts_is_one_line(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(BadInput, match=f"--prompts: .*prompts.txt: {words}"):
        read_prompts(tmp_path / "prompts.txt")


def test_the_command_samples_from_a_file_of_prompts(run: Any, prompted: Any, tmp_path: Path) -> None:
    dp.save(prompted, tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text(f"{BAR}\n{NOTHING}\n")
    words = ["sample", tmp_path / "sd", "-o", tmp_path / "grid.png", "--count", 2, "--steps", 2]
    code, _, err = run(*words)
    assert code == 2
    assert "--prompts FILE" in err
    assert not (tmp_path / "grid.png").exists()
    given = ["--prompts", tmp_path / "prompts.txt", "--guidance-scale", 2, "--scheduler", "EulerDiscreteScheduler"]
    assert run(*words, *given)[0] == 0
    assert (tmp_path / "grid.png").exists()
