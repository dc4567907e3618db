"""Depth: what is left of a model without some blocks is a stock model, computes as the dense one that skips them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from tiny_conditional import SD, four_stages
from tiny_transformers import make

import diffprune_plugin as dp
from diffprune_plugin.adapters.depth import DepthPlan
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.planner import check_same_layers
from diffprune_plugin.planning.report import plan_text
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.depth import cut_out, named_plan, without_blocks
from diffprune_plugin.pruning.loading import load
from diffprune_plugin.workflow import prune


@torch.no_grad()
def output_of(model: Any) -> torch.Tensor:
    adapter = find_adapter(model)
    return adapter.denoise(model, adapter.flat_inputs(model, batch=2))


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("DiT", ["transformer_blocks.0"]),
        ("PixArt sigma", ["transformer_blocks.1"]),
        ("SD 3.5", ["transformer_blocks.0"]),
        ("Flux", ["transformer_blocks.0", "single_transformer_blocks.1"]),
    ],
)
def test_a_model_without_blocks_is_the_dense_one_whose_lists_are_shorter_and_loads_as_stock(
    name: str, gone: list[str], tmp_path: Path
) -> None:
    model = make(name)
    shorter = copy.deepcopy(model)
    for block in gone:
        path, _, number = block.rpartition(".")
        del shorter.get_submodule(path)[int(number)]
    smaller, names = without_blocks(model, gone)
    assert names == tuple(gone)
    assert torch.equal(output_of(smaller), output_of(shorter))
    assert type(smaller) is type(model)
    smaller.save_pretrained(tmp_path)
    assert torch.equal(output_of(type(model).from_pretrained(tmp_path)), output_of(smaller))


@pytest.mark.parametrize("name", ["SD 3", "SD 3.5"])
def test_the_last_block_of_sd3_is_made_of_one_that_gave_text_too(name: str) -> None:
    model = make(name)
    shorter = copy.deepcopy(model)
    del shorter.transformer_blocks[2]
    with torch.no_grad():
        expected = output_of(shorter)  # its last block still computes the text stream, which nobody reads
    smaller, _ = without_blocks(model, ["transformer_blocks.2"])
    assert smaller.transformer_blocks[1].context_pre_only
    torch.testing.assert_close(output_of(smaller), expected, rtol=0, atol=0)


def on_meta(cls: Any, **config: Any) -> Any:
    with torch.device("meta"):
        return cls(**config).eval()


def size_of(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("left", "published"), [(19, 459e6), (14, 340e6)])
def test_dit_has_the_sizes_of_tinyfusion_less_the_embedders_that_diffusers_copies(left: int, published: float) -> None:
    model = on_meta(DiTTransformer2DModel, in_channels=4, out_channels=8)
    gone = [f"transformer_blocks.{i}" for i in range(left, 28)]
    smaller, _ = without_blocks(model, gone)
    copied = size_of(smaller.transformer_blocks[0].norm1.emb)  # the original has one for all blocks
    assert size_of(smaller) - (left - 1) * copied == pytest.approx(published, rel=0.01)


def test_flux_mini_has_its_size() -> None:
    model = on_meta(FluxTransformer2DModel, guidance_embeds=True)
    double, single = r"{re}transformer_blocks\.([5-9]|1\d)", r"{re}single_transformer_blocks\.([1-3]\d)"
    smaller, _ = without_blocks(model, [double, single])
    assert (smaller.config.num_layers, smaller.config.num_single_layers) == (5, 10)
    assert size_of(smaller) == pytest.approx(3.2e9, rel=0.01)


SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


@pytest.mark.parametrize(("name", "published"), [("base", 58), ("small", 49), ("tiny", 33)])
def test_bk_sdm_has_its_published_sizes(name: str, published: int) -> None:
    """They are rounded up, as those of the whole pipelines beside them are: 1.032 B are told as 1.04."""
    dense = on_meta(UNet2DConditionModel, **SD15)
    assert math.ceil(size_of(dense) / 1e7) == 86
    smaller, gone = without_blocks(dense, f"bk-sdm-{name}")
    assert math.ceil(size_of(smaller) / 1e7) == published
    assert "up_blocks.3.resnets.1" in gone


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "published"), [(0.15, 7.28e9), (0.2, 7.02e9), (0.25, 6.76e9), (0.3, 6.54e9)])
def test_the_preset_gives_sd35_large_the_sizes_of_obs_diff(ratio: float, published: float) -> None:
    large = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
    model = on_meta(SD3Transformer2DModel, qk_norm="rms_norm", **large)
    plan = dp.make_plan(model, "random", preset="obs-diff", pruning_ratio=ratio)
    assert plan.params[0] == pytest.approx(8.06e9, rel=0.01)
    assert plan.params[1] == pytest.approx(published, rel=0.01)
    assert set(plan.heads.values()) == {(38, 38 - round(38 * ratio))}
    assert len(plan.heads) == 36


def test_the_preset_leaves_the_first_and_the_last_block_and_the_conditioning() -> None:
    plan = dp.make_plan(make("SD 3.5", num_layers=4), "magnitude", preset="obs-diff", pruning_ratio=0.3)
    lost = {group.root.split(".")[1] for group in plan.groups if group.removed}
    assert lost == {"1", "2"}
    assert {len(g.removed) for g in plan.groups if ".ff" in g.root and g.removed} == {round(128 * 0.3)}


SLOW = [pytest.param(f"bk-sdm-{name}", marks=pytest.mark.slow) for name in ("base", "small")]


@pytest.mark.parametrize("name", ["bk-sdm-tiny", *SLOW])
def test_a_named_plan_by_a_config_saves_a_stock_model_that_widths_can_go_from_next(name: str, tmp_path: Path) -> None:
    dp.save(four_stages(), tmp_path / "dense")
    values = {"model": str(tmp_path / "dense"), "importance": "magnitude", "depth": name}
    result = prune(PruningConfig(**values, output=str(tmp_path / "shallow"), pruning_ratio=0.0), progress=False)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "shallow")
    assert type(result.model) is UNet2DConditionModel
    # As the file maps them weights may lie unaligned, which other kernels are for: a copy lies as new ones do.
    assert torch.equal(output_of(copy.deepcopy(loaded)), output_of(result.model))
    kept = result.model.up_blocks[-1].resnets[1].conv1.weight
    assert torch.equal(kept, load(tmp_path / "dense").up_blocks[-1].resnets[2].conv1.weight)
    narrow = prune(PruningConfig(**values, output=str(tmp_path / "narrow"), pruning_ratio=0.5), progress=False)
    assert narrow.plan.depth == result.plan.depth
    assert plan_text(narrow.plan, 80).startswith(f"depth: {len(result.plan.depth)} blocks go first")
    assert torch.equal(output_of(load(tmp_path / "narrow")), output_of(narrow.model))


@pytest.mark.parametrize(
    ("name", "depth", "words"),
    [
        ("DiT", "bk-sdm-base", "bk-sdm-base.* matches no layer"),
        ("DiT", ["transformer_blocks"], "no block of transformer_blocks would be left"),
        ("DiT", ["transformer_blocks.7"], "transformer_blocks.7"),
    ],
)
def test_what_cannot_go_is_refused_by_name(name: str, depth: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        without_blocks(make(name), depth)


def test_a_plan_for_another_shape_of_unet_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(BadInput, match="BK-SDM is for 4 stages of 2 layers, this UNet has 2 of"):
        without_blocks(UNet2DConditionModel(**SD), "bk-sdm-base")


def test_the_tiny_plan_wants_two_last_stages_of_the_same_width() -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 4, "up_block_types": ("UpBlock2D",) * 4, "layers_per_block": 2}
    unet = UNet2DConditionModel(**{**SD, **blocks, "block_out_channels": (8, 8, 16, 32)})
    with pytest.raises(BadInput, match=r"bk-sdm-tiny.*its stage 3 has other channels than its last, 16 and 32"):
        without_blocks(unet, "bk-sdm-tiny")
    assert without_blocks(unet, "bk-sdm-small")[1]


@pytest.mark.parametrize("error", [KeyError, IndexError, ValueError])
def test_a_published_plan_that_a_config_does_not_fit_is_one_line(error: type[Exception]) -> None:
    def of(_: Any) -> Any:
        raise error("block_out_channels")

    with pytest.raises(BadInput, match=r"depth: 'mine' does not fit: .*block_out_channels"):
        named_plan(DepthPlan("mine", of), make("DiT"))


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("transformer_blocks.1", r"means other layers where depth numbers what it leaves anew \(transformer_blocks\.2"),
        ("transformer_blocks.2", r"means other layers .*\(transformer_blocks\.2"),
        ("transformer_blocks.0", None),
        ("*.ff", None),
    ],
)
def test_a_pattern_that_means_other_layers_of_what_depth_leaves_is_refused(pattern: str, told: str | None) -> None:
    dense = make("DiT", num_layers=3)
    cut = cut_out(dense, ["transformer_blocks.1"])
    options = PlanOptions(ignored_layers=(pattern,))
    if told is None:
        check_same_layers(dense, cut.model, cut.shallower.dense_name, options)
        return
    with pytest.raises(BadInput, match=f"ignored_layers: '{pattern}' {told}"):
        check_same_layers(dense, cut.model, cut.shallower.dense_name, options)
