"""Every block type, embedding and option of the two UNets that diffusers builds and runs: pruned, or refused by key."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.unets import unet_2d_blocks
from unet_variants import PRUNED, REFUSED, Variant

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput
from diffprune_plugin.export import to_onnx, verify_onnx

LEFT_OUT = {"num_attention_heads"}  # diffusers raises for it
# Those with a way of their own through the exporter: embeddings, inputs, resampling.
OWN_WAY = {"time_embedding_type", "class_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type", "in_channels"}
EXPORTED = [variant for variant in PRUNED if set(variant.change) & OWN_WAY]


@pytest.mark.slow
@pytest.mark.parametrize("variant", PRUNED, ids=str)
def test_what_diffusers_runs_is_pruned_to_half_runs_and_reloads_with_difference_0(
    variant: Variant, tmp_path: Path
) -> None:
    model = variant.made()
    dense = variant.output(model)
    plan = dp.make_plan(model, "magnitude", pruning_ratio=0.5)
    dp.remove_(model, plan)
    found = variant.output(model)
    assert plan.params[1] == sum(p.numel() for p in model.parameters()) < plan.params[0]
    assert found.shape == dense.shape
    assert bool(torch.isfinite(found).all())
    assert torch.equal(variant.output(dp.load(dp.save(model, tmp_path / "pruned"))), found)


@pytest.mark.slow
@pytest.mark.parametrize("variant", EXPORTED, ids=str)
def test_what_was_pruned_is_exported_and_verified(variant: Variant, tmp_path: Path) -> None:
    model = variant.made()
    dp.remove_(model, dp.make_plan(model, "magnitude", pruning_ratio=0.5))
    to_onnx(model, tmp_path / "model.onnx")
    result = verify_onnx(tmp_path / "model.onnx", model, batches=(1, 2))
    assert result.passed, result.worst


@pytest.mark.parametrize("variant", REFUSED, ids=str)
def test_what_cannot_be_pruned_is_refused_in_a_line_that_names_the_key(variant: Variant) -> None:
    key = next(iter(variant.change))
    with pytest.raises(BadInput, match=rf"^{key}: .+$"):
        dp.make_plan(variant.made(), "magnitude")


@pytest.mark.parametrize("cls", [UNet2DModel, UNet2DConditionModel])
def test_every_option_and_block_type_that_diffusers_has_is_in_the_sweep(cls: type) -> None:
    tried = [variant for variant in (*PRUNED, *REFUSED) if variant.cls is cls]
    options = set(inspect.signature(cls).parameters) - {key for variant in tried for key in variant.change}
    assert options <= LEFT_OUT, "neither pruned nor refused here"
    for key, make in (("down_block_types", "get_down_block"), ("up_block_types", "get_up_block")):
        built = set(re.findall(r'== "(\w+Block2D)"', inspect.getsource(getattr(unet_2d_blocks, make))))
        names = {name for variant in tried for name in (variant.base | variant.change)[key]}
        if cls is UNet2DModel:  # those with text do not take its calls
            built = {name for name in built if "CrossAttn" not in name}
        assert len(built) >= 8
        assert built <= names
