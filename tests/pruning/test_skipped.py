"""Blocks of a UNet that go one by one: what is left is the dense model without what they add, saved and loaded so."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from test_standalone import loader
from tiny import make_unet, output_of
from tiny_conditional import LINEAR, SD, SDXL
from tiny_conditional import make_unet as make_conditional
from torch import nn

import diffprune_plugin as dp
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.errors import BadInput
from diffprune_plugin.export import to_onnx
from diffprune_plugin.graph.running import smallest_output
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.depth import without_blocks
from diffprune_plugin.pruning.directory import PLAN_FILE
from diffprune_plugin.pruning.skipped import Skip, skipped_in
from diffprune_plugin.recovery.finetune import finetune
from diffprune_plugin.workflow import frontier_of, prune

# The last layers of what a block of each class adds.
LAST = {
    "ResnetBlock2D": ("conv2",),
    "Attention": ("to_out.0",),
    "Transformer2DModel": ("proj_out",),
    "BasicTransformerBlock": ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2"),
}
MODELS: dict[str, Any] = {
    "unconditional": lambda: make_unet(layers_per_block=2),
    "sd 1.5": lambda: make_conditional(SD),
    "sd 2.1": lambda: make_conditional(LINEAR),
    "sdxl": lambda: make_conditional(SDXL),
}


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    adapter = find_adapter(model)
    return adapter.denoise(model, adapter.flat_inputs(model, batch=2))


@pytest.mark.parametrize("name", MODELS)
def test_without_a_block_a_unet_is_the_dense_one_whose_block_adds_nothing(name: str) -> None:
    model = MODELS[name]()
    rows = find_adapter(model).residual_modules(model)
    assert len({row.owner for row in rows.values()}) > 1
    for block, row in rows.items():
        silent = copy.deepcopy(model)
        for layer in LAST[row.owner]:
            for parameter in silent.get_submodule(f"{block}.{layer}").parameters():
                nn.init.zeros_(parameter)
        smaller, gone = without_blocks(model, block)
        assert gone == (block,)
        torch.testing.assert_close(output(smaller), output(silent), rtol=0, atol=1e-5)
        assert not torch.allclose(output(smaller), output(model), atol=1e-5)
    everything, _ = without_blocks(model, list(rows))
    assert len(skipped_in(everything)) == len(rows)
    assert output(everything).isfinite().all()


def test_a_model_that_has_lost_far_more_blocks_than_it_has_left_loads(tmp_path: Path) -> None:
    """Those that go are made first, from the dense config, and counted."""
    model = make_conditional({**SDXL, "transformer_layers_per_block": [1, 40]})
    known = find_adapter(model).residual_modules(model)
    blocks = [name for name, row in known.items() if row.owner == "BasicTransformerBlock" and ".down" not in name]
    dp.save(model, tmp_path / "dense")
    values = {"model": str(tmp_path / "dense"), "output": str(tmp_path / "pruned"), "importance": "magnitude"}
    result = prune(PruningConfig(**values, depth=blocks, pruning_ratio=0.3), progress=False)
    dense, left = len(model.state_dict()), len(result.model.state_dict())
    assert dense > 2 * left + 1000
    assert torch.equal(output(dp.load(tmp_path / "pruned")), output(result.model))


BLOCKS = ("down_blocks.0.resnets.1", "mid_block.attentions.0")


@pytest.fixture(scope="module")
def values(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config of a UNet whose block BLOCKS[0] adds nothing."""
    folder = tmp_path_factory.mktemp("skipped")
    model = make_unet(layers_per_block=2)
    for parameter in model.get_submodule(f"{BLOCKS[0]}.conv2").parameters():
        nn.init.zeros_(parameter)
    np.savez(folder / "images.npz", images=images)
    dp.save(DDPMPipeline(model, DDPMScheduler(num_train_timesteps=100)), folder / "dense")
    return {"model": str(folder / "dense"), "data": str(folder / "images.npz"), "importance": "magnitude"}


