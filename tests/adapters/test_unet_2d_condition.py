"""Every row of the UNet2DConditionModel table is needed, for Stable Diffusion 1 and 2, SDXL and their relatives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from peft import LoraConfig
from tiny_conditional import (
    ADDED,
    CLASSES,
    FAMILIES,
    IDENTITY,
    LCM,
    LDM4,
    LINEAR,
    PROJECTED,
    REFINER,
    RELATIVES,
    RESNET,
    SD,
    SDXL,
    make_unet,
)

import diffprune_plugin as dp
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.adapters.unet_2d_condition import UNET_2D_CONDITION
from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.groups import CoupledGroup, trace_groups
from diffprune_plugin.testing.permute import new_order, reorder_


def output_of(unet: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return unet(**UNET_2D_CONDITION.example_inputs(unet, batch=2)).sample


def pruned(config: dict[str, Any], ratio: float = 0.5, adapter: ModelAdapter = UNET_2D_CONDITION) -> Any:
    unet = make_unet(config)
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=ratio, adapter=adapter), adapter=adapter)
    return unet


def without(field: str, row: Any) -> ModelAdapter:
    rows = tuple(r for r in getattr(UNET_2D_CONDITION, field) if r is not row)
    return dataclasses.replace(UNET_2D_CONDITION, **{field: rows})


@pytest.mark.parametrize("ratio", [pytest.param(0.3, marks=pytest.mark.slow), 0.5])
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_every_group_loses_what_the_rule_says_and_the_pruned_unet_reloads_with_difference_0(
    config: dict[str, Any], ratio: float, tmp_path: Any
) -> None:
    unet = make_unet(config)
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=ratio)
    assert plan == dp.make_plan(unet, "magnitude", pruning_ratio=ratio)
    for group in plan.groups:
        asked = 0 if group.root == "conv_out" else group.units - int(group.units * (1 - ratio))
        assert (group.requested, len(group.removed)) == (asked, asked // group.parts * group.parts), group.root
    dp.remove_(unet, plan)
    assert sum(p.numel() for p in unet.parameters()) == plan.params[1]
    expected = output_of(unet)
    assert expected.shape == (2, 4, 8, 8)
    assert torch.isfinite(expected).all()
    dp.save(unet, tmp_path / "pruned")
    assert torch.equal(output_of(dp.load(tmp_path / "pruned")), expected)


@pytest.mark.parametrize("config", RELATIVES.values(), ids=RELATIVES)
def test_every_relative_runs_at_half_its_channels(config: dict[str, Any]) -> None:
    assert torch.isfinite(output_of(pruned(config))).all()


@pytest.mark.parametrize("config", [*FAMILIES.values(), RELATIVES["scale and shift"]], ids=[*FAMILIES, "scale_shift"])
def test_the_units_of_a_group_can_change_places_without_any_effect(config: dict[str, Any]) -> None:
    """An oracle for coupling: every layer that a unit touches, and no other, has to be in its group."""
    unet = make_unet(config)
    expected = output_of(unet)
    for number, group in enumerate(trace_groups(unet, UNET_2D_CONDITION)):
        if group.root != "conv_out":
            permute_(unet, group, np.random.default_rng(number))
    assert not torch.equal(output_of(unet), expected)
    torch.testing.assert_close(output_of(unet), expected, rtol=0, atol=1e-4)


def permute_(unet: torch.nn.Module, group: CoupledGroup, rng: np.random.Generator) -> None:
    """Let the units of a group that share heads and norm groups change places, in all of its layers."""
    weights = {name: parameter.detach() for name, parameter in unet.named_parameters()}
    reorder_(weights, unet, group, new_order(unet, group, rng))
    for name, parameter in unet.named_parameters():
        parameter.data = weights[name]


def test_the_inner_width_of_a_geglu_is_exact() -> None:
    unet = make_unet(SD)
    for ratio, kept in {0.1: 115, 0.3: 89, 0.5: 64, 0.7: 38}.items():
        plan = dp.make_plan(unet, "magnitude", pruning_ratio=ratio)
        name = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net"
        assert plan.layers[f"{name}.0.proj"].before[1] == 2 * 128
        assert plan.layers[f"{name}.0.proj"].after[1] == 2 * kept
        assert plan.layers[f"{name}.2"].after[0] == kept


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_what_comes_from_the_text_encoder_keeps_its_width(config: dict[str, Any]) -> None:
    unet = pruned(config)
    crossed = [m for n, m in unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert {layer.in_features for layer in crossed} == {24}
    assert len({layer.out_features for layer in crossed} & {32, 64}) < 2
    if unet.config.addition_embed_type:
        assert unet.add_embedding.linear_1.in_features == 80
        assert unet.add_embedding.linear_2.out_features == unet.time_embedding.linear_2.out_features == 64


def test_heads_are_counted_for_each_block_and_lose_equally_many_dimensions() -> None:
    groups = {name: group for group in trace_groups(make_unet(LINEAR), UNET_2D_CONDITION) for name in group.layers}
    for block, heads in {"down_blocks.0": 2, "down_blocks.1": 4, "mid_block": 4, "up_blocks.0": 4}.items():
        for attention in ("attn1", "attn2"):
            for layer in UNET_2D_CONDITION.heads[0].layers:
                group = groups[f"{block}.attentions.0.transformer_blocks.0.{attention}.{layer}"]
                assert group.parts == heads
                assert len(group.layers) == 3


@pytest.mark.parametrize(
    ("row", "config"),
    zip(UNET_2D_CONDITION.mirrors, (SD, SD, RESNET, RESNET), strict=True),
    ids=lambda value: getattr(value, "attribute", ""),
)
def test_without_a_mirror_the_forward_fails_on_a_stale_size(row: Any, config: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"would not run: .*: AssertionError"):
        output_of(pruned(config, adapter=without("mirrors", row)))


@pytest.mark.parametrize(
    ("row", "config"),
    zip(UNET_2D_CONDITION.pairs, (SD, RELATIVES["scale and shift"]), strict=True),
    ids=lambda value: getattr(value, "owner", ""),
)
def test_without_a_pairs_row_the_halves_are_refused(row: Any, config: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="live and die together"):
        pruned(config, adapter=without("pairs", row))


def test_without_the_heads_row_heads_get_unequal_sizes() -> None:
    with pytest.raises(BadInput, match="would not run"):
        output_of(pruned(SD, ratio=0.3, adapter=without("heads", UNET_2D_CONDITION.heads[0])))


def test_without_the_kept_output_the_latent_loses_channels() -> None:
    with pytest.raises(BadInput, match=r"an output of shape \(1, 2, 4, 4\), not \(1, 4, 4, 4\)"):
        pruned(SD, adapter=dataclasses.replace(UNET_2D_CONDITION, keep=()))


@pytest.mark.parametrize(
    ("port", "config"),
    zip(
        [port for port in UNET_2D_CONDITION.inputs if port.name != "timestep_cond"],
        (SD, SD, SD, CLASSES, RELATIVES["class as a timestep"], PROJECTED, IDENTITY, *ADDED),
        strict=True,
    ),
    ids=lambda value: getattr(value, "name", ""),
)
def test_without_an_input_port_the_forward_lacks_an_argument(port: Any, config: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        pruned(config, adapter=without("inputs", port))


def test_the_guidance_of_a_distilled_unet_is_an_input_that_the_pruned_one_depends_on() -> None:
    unet = pruned(LCM)
    inputs = UNET_2D_CONDITION.flat_inputs(unet, batch=2)
    assert inputs["timestep_cond"].shape == (2, 12)
    assert unet.time_embedding.cond_proj.out_features == 32
    with torch.no_grad():
        outputs = [
            UNET_2D_CONDITION.denoise(unet, inputs | {"timestep_cond": t}) for t in torch.ones(2, 2, 12).cumsum(0)
        ]
    assert not torch.equal(*outputs)


def test_sdxls_inputs_are_flat_by_name_and_nested_in_the_forward() -> None:
    unet = make_unet(SDXL)
    flat = UNET_2D_CONDITION.flat_inputs(unet, batch=3)
    shapes = {name: tuple(tensor.shape) for name, tensor in flat.items()}
    assert shapes["encoder_hidden_states"] == (3, 77, 24)
    assert (shapes["text_embeds"], shapes["time_ids"]) == ((3, 32), (3, 6))
    nested = UNET_2D_CONDITION.example_inputs(unet, batch=3)
    assert set(nested) == {"sample", "timestep", "encoder_hidden_states", "added_cond_kwargs"}
    assert torch.equal(nested["added_cond_kwargs"]["text_embeds"], flat["text_embeds"])


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 2}, "addition_embed_type: 'text'"),
        ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 6}, "encoder_hid_dim_type: 'image_proj'"),
        ({"dual_cross_attention": True}, "dual_cross_attention: True"),
        ({"attention_type": "gated"}, "attention_type: 'gated'"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "UNetMidBlock2DSimpleCrossAttn"),
        ({"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D")}, "SimpleCrossAttnDownBlock2D"),
        ({"up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D")}, "SimpleCrossAttnUpBlock2D"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_the_table_does_not_cover_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    assert next(iter(config)) in {row.key for row in UNET_2D_CONDITION.known}
    with pytest.raises(BadInput, match=named):
        dp.make_plan(make_unet({**SD, **config}), "magnitude")


def test_the_refiner_takes_five_numbers_and_the_pooled_embedding_of_its_only_text_encoder() -> None:
    flat = UNET_2D_CONDITION.flat_inputs(make_unet(REFINER), batch=3)
    assert (flat["text_embeds"].shape, flat["time_ids"].shape) == ((3, 24), (3, 5))


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_the_default_attention_processors_give_the_same_plan(processor: Any) -> None:
    unet = make_unet(SD)
    plan = dp.make_plan(unet, "magnitude")
    unet.set_attn_processor(processor())
    assert dp.make_plan(unet, "magnitude") == plan


def test_another_attention_processor_is_refused_by_name_and_the_remedy_helps() -> None:
    unet = make_unet(SD)
    unet.set_attn_processor(SlicedAttnProcessor(2))
    with pytest.raises(BadInput, match=r"SlicedAttnProcessor; .* call unet.set_default_attn_processor\(\)"):
        dp.make_plan(unet, "magnitude")
    unet.set_default_attn_processor()
    assert dp.make_plan(unet, "magnitude").groups


def test_an_ip_adapter_is_refused_by_name() -> None:
    unet = make_unet(SD)
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor = IPAdapterAttnProcessor2_0(64, 24)
    with pytest.raises(
        BadInput, match=r"attn2 uses IPAdapterAttnProcessor2_0, .*; call pipeline.unload_ip_adapter\(\)"
    ):
        dp.make_plan(unet, "magnitude")


def test_fused_projections_are_refused_even_when_unfused_again() -> None:
    """diffusers keeps the fused layers, which would be saved at their dense size."""
    unet = make_unet(SD)
    unet.fuse_qkv_projections()
    for undo in (lambda: None, unet.unfuse_qkv_projections):
        undo()
        with pytest.raises(BadInput, match=r"has fused projections; load the model again"):
            dp.make_plan(unet, "magnitude")
    assert any(name.endswith("to_qkv") for name, _ in unet.named_modules())


@pytest.mark.parametrize("pruned", [False, True])
def test_what_a_class_does_not_make_of_its_config_is_refused_before_it_is_written(pruned: bool, tmp_path: Path) -> None:
    def made() -> Any:
        unet = make_unet(SD)
        if pruned:
            dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.3))
        return unet

    with_lora, fused, prompted = made(), made(), made()
    with_lora.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    fused.fuse_qkv_projections()
    prompted.mid_block.attentions[0].transformer_blocks[0].attn2.processor = IPAdapterAttnProcessor2_0(64, 24)
    for unet, words in ((with_lora, "carries a loaded LoRA"), (fused, "has fused proj"), (prompted, "weights of its")):
        with pytest.raises(BadInput, match=words):
            dp.save(unet, tmp_path / "unet")
    assert not list(tmp_path.iterdir())
    sliced = made()
    sliced.set_attn_processor(SlicedAttnProcessor(2))
    assert dp.load(dp.save(sliced, tmp_path / "unet")), "a processor without weights is no part of the model"


def test_a_controlnet_is_refused_with_the_reason() -> None:
    with pytest.raises(BadInput, match=r"ControlNetModel cannot be pruned: .* added to the skip connections"):
        dp.make_plan(ControlNetModel.from_unet(make_unet(SD)), "magnitude")


def test_a_loaded_lora_is_refused_by_name() -> None:
    """As peft leaves it: the layer wrapped in one that has it as ``base_layer``."""
    unet = make_unet(SD)
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    wrapper = torch.nn.Module()
    wrapper.base_layer = attention.to_q
    attention.to_q = wrapper
    unet.peft_config = {"watercolour": None}
    with pytest.raises(BadInput, match=r"attn1.to_q carries a loaded LoRA .*watercolour"):
        dp.make_plan(unet, "magnitude")


def test_ldm4_has_its_published_sizes_when_geglus_halves_are_ranked_apart() -> None:
    """arXiv 2305.10924: 400.9 M / 99.8 G dense, 189.4 M / 52.7 G published at ratio 0.3.

    Deduced from both: halves of a GEGLU ranked apart although they are coupled, so that 1 - 0.7 * 0.7 of the pairs
    go where 0.3 were asked. With 0.3 of the pairs gone it would be 203.2 M / 55.2 G.
    Its condition is one class embedding: a sequence of 1. On the meta device: sizes need no weights.
    """
    with init_empty_weights():
        unet = UNet2DConditionModel(**LDM4).eval()
    adapter = dataclasses.replace(UNET_2D_CONDITION, words=(("sequence", 1),))
    plan = dp.make_plan(
        unet,
        lambda group: torch.ones(len(group[0].idxs)),
        pruning_ratio=0.3,
        halves="apart",
        adapter=adapter,
    )
    assert np.array(plan.params) / 1e6 == pytest.approx([400.9, 189.4], rel=0.005)
    assert np.array(plan.macs) / 1e9 == pytest.approx([99.8, 52.7], rel=0.005)


def test_a_count_of_classes_beside_another_kind_of_embedding_says_nothing() -> None:
    config = {**SD, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 12}
    unet = UNet2DConditionModel(**config, num_class_embeds=7)
    (port,) = (port for port in UNET_2D_CONDITION.ports(unet) if port.name == "class_labels")
    assert port.shape(unet.config) == ("batch", 12)
    assert UNET_2D_CONDITION.denoise(unet, UNET_2D_CONDITION.flat_inputs(unet)).isfinite().all()
