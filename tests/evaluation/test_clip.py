"""The CLIP score: that of CLIP's own logits, for each image and its prompt; what cannot be measured is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file
from tiny import make_unet
from tiny_pipelines import PIPELINES, clip_tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput
from diffprune_plugin.evaluation.clip import load_clip
from diffprune_plugin.evaluation.evaluate import evaluate
from diffprune_plugin.evaluation.sampling import sample_images
from diffprune_plugin.evaluation.settings import Drawing

PROMPTS = ("a bar at the top", "nothing")
DRAWING = Drawing(count=3, steps=1, batch_size=2, prompts=PROMPTS)


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 54, "max_position_embeddings": 77, "bos_token_id": 52, "eos_token_id": 53}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8)
    )
    model.save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(pictures, clip_tokenizer(folder / "words")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return PIPELINES["stable diffusion"][0](tmp_path_factory.mktemp("pipeline"))


def test_the_score_is_that_of_clips_own_logits_for_the_prompt_that_each_image_came_from(pipeline, clip_dir) -> None:
    facts = evaluate(pipeline, clip=load_clip(clip_dir), drawing=DRAWING, progress=False).facts
    pictures = sample_images(pipeline, DRAWING, progress=False)
    model, processor = CLIPModel.from_pretrained(clip_dir).eval(), CLIPProcessor.from_pretrained(clip_dir)
    inputs = processor(text=list(PROMPTS), images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        cosines = model(**inputs).logits_per_image / model.logit_scale.exp()
    expected = 100 * torch.stack([cosines[0, 0], cosines[1, 1], cosines[2, 0]]).clamp_min(0)
    others = 100 * torch.stack([cosines[0, 1], cosines[1, 0], cosines[2, 1]]).clamp_min(0)
    assert facts["models"]["model"]["CLIP score"] == pytest.approx(expected.mean().item(), abs=1e-4)
    assert abs(others.mean() - expected.mean()) > 1e-2, "the prompts count"
    assert facts["models"]["model"]["CLIP score_stderr"] == pytest.approx((expected.std() / 3**0.5).item(), abs=1e-4)
    assert "CLIP score" not in facts["not_measured"]


def test_it_is_in_the_report_and_without_one_the_report_says_which_option_gives_it(
    run, pipeline, clip_dir, tmp_path
) -> None:
    dp.save(pipeline, tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["evaluate", tmp_path / "sd", "--prompts", tmp_path / "prompts.txt", "--count", 2, "--steps", 1]
    code, out, err = run(*words, "-o", tmp_path / "a", "--clip", clip_dir)
    assert code == 0, err
    assert "| CLIP score |" in out
    assert "CLIP: clip" in out
    code, out, _ = run(*words, "-o", tmp_path / "b")
    assert code == 0
    assert "- CLIP score: give --clip DIRECTORY." in out


def test_a_clip_that_lacks_weights_is_refused_and_one_in_half_precision_measured_in_full(clip_dir, tmp_path) -> None:
    for place in ("half", "part"):
        shutil.copytree(clip_dir, tmp_path / place)
    CLIPModel.from_pretrained(clip_dir).bfloat16().save_pretrained(tmp_path / "half")
    assert load_clip(tmp_path / "half").model.dtype is torch.float32
    tensors = load_file(clip_dir / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "part/model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"part: has no text_projection\.weight; give a whole CLIP"):
        load_clip(tmp_path / "part")


def test_images_without_prompts_are_refused_before_anything_is_drawn(pipeline, clip_dir) -> None:
    plain, clip = DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=10)), load_clip(clip_dir)
    with pytest.raises(BadInput, match="--clip: DDPMPipeline draws without prompts"):
        evaluate(plain, clip=clip, drawing=Drawing(steps=1, count=2), progress=False)
    with pytest.raises(BadInput, match="--clip: --count 0 draws no images"):
        evaluate(pipeline, clip=clip, drawing=Drawing(count=0, prompts=PROMPTS), progress=False)


@pytest.mark.parametrize("what", ["nothing", "pickle", "damaged"])
def test_a_directory_without_a_sound_clip_is_one_line(what, clip_dir, tmp_path) -> None:
    if what == "pickle":
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    if what == "damaged":
        for file in clip_dir.iterdir():
            if file.is_file():
                (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(BadInput, match=r"--clip: .*") as error:
        load_clip(tmp_path)
    assert "\n" not in str(error.value)