@pytest.fixture(scope="module")
def made(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Blocks named, then widths, refitted."""
    place = tmp_path_factory.mktemp("made") / "out"
    config = PruningConfig(**values, output=str(place), depth=BLOCKS, pruning_ratio=0.3)
    return prune(config, progress=False), place


def test_it_is_saved_with_its_plan_and_loads_as_it_was_with_this_package_and_without(made: Any) -> None:
    result, place = made
    expected = output_of(result.model.unet)
    assert set(result.plan.skipped) == set(result.plan.depth) == set(BLOCKS)
    assert json.loads((place / "unet" / PLAN_FILE).read_text())["skipped"] == list(result.plan.skipped)
    loaded = DiffusionPipeline.from_pretrained(place).unet
    assert torch.equal(output_of(loaded), expected)
    assert skipped_in(loaded) == set(BLOCKS)
    bare = loader(place / "unet").PrunedUNet2DModel.from_pretrained(place / "unet")
    assert "diffprune_plugin" not in type(bare).__mro__[1].__module__
    assert torch.equal(output_of(bare), expected)
    again = type(loaded).from_config(loaded.config)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in loaded.state_dict().items()}


def test_a_plan_takes_them_from_the_dense_model_too_or_leaves_it_as_it_was(made: Any, values: dict[str, Any]) -> None:
    plan = made[0].plan
    dense = dp.load(values["model"])
    with pytest.raises(
        BadInput, match=r"the plan takes whole blocks too \(down_blocks.0.resnets.1, mid_block.*remove_"
    ):
        dp.mask_(dense, plan)
    broken = plan.model_copy(update={"groups": (plan.groups[0].model_copy(update={"units": 7}), *plan.groups[1:])})
    before = output_of(dense)
    with pytest.raises(BadInput, match="the plan has 7 units"):
        dp.remove_(dense, broken)
    assert torch.equal(output_of(dense), before)
    dp.remove_(dense, plan)
    assert {name: p.shape for name, p in dense.named_parameters()} == {
        name: p.shape for name, p in made[0].model.unet.named_parameters()
    }


def test_blocks_alone_are_saved_as_a_pruned_model_and_one_that_adds_nothing_is_not_missed(
    values: dict[str, Any], tmp_path: Path
) -> None:
    config = PruningConfig(
        **values, output=str(tmp_path / "out"), depth=BLOCKS[:1], pruning_ratio=0.0, compensate=False
    )
    plan = prune(config, progress=False).plan
    assert not plan.layers
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out").unet
    assert type(loaded).__name__ == "PrunedUNet2DModel"
    torch.testing.assert_close(output_of(loaded), output_of(dp.load(values["model"])), rtol=0, atol=1e-6)


def test_the_refit_mends_a_part_of_what_a_block_did(values: dict[str, Any], tmp_path: Path) -> None:
    dense, errors = output_of(dp.load(values["model"])), {}
    for compensate in (False, True):
        place = str(tmp_path / str(compensate))
        given = {**values, "depth": BLOCKS[1:], "pruning_ratio": 0.0, "compensate": compensate}
        prune(PruningConfig(**given, output=place), progress=False)
        errors[compensate] = float((output_of(dp.load(place)) - dense).square().mean())
    assert errors[True] < errors[False]


def test_of_its_own_choice_the_block_that_adds_nothing_goes_first(values: dict[str, Any], tmp_path: Path) -> None:
    few = {"sensitivity_samples": 4, "sensitivity_probes": 1, "compensate": False}
    config = PruningConfig(**values, **few, output=str(tmp_path / "out"), depth="auto", macs_target=0.9)
    plan = prune(config, progress=False).plan
    assert plan.blocks is not None
    assert plan.blocks.errors[BLOCKS[0]] == min(plan.blocks.errors.values()) == 0
    assert BLOCKS[0] in plan.skipped
    assert plan.macs[1] / plan.blocks.macs == pytest.approx(0.9, rel=0.01)
    with pytest.raises(BadInput, match="depth: auto has one budget"):
        frontier_of(config)


def test_it_is_trained_with_the_dense_model_as_teacher_and_exported(
    made: Any, values: dict[str, Any], tmp_path: Path
) -> None:
    _, place = made
    given = {"model": str(place), "output": str(tmp_path / "tuned"), "data": values["data"], "teacher": values["model"]}
    given |= {"steps": 2, "batch_size": 2, "feature_weight": 0.1, "tracker": "none", "gradient_checkpointing": True}
    report = finetune(dp.FinetuneConfig.make(given), progress=False)
    assert np.isfinite(report.curve["features"]).all()
    tuned = dp.load(tmp_path / "tuned")
    assert skipped_in(tuned) == set(BLOCKS)
    to_onnx(tuned, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()


def test_what_no_plan_says_is_not_saved_and_what_cannot_go_is_refused(tmp_path: Path) -> None:
    model = make_unet(layers_per_block=2)
    smaller, _ = without_blocks(model, BLOCKS)
    assert isinstance(smaller, UNet2DModel)
    assert smallest_output(smaller, find_adapter(model)) == smallest_output(model, find_adapter(model))
    with pytest.raises(BadInput, match=r"down_blocks.0.resnets.1, mid_block.attentions.0: gone, but no plan says so"):
        dp.save(smaller, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInput, match=r"depth.*conv_in.*matches no .*plans: none.*may go: down_blocks.0.resnets"):
        without_blocks(model, "conv_in")
    with pytest.raises(BadInput, match=r"up_blocks.0.resnets.0"):  # its input has more channels
        without_blocks(model, "up_blocks.0.resnets.0")
    assert not Skip(True).state_dict()
