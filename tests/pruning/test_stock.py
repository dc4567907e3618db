"""Plans that a config of diffusers' own class can say: what is saved is that class, and needs nothing to be loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from tiny import make_unet, output_of
from tiny_conditional import FAMILIES
from tiny_conditional import make_unet as make_conditional
from tiny_pipelines import PIPELINES

import diffprune_plugin as dp
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning import stock
from diffprune_plugin.pruning.directory import DENSE_CONFIG, LOADER_FILE
from diffprune_plugin.pruning.loading import load_pipeline

# The sinusoids of a timestep are as wide as the first level, so that a config that narrows one narrows both.
FIRST_LEVEL = ("conv_in", "down_blocks.0.*", r"{re}up_blocks\.1\.(resnets\.\d\.conv.*|attentions\..*)")
DEEPER: dict[str, Any] = {"pruning_ratio_dict": dict.fromkeys(FIRST_LEVEL, 0.0)}


def pruned(unet: Any, **options: Any) -> Any:
    dp.remove_(unet, dp.make_plan(unet, "magnitude", **{"pruning_ratio": 0.25, **options}))
    return unet


def plainly_loaded(folder: Path) -> Any:
    """As diffusers alone would, and by its own name."""
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    model = getattr(diffusers, name).from_pretrained(folder)
    assert type(model).__module__.startswith("diffusers.")
    return model


@pytest.mark.parametrize(
    ("family", "heads"),
    [("unconditional", {}), ("unconditional", {"head_pruning_ratio": 0.25}), *((family, {}) for family in FAMILIES)],
)
def test_a_level_that_is_pruned_alike_is_a_stock_config(family: str, heads: dict[str, float], tmp_path: Path) -> None:
    unet = make_unet() if family == "unconditional" else make_conditional(FAMILIES[family])
    pruned(unet, **DEEPER, **heads)
    assert len(unet.pruning_plan.layers) > 10
    folder = dp.save(unet, tmp_path / "unet")
    inputs = find_adapter(unet).example_inputs(unet, batch=2)
    plain, ours = plainly_loaded(folder), dp.load(folder)
    assert not (folder / LOADER_FILE).exists()
    with torch.no_grad():
        expected = unet(**inputs).sample
        assert torch.equal(plain(**inputs).sample, expected)
        assert torch.equal(ours(**inputs).sample, expected)
    assert ours.pruning_plan == unet.pruning_plan
    assert [path.name for path in dp.save(ours, tmp_path / "again").iterdir()].count(DENSE_CONFIG) == 1


def test_a_pipeline_names_diffusers_own_class_and_we_still_know_its_plan(scheduler: Any, tmp_path: Path) -> None:
    unet = pruned(make_unet(), **DEEPER)
    place = dp.save(DDPMPipeline(unet, scheduler), tmp_path / "pruned")
    assert json.loads((place / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
    assert torch.equal(output_of(DiffusionPipeline.from_pretrained(place).unet), output_of(unet))
    assert load_pipeline(place).unet.pruning_plan == unet.pruning_plan
    card = (place / "README.md").read_text()
    assert "trust_remote_code" not in card
    assert "import diffprune_plugin" not in card
    assert unet.pruning_plan.sha256[:12] in card


@pytest.mark.parametrize(
    "options",
    [
        {"pruning_ratio": 0.5},
        {"pruning_ratio_dict": {**DEEPER["pruning_ratio_dict"], "mid_block.resnets.0.conv1": 0.5}},
    ],
    ids=["the first level too", "one layer otherwise"],
)
def test_what_no_config_says_is_saved_as_it_was(options: dict[str, Any], tmp_path: Path) -> None:
    unet = pruned(make_unet(), **options)
    folder = dp.save(unet, tmp_path / "unet")
    assert (folder / LOADER_FILE).exists()
    assert not (folder / DENSE_CONFIG).exists()
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "PrunedUNet2DModel"


def test_a_config_with_the_same_shapes_that_computes_something_else_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: twice the heads."""
    unet = pruned(PIPELINES["stable diffusion"][0](tmp_path).unet, **DEEPER)
    real = find_adapter(unet)

    def planted(model: Any) -> dict[str, Any]:
        changes = real.narrower(model)
        return {**changes, "attention_head_dim": [2 * heads for heads in changes["attention_head_dim"]]}

    assert stock.stock_twin(unet) is not None
    monkeypatch.setattr(stock, "find_adapter", lambda model: replace(real, narrower=planted))
    assert stock.stock_twin(unet) is None


def test_a_model_is_saved_in_the_modes_that_it_is_in(tmp_path: Path) -> None:
    unet = make_unet()
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.5))
    unet.train()
    unet.mid_block.eval()
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        dp.save(DDPMPipeline(unet, DDPMScheduler()), tmp_path / "saved")
        load_pipeline(tmp_path / "saved")
        assert not diffusers_logging.is_progress_bar_enabled()
    finally:
        (diffusers_logging.enable_progress_bar if shown else diffusers_logging.disable_progress_bar)()
    assert unet.down_blocks.training
    assert not any(module.training for module in unet.mid_block.modules())
