"""diffprune evaluate of pipelines that draw from prompts: both models get the same ones, and the report says which."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import CAPTIONS, PIPELINES, captioned_folder
from transformers import BatchFeature

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput
from diffprune_plugin.evaluation.evaluate import evaluate
from diffprune_plugin.evaluation.sampling import sample_images
from diffprune_plugin.evaluation.settings import Drawing, SamplingSettings

QUICK = Drawing(count=5, steps=2, batch_size=3, loss_samples=2)
PROMPTS = ("bars and bars", "nothing")


@pytest.fixture
def prompted(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return PIPELINES[getattr(request, "param", "stable diffusion")][0](tmp_path / "pipeline")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return captioned_folder(tmp_path / "data", 16)


def pruned(pipeline: Any) -> Any:
    """The same pipeline with a smaller UNet."""
    unet = dp.load(dp.save(pipeline, Path(pipeline.tokenizer.name_or_path).parent / "saved"))
    dp.remove_(unet, dp.make_plan(unet, dp.importance("magnitude"), pruning_ratio=0.3))
    return type(pipeline)(**{**pipeline.components, "unet": unet})


def hash_of(prompts: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


@pytest.mark.parametrize(
    ("prompted", "scale"), [("stable diffusion", 7.5), ("stable diffusion xl", 5.0)], indirect=["prompted"]
)
def test_a_prompted_pipeline_against_itself_is_the_same_drawn_from_the_captions(
    prompted: Any, folder: Path, scale: float
) -> None:
    result = evaluate(prompted, against=prompted, reference=folder, drawing=QUICK, progress=False)
    compared, drawing = result.facts["compared"], result.facts["drawing"]
    assert (compared["SSIM"], compared["PSNR"], compared["loss_difference"]) == (pytest.approx(1), None, 0)
    assert (drawing["prompts"], drawing["prompts_sha256"]) == (4, hash_of(CAPTIONS))
    assert (drawing["guidance_scale"], drawing["size"]) == (scale, (16, 16)), "the pipeline's own, the reference's"
    assert "prompts 4" in result.markdown()
    first, *_, last = (np.asarray(image) for image in list(result.rows.values())[1])
    assert not np.array_equal(first, last), "the fifth image has the first one's prompt and other noise"


def test_image_i_of_both_models_comes_from_the_same_prompt_and_noise(prompted: Any, folder: Path) -> None:
    small = pruned(prompted)
    drawing = Drawing(count=3, steps=2, loss_samples=2, prompts=PROMPTS, guidance_scale=2.0)
    result = evaluate(small, against=prompted, reference=folder, drawing=drawing, progress=False)
    settings = SamplingSettings(count=3, steps=2, prompts=[PROMPTS[0], PROMPTS[1], PROMPTS[0]], guidance_scale=2.0)
    for name, pipeline in (("against", prompted), ("model", small)):
        row = result.rows[result.facts["models"][name]["name"]]
        for image, by_hand in zip(row, sample_images(pipeline, settings, progress=False), strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(by_hand))
    assert result.facts["drawing"]["prompts_sha256"] == hash_of(PROMPTS), "they go before the captions"
    assert result.facts["compared"]["SSIM"] < 0.99


def test_images_are_drawn_at_the_size_of_the_reference(tmp_path: Path) -> None:
    """LDMTextToImagePipeline's own is sample_size times 8, which this UNet has two of."""
    pipeline = PIPELINES["latent diffusion"][0](tmp_path / "pipeline")
    pipeline.unet.register_to_config(sample_size=(8, 4))
    images = [{"image": np.zeros((64, 32, 3), np.uint8), "text": text} for text in CAPTIONS]
    drawing = Drawing(count=2, steps=1, loss_samples=2)
    result = evaluate(pipeline, reference=images, drawing=drawing, progress=False)
    assert [image.size for row in result.rows.values() for image in row[:2]] == [(32, 64)] * 4
    assert result.facts["drawing"]["size"] == (64, 32)


