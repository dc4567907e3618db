"""Transformers in diffusers' own pipelines: pruned through a config, reloaded with difference 0, measured, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
)
from tiny_pipelines import autoencoder, captioned_folder, clip_text, clip_tokenizer
from tiny_transformers import make
from transformers import CLIPTextModelWithProjection

import diffprune_plugin as dp
from diffprune_plugin.config.finetuning import FinetuneConfig
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.evaluation.evaluate import evaluate
from diffprune_plugin.evaluation.settings import Drawing
from diffprune_plugin.recovery.finetune import finetune
from diffprune_plugin.workflow import prune

FAST = {"timesteps": 4, "batch_size": 8}
SWEEP = {"name": "diff_taylor", "samples": 8, "curve_samples": 2}


def dit(_: Path) -> DiTPipeline:
    return DiTPipeline(make("DiT", num_embeds_ada_norm=1000), autoencoder(), DDIMScheduler())


def stable_diffusion_3(folder: Path) -> StableDiffusion3Pipeline:
    """Without its T5, as many use it."""
    tokenizer = clip_tokenizer(folder / "tokenizer")
    return StableDiffusion3Pipeline(
        transformer=make("SD 3"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=clip_text(8, CLIPTextModelWithProjection, projection_dim=8),
        tokenizer=tokenizer,
        text_encoder_2=clip_text(16, CLIPTextModelWithProjection, projection_dim=12),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def pixart_sigma(_: Path) -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(
        transformer=make("PixArt sigma"),
        vae=autoencoder(),
        scheduler=DDIMScheduler(),
        tokenizer=None,
        text_encoder=None,
    )


def flux(_: Path) -> FluxPipeline:
    return FluxPipeline(
        transformer=make("Flux"),
        vae=autoencoder(shift_factor=0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )


def load(folder: Path, like: Any) -> Any:
    """As diffusers loads it, which wants to be told of the parts that it was saved without."""
    return DiffusionPipeline.from_pretrained(folder, **{k: v for k, v in like.components.items() if v is None})


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


MASK = torch.ones(2, 5, dtype=torch.int64)
# How each is made, and what its call takes.
PIPELINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "DiT": (dit, {"class_labels": [3, 7], "guidance_scale": 2.0}),
    "SD 3": (stable_diffusion_3, {"prompt": ["a bar"] * 2, "height": 16, "width": 16}),
    "PixArt": (
        pixart_sigma,
        {
            "negative_prompt": None,
            "prompt_embeds": random(2, 5, 12),
            "prompt_attention_mask": MASK,
            "negative_prompt_embeds": random(2, 5, 12),
            "negative_prompt_attention_mask": MASK,
            "height": 16,
            "width": 16,
            "use_resolution_binning": False,
        },
    ),
    "Flux": (
        flux,
        {"prompt_embeds": random(2, 5, 24), "pooled_prompt_embeds": random(2, 20), "height": 16, "width": 16},
    ),
}


def images_of(pipeline: Any, given: dict[str, Any]) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(**given, num_inference_steps=2, generator=generator, output_type="np").images


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pruned_transformer_draws_in_its_pipeline_and_reloads_in_diffusers_with_difference_0(
    name: str, tmp_path: Path
) -> None:
    build, given = PIPELINES[name]
    pipeline = build(tmp_path)
    dense = images_of(pipeline, given)
    dp.remove_(pipeline.transformer, dp.make_plan(pipeline.transformer, "magnitude", pruning_ratio=0.3))
    images = images_of(pipeline, given)
    assert np.isfinite(images).all()
    assert not np.array_equal(images, dense)
    dp.save(pipeline, tmp_path / "pruned")
    loaded = load(tmp_path / "pruned", pipeline)
    assert type(loaded) is type(pipeline)
    assert type(loaded.transformer).__name__.startswith("Pruned")
    assert np.array_equal(images_of(loaded, given), images)


def data_for(name: str, folder: Path) -> Path:
    """Captioned images, or images with classes."""
    if name != "DiT":
        return captioned_folder(folder / "data", 16)
    pictures = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    np.savez(folder / "data.npz", images=pictures, class_labels=np.arange(8))
    return folder / "data.npz"


@pytest.mark.parametrize("name", ["DiT", pytest.param("SD 3", marks=pytest.mark.slow)])
def test_the_whole_way_by_configs(name: str, tmp_path: Path) -> None:
    build, given = PIPELINES[name]
    dp.save(build(tmp_path), tmp_path / "dense")
    data = str(data_for(name, tmp_path))
    values = {"model": str(tmp_path / "dense"), "output": str(tmp_path / "pruned"), "data": data, "importance": SWEEP}
    result = prune(PruningConfig(**values, **FAST, pruning_ratio=0.5), progress=False)
    assert result.calibration is not None
    assert (result.calibration.scale is None) == (name == "DiT")
    assert result.compensation is not None
    twice = {"transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "called repeatedly"}
    assert result.compensation.left == (twice if name == "DiT" else {})
    loaded = load(tmp_path / "pruned", result.model)
    assert np.array_equal(images_of(loaded, given), images_of(result.model, given))

    quick = Drawing(count=0, loss_samples=2)
    dense = load(tmp_path / "dense", loaded)
    facts = evaluate(loaded, against=dense, reference=Path(data), drawing=quick, progress=False).facts
    assert facts["models"]["model"]["params"] == result.plan.params[1]
    assert facts["compared"]["loss_difference"] != 0

    tuning = {"model": str(tmp_path / "pruned"), "output": str(tmp_path / "tuned"), "data": data}
    tuning |= {"steps": 2, "batch_size": 2, "teacher": str(tmp_path / "dense")}
    report = finetune(FinetuneConfig(**tuning), progress=False)
    assert report.steps == 2
    tuned = load(tmp_path / "tuned", loaded)
    assert np.isfinite(images_of(tuned, given)).all()


def test_directories_of_before_diffusers_split_its_transformers_up_are_pruned(tmp_path: Path) -> None:
    """The published DiT and PixArt alpha say Transformer2DModel, as diffusers called both when they were saved."""
    whole = dit(tmp_path)
    whole.save_pretrained(tmp_path / "dense")
    for file in ("model_index.json", "transformer/config.json"):
        path = tmp_path / "dense" / file
        path.write_text(path.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    assert type(dp.load(tmp_path / "dense")) is type(whole.transformer)
    config = {"model": str(tmp_path / "dense"), "output": str(tmp_path / "small"), "importance": "magnitude"}
    made = prune(PruningConfig.make({**config, "pruning_ratio": 0.3}), progress=False)
    assert made.plan.params[1] < made.plan.params[0]
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "small").transformer
    assert loaded.pruning_plan.sha256 == made.plan.sha256
    pixart_sigma(tmp_path).transformer.save_pretrained(tmp_path / "pixart")
    path = tmp_path / "pixart" / "config.json"
    path.write_text(path.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"))
    assert type(dp.load(tmp_path / "pixart")).__name__ == "PixArtTransformer2DModel"


def test_pixart_alpha_is_told_the_sizes_of_images(tmp_path: Path) -> None:
    pipeline = PixArtAlphaPipeline(
        transformer=make("PixArt alpha"),
        vae=autoencoder(),
        scheduler=DDIMScheduler(),
        tokenizer=None,
        text_encoder=None,
    )
    found = dp.encode(pipeline, np.zeros((3, 16, 16, 3), np.uint8)).extra
    assert found["resolution"].tolist() == [[16.0, 16.0]] * 3
    assert found["aspect_ratio"].tolist() == [[1.0]] * 3
