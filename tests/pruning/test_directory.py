"""What a directory is, read from its JSON: also of models that no adapter describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput
from diffprune_plugin.export.cli import main as export
from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.pruning.loading import load_pipeline

# GatedUNet, TerrainUNet: of the example plugins.
HAVE = "have DiTTransformer2DModel, FluxTransformer2DModel, GatedUNet, PixArtTransformer2DModel, "
HAVE += "SD3Transformer2DModel, TerrainUNet, UNet2DConditionModel, UNet2DModel; see"
LUMINA = {
    "_class_name": "Lumina2Pipeline",
    "_diffusers_version": "0.35.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "feature_extractor": [None, None],
    "transformer": ["diffusers", "Lumina2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def directory(place: Path, index: dict[str, Any] | None, **configs: dict[str, Any]) -> Path:
    """Of a pipeline with this index, or of a model, and the configs of the parts by name."""
    for name, config in configs.items():
        (place / name).mkdir(parents=True)
        (place / name / "config.json").write_text(json.dumps(config))
    if index is not None:
        (place / "model_index.json").write_text(json.dumps(index))
    return place


def test_a_pipeline_with_a_transformer_is_told_what_it_is_by_every_command(run: Any, tmp_path: Path) -> None:
    flux = directory(tmp_path / "flux", LUMINA, transformer={"_class_name": "Lumina2Transformer2DModel"})
    told = (
        f"{flux}: Lumina2Pipeline (it has scheduler, transformer, vae); its transformer: no adapter for "
        f"Lumina2Transformer2DModel; {HAVE}"
    )
    for read in (dp.load, load_pipeline):
        with pytest.raises(BadInput) as refused:
            read(flux)
        assert str(refused.value).startswith(told)
    for words in (["inspect", flux], ["sample", flux, "-o", tmp_path / "grid.png"]):
        code, _, err = run(*words)
        assert code == 2
        assert err.startswith(f"error: {told}")


def test_the_export_tells_it_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flux = directory(tmp_path / "flux", LUMINA, transformer={"_class_name": "Lumina2Transformer2DModel"})
    with pytest.raises(SystemExit) as end:
        export([str(tmp_path / "model.onnx"), "--model", str(flux)])
    assert end.value.code == 2
    assert f"its transformer: no adapter for Lumina2Transformer2DModel; {HAVE}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "index", "config", "words"),
    [
        ("unet", {"_class_name": "TextToVideoSDPipeline", "unet": ["diffusers", "UNet3DConditionModel"]},
         {"_class_name": "UNet3DConditionModel"}, f"unet: no adapter for UNet3DConditionModel; {HAVE}"),
        ("", None, {"_class_name": "AutoencoderKL"}, f"no adapter for AutoencoderKL; {HAVE}"),
        ("", None, {"architectures": ["CLIPTextModel"]}, "no adapter for a model of no named class"),
        ("", {"_class_name": "AudioPipeline", "vocoder": ["transformers", "Vocoder"]}, {},
         r"AudioPipeline has no transformer or UNet \(it has vocoder\)$"),
    ],
)  # fmt: skip
def test_inspecting_another_model_says_what_it_is(
    tmp_path: Path, folder: str, index: Any, config: Any, words: str
) -> None:
    place = directory(tmp_path / "model", index, **{folder or ".": config})
    with pytest.raises(BadInput, match=words):
        read_plan(place)


@pytest.mark.parametrize(
    ("scheduler", "sign"),
    [
        (FlowMatchEulerDiscreteScheduler(100), "no alphas_cumprod"),
        (UniPCMultistepScheduler(100, use_flow_sigmas=True, prediction_type="flow_prediction"), "use_flow_sigmas"),
    ],
)
def test_flow_matching_is_said_not_to_fit_a_model_that_predicts_noise(
    run: Any, pipeline: Any, npz: Path, tmp_path: Path, scheduler: Any, sign: str
) -> None:
    pipeline.scheduler = scheduler
    dp.save(pipeline, tmp_path / "flow")
    name = type(scheduler).__name__
    for words in (["sample"], ["evaluate", "--reference", npz, "--count", 0]):
        code, _, err = run(*words, tmp_path / "flow", "-o", tmp_path / "out")
        assert code == 2
        assert f"scheduler: {name} has {sign}: it is for flow matching, and a UNet2DModel is trained by noise" in err
