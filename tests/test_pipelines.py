"""Every pipeline family, tiny and random: pruned through a config, reloaded by diffusers, sampled, in ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import PIPELINES, captioned_folder

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d_condition import UNET_2D_CONDITION
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.errors import BadInput, MissingExtra
from diffprune_plugin.export import ORTUNet, to_onnx, verify_onnx
from diffprune_plugin.pruning.loading import load_pipeline, model_of
from diffprune_plugin.workflow import prune

FAST = {"timesteps": 4, "batch_size": 8}
SWEEP = {"name": "diff_taylor", "samples": 8, "curve_samples": 2}


def images_of(pipeline: Any, prompt: str = "a bar") -> np.ndarray:
    """Two images of two steps; with guidance, where there is a prompt."""
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": [prompt] * 2, "guidance_scale": 3.0} if hasattr(pipeline, "tokenizer") else {"batch_size": 2}
    generator = torch.Generator().manual_seed(0)
    return pipeline(**given, num_inference_steps=2, generator=generator, output_type="np").images


@pytest.mark.parametrize("family", PIPELINES)
def test_pruned_by_a_config_with_captions_it_reloads_in_diffusers_and_draws_the_same(family, tmp_path) -> None:
    make, side = PIPELINES[family]
    dp.save(make(tmp_path), tmp_path / "dense")
    values = {"model": str(tmp_path / "dense"), "output": str(tmp_path / "pruned"), "importance": SWEEP, **FAST}
    values |= {"data": str(captioned_folder(tmp_path / "data", side)), "compensate": family == "latent diffusion"}
    result = prune(PruningConfig(**values), progress=False)
    assert result.calibration.sweep.condition_dropout == (0.0 if family == "ddim" else 0.1)
    assert bool(result.compensation) == (family == "latent diffusion"), "one is enough: it takes seconds"
    assert result.plan.params[1] == sum(p.numel() for p in result.model.unet.parameters()) < 0.7 * result.plan.params[0]
    images = images_of(result.model)
    assert np.isfinite(images).all()
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pruned")
    assert type(loaded) is type(result.model)
    assert np.array_equal(images_of(loaded), images)
    if family != "ddim":
        assert not np.array_equal(images_of(loaded, "nothing"), images), "the condition has an effect"


def test_text_encoders_are_float32_too_unless_told_otherwise(tmp_path) -> None:
    """transformers would take the dtype that their config states."""
    pipeline = PIPELINES["stable diffusion"][0](tmp_path)
    pipeline.text_encoder.half()
    dp.save(pipeline, tmp_path / "dense")
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_pipeline(tmp_path / "dense", dtype)
        assert {part.dtype for part in (loaded.unet, loaded.vae, loaded.text_encoder)} == {dtype}
    assert np.isfinite(images_of(load_pipeline(tmp_path / "dense"))).all()


@pytest.mark.parametrize(
    "families",
    [("stable diffusion", "latent diffusion"), pytest.param(("stable diffusion xl",), marks=pytest.mark.slow)],
    ids=lambda families: families[0],
)
def test_a_pruned_conditional_unet_is_exported_verified_and_draws_in_the_pipeline_as_in_pytorch(
    families, tmp_path
) -> None:
    """The first two have the same UNet, so that one file serves both; unconditional ones: tests/export."""
    pipelines = [PIPELINES[family][0](tmp_path) for family in families]
    unet = pipelines[0].unet
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.3))
    path = tmp_path / "model.onnx"
    to_onnx(unet, path, dynamic=("batch", "sequence"))
    result = verify_onnx(path, unet)
    assert result.passed, result.as_dict()
    inputs = UNET_2D_CONDITION.example_inputs(unet, batch=2)
    with torch.no_grad():
        expected = unet(**inputs).sample
    torch.testing.assert_close(ORTUNet(path)(**inputs).sample, expected, rtol=1e-4, atol=1e-5)
    for pipeline in pipelines:
        pipeline.unet = unet
        images = images_of(pipeline)
        pipeline.unet = ORTUNet(path)
        np.testing.assert_allclose(images_of(pipeline), images, rtol=0, atol=1e-3)


def test_a_pipeline_with_a_text_encoder_needs_the_extra(tmp_path, monkeypatch) -> None:
    dp.save(PIPELINES["stable diffusion"][0](tmp_path), tmp_path / "dense")
    load_pipeline(tmp_path / "dense")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'diffprune-plugin\[text\]'"):
        load_pipeline(tmp_path / "dense")


@pytest.mark.parametrize("component", ["controlnet", "adapter"])
def test_a_pipeline_that_adds_to_the_skip_connections_is_refused(component, tmp_path) -> None:
    pipeline = PIPELINES["stable diffusion"][0](tmp_path)
    setattr(pipeline, component, torch.nn.Identity())
    with pytest.raises(BadInput, match=f"adds the outputs of its {component} to the UNet's skip connections"):
        model_of(pipeline)


def test_a_stored_calibration_knows_the_dropout_and_the_precision_that_it_was_made_with(tmp_path) -> None:
    make, side = PIPELINES["stable diffusion"]
    dp.save(make(tmp_path), tmp_path / "dense")
    data = str(captioned_folder(tmp_path / "data", side))
    values = {"model": str(tmp_path / "dense"), "data": data, "calibration": str(tmp_path / "stored"), **FAST}

    def run(**changes: Any) -> Any:
        output = str(tmp_path / f"{len(list(tmp_path.iterdir()))}")
        given = {**values, "importance": SWEEP, "output": output, "compensate": False, **changes}
        return prune(PruningConfig(**given), progress=False).plan

    plan = run()
    assert run() == plan
    assert plan.criterion["condition_dropout"] == 0.1
    with pytest.raises(BadInput, match="calibrated with other autocast"):
        run(autocast=True)
    with pytest.raises(BadInput, match=r"condition_dropout=0\.1"):
        run(importance={**SWEEP, "condition_dropout": 0.5})
    calibration = Calibration.load(tmp_path / "stored")
    for change, words in (
        ({"rule": "of yesterday"}, "calibrated with other timestep_weights"),
        ({"scale": np.full_like(calibration.loss, 0.5)}, "calibrated with other factors of the loss"),
    ):
        replace(calibration, **change).save(tmp_path / "stored", overwrite=True)
        with pytest.raises(BadInput, match=words):
            run()