@pytest.mark.parametrize("name", ["ddpm", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"])
def test_any_sampler_gives_both_models_the_same_noise(prompted: Any, name: str) -> None:
    drawing = Drawing(count=3, steps=3, batch_size=2, scheduler=name, prompts=PROMPTS)
    facts = evaluate(prompted, against=prompted, drawing=drawing, progress=False).facts
    assert facts["compared"]["PSNR"] is None, "every pixel is the same"
    assert facts["drawing"]["unet_passes"] == (5 if "Heun" in name else 3), "Heun takes two a step but the last"


def test_a_prompted_and_an_unprompted_pipeline_are_not_compared(prompted: Any, pipeline: Any, folder: Path) -> None:
    with pytest.raises(BadInput, match="--against: a DDPMPipeline, the model a StableDiffusionPipeline: only one"):
        evaluate(prompted, against=pipeline, reference=folder, drawing=QUICK, progress=False)


def test_the_report_says_how_many_images_a_safety_checker_blacked_out(prompted: Any) -> None:
    prompted.feature_extractor = lambda images, **_: BatchFeature({"pixel_values": torch.zeros(len(images))})
    prompted.safety_checker = black_first
    drawing = Drawing(count=3, steps=1, batch_size=2, prompts=PROMPTS)
    result = evaluate(prompted, drawing=drawing, progress=False)
    assert result.facts["models"]["model"]["blacked_out"] == 2, "the first of each batch"
    assert "its safety checker blacked out 2 of 3 images" in result.markdown()
    prompted.safety_checker = lambda images, **_: (images, [False] * len(images))
    assert "blacked" not in evaluate(prompted, drawing=drawing, progress=False).markdown()


def black_first(images: Any, **_: Any) -> Any:
    images[0] = 0
    return images, [True] + [False] * (len(images) - 1)


def test_the_whole_way_on_the_command_line(run: Any, prompted: Any, folder: Path, tmp_path: Path) -> None:
    dense, out, prompts = tmp_path / "dense", tmp_path / "out", tmp_path / "prompts.txt"
    dp.save(prompted, dense)
    prompts.write_text("a bar\n\nnothing\nbars\n")
    words = ["evaluate", dense, "--against", dense, "-o", out, "--count", 3, "--steps", 2, "--loss-samples", 2]
    code, text, _ = run(*words, "--prompts", prompts, "--guidance-scale", 3, "--scheduler", "dpm")
    assert code == 0
    assert "SSIM 1.0000" in text
    assert "loss per timestep: give --reference IMAGES" in text
    drawing = json.loads((out / "evaluation.json").read_text())["drawing"]
    assert (drawing["prompts"], drawing["guidance_scale"]) == (3, 3)
    code, text, _ = run(*words, "--reference", folder, "--overwrite", "--json")
    drawing = json.loads(text)["drawing"]
    assert (drawing["prompts"], drawing["prompts_sha256"]) == (3, hash_of(CAPTIONS[:3])), "those that were drawn"
    code, text, _ = run("evaluate", dense, "-o", out, "--count", 0, "--overwrite")
    assert code == 0, "nothing is drawn: no prompts are needed"


CASES = {
    "no prompts": (
        ["sd"],
        "draws from prompts: give --prompts FILE, a prompt a line; evaluate also takes the captions",
    ),
    "images without captions": (["sd", "--reference", "bare"], "give --prompts FILE"),
    "an unconditional one": (["ddpm", "--prompts", "some.txt"], "--prompts: DDPMPipeline draws without prompts"),
    "an empty file": (["sd", "--prompts", "empty.txt"], "empty.txt: no prompt in it"),
    "no file": (["sd", "--prompts", "none.txt"], "none.txt: no such file"),
    "guidance for nothing": (["ddpm", "--guidance-scale", 2], "--guidance-scale 2.0: DDPMPipeline takes none"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_drawn_is_one_line_and_leaves_nothing(
    run: Any, prompted: Any, pipeline: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    dp.save(prompted, tmp_path / "sd")
    dp.save(pipeline, tmp_path / "ddpm")
    (tmp_path / "some.txt").write_text("a bar")
    (tmp_path / "empty.txt").write_text("\n \n")
    folder.rename(tmp_path / "bare")
    (tmp_path / "bare" / "metadata.jsonl").unlink()
    words, message = CASES[case]
    code, _, err = run("evaluate", *words, "-o", tmp_path / "out", "--steps", 2, "--count", 2)
    assert code == 2
    assert message in err
    assert len(err.split("error: ")[1].strip().splitlines()) == 1
    assert "sampling" not in err, "it is found out before anything is drawn"
    assert not (tmp_path / "out").exists()
