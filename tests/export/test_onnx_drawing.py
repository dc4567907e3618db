"""Which pipelines are drawn from to compare and to time them, and from what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LDMSuperResolutionPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    VQModel,
)
from tiny import make_unet as unconditional
from tiny_conditional import LCM, SD, make_unet
from tiny_pipelines import autoencoder, clip_text, clip_tokenizer
from tiny_transformers import make

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput
from diffprune_plugin.export import ORTUNet, drawing
from diffprune_plugin.export.options import Options
from diffprune_plugin.export.pipeline import check_pipeline
from diffprune_plugin.export.pipeline_workflow import run_pipeline

TEXT = ("text_encoder", "tokenizer", "unet", "vae")


class Layouts(DDPMPipeline):  # type: ignore[misc]
    def __call__(self, layout: Any, image: Any = None) -> None: ...


@pytest.mark.parametrize(
    ("kind", "parts", "drawn", "timed"),
    [
        (StableDiffusionPipeline, TEXT, "", ""),
        (StableDiffusionPipeline, ("unet", "vae"), "draws from prompts, and was saved without a text encoder", None),
        (StableDiffusionImg2ImgPipeline, TEXT, "", "draws from image"),
        (StableDiffusionInpaintPipeline, TEXT, "", "draws from image, mask_image"),
        (LDMSuperResolutionPipeline, ("unet", "vqvae"), "", "draws from image"),
        (DiTPipeline, ("transformer", "vae"), "", ""),
        (DDPMPipeline, ("unet",), "", ""),
        (Layouts, ("unet",), "draws from layout", None),
    ],
)
def test_why_images_are_not_drawn_or_not_timed(kind: type, parts: Any, drawn: str, timed: str | None) -> None:
    timed = drawn if timed is None else timed
    assert drawing.not_drawn(kind, parts) == (f"{kind.__name__} {drawn}" if drawn else "")
    assert drawing.not_timed(kind, parts) == (f"{kind.__name__} {timed}" if timed else "")


def test_guidance_doubles_the_batch_but_of_a_distilled_model() -> None:
    assert drawing.guided(StableDiffusionPipeline, {"time_cond_proj_dim": None})
    assert not drawing.guided(LatentConsistencyModelPipeline, {"time_cond_proj_dim": 256})
    assert not drawing.guided(DDPMPipeline, {})


def test_a_pipeline_that_needs_what_has_no_onnx_form_is_refused(tmp_path: Path) -> None:
    names = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
    index = {name: ["diffusers", kind] for name, kind in names.items()}
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    text = dp.pruning.directory.to_json({"_class_name": StableDiffusionImageVariationPipeline.__name__, **index})
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(BadInput, match="image_encoder: has no ONNX form, and a StableDiffusionImageVariationPipeline"):
        check_pipeline(tmp_path, Options())


def test_sizes_that_a_file_does_not_compute_are_named_with_a_remedy(models: Any) -> None:
    with pytest.raises(BadInput, match=r"sample is \[1, 3, 32, 32\], and the file computes .* in --dynamic"):
        ORTUNet(models.dense_onnx)(torch.zeros(1, 3, 32, 32), 5)


def text(folder: Path) -> dict[str, Any]:
    found = {"vae": autoencoder(), "text_encoder": clip_text(24), "tokenizer": clip_tokenizer(folder / "tokenizer")}
    return {**found, "scheduler": DDIMScheduler(num_train_timesteps=100)}


def unchecked(folder: Path) -> dict[str, Any]:
    return {**text(folder), "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def image_to_image(folder: Path) -> Any:
    return StableDiffusionImg2ImgPipeline(**unchecked(folder), unet=make_unet(SD))


def inpainting(folder: Path) -> Any:
    return StableDiffusionInpaintPipeline(**unchecked(folder), unet=make_unet({**SD, "in_channels": 9}))


def upscaling(folder: Path) -> Any:
    unet = make_unet({**SD, "in_channels": 7, "num_class_embeds": 1000})
    return StableDiffusionUpscalePipeline(**text(folder), low_res_scheduler=DDPMScheduler(), unet=unet)


def super_resolution(folder: Path) -> Any:
    unet = unconditional(in_channels=6, out_channels=3, sample_size=32)
    return LDMSuperResolutionPipeline(
        autoencoder(VQModel, num_vq_embeddings=16, latent_channels=3), unet, DDIMScheduler()
    )


def of_classes(folder: Path) -> Any:
    return DiTPipeline(make("DiT", num_layers=1, num_embeds_ada_norm=1000), autoencoder(), DDIMScheduler())


def distilled(folder: Path) -> Any:
    return LatentConsistencyModelPipeline(**{**unchecked(folder), "scheduler": LCMScheduler()}, unet=make_unet(LCM))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "timed"),
    [
        (image_to_image, False),
        (inpainting, False),
        (upscaling, False),
        (super_resolution, False),
        (of_classes, True),
        (distilled, True),
    ],
)
def test_every_kind_of_pipeline_draws_pytorchs_images(made: Any, timed: bool, tmp_path: Path) -> None:
    dp.save(made(tmp_path), tmp_path / "dense")
    content = run_pipeline(tmp_path / "dense", tmp_path / "onnx", Options(steps=3, rounds=5)).content
    assert content["images"]["passed"]
    assert content["images"]["images"] == 3
    assert isinstance(content["latency"]["pipeline"], dict) == timed
