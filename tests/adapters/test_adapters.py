"""Every row of the UNet2DModel table is needed: without it, something breaks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model
from accelerate.hooks import remove_hook_from_module
from diffusers.models.attention_processor import Attention, AttnProcessor, SlicedAttnProcessor
from tiny import make_unet, output_of
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import diffprune_plugin as dp
from diffprune_plugin.adapters.table import Heads, ModelAdapter, Pairs
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.groups import trace_groups

FAMILY: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "one head": {"attention_head_dim": None},
    "class labels": {"num_class_embeds": 10},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "learned time": {"time_embedding_type": "learned", "num_train_timesteps": 100},
    "fourier time": {"time_embedding_type": "fourier"},
    "no attention in the middle": {"add_attention": False},
    "resnet up and down, three levels": {
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "layers_per_block": 2,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
}


def prune_with(adapter: ModelAdapter, **changes: Any) -> torch.Tensor:
    """Prune a tiny UNet by half with an adapter and run it."""
    unet = make_unet(**changes)
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5, adapter=adapter)
    dp.remove_(unet, plan, adapter=adapter)
    return output_of(unet)


def without(field: str, row: Any) -> ModelAdapter:
    return dataclasses.replace(UNET_2D, **{field: tuple(r for r in getattr(UNET_2D, field) if r != row)})


@pytest.mark.parametrize("changes", FAMILY.values(), ids=FAMILY)
def test_every_kind_of_unet2dmodel_runs_at_half_its_channels(changes: dict[str, Any]) -> None:
    dense = make_unet(**changes)
    output = prune_with(UNET_2D, **changes)
    assert output.shape == output_of(dense).shape
    assert torch.isfinite(output).all()


@pytest.mark.parametrize(
    ("row", "changes"),
    zip(UNET_2D.mirrors, ({}, {}, *[FAMILY["resnet up and down, three levels"]] * 2), strict=True),
    ids=lambda value: getattr(value, "attribute", ""),
)
def test_without_a_mirror_the_forward_fails_on_a_stale_size(row: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"UNet2DModel would not run: .*: AssertionError"):
        prune_with(without("mirrors", row), **changes)


def test_without_the_heads_row_heads_get_unequal_sizes() -> None:
    unet = make_unet()
    adapter = without("heads", UNET_2D.heads[0])
    plan, dense = dp.make_plan(unet, "magnitude", pruning_ratio=0.3, adapter=adapter), output_of(unet)
    with pytest.raises(BadInput, match=r"would not run: \S+attentions.0: shape"):
        dp.remove_(unet, plan, adapter=adapter)
    assert torch.equal(output_of(unet), dense)  # nothing was changed


@pytest.mark.parametrize("layer", UNET_2D.heads[0].layers)
def test_each_layer_of_the_heads_row_is_in_a_group_of_as_many_parts_as_heads(layer: str) -> None:
    groups = {name: g for g in trace_groups(make_unet(), UNET_2D) for name in g.layers}
    assert groups[f"mid_block.attentions.0.{layer}"].parts == 4


def test_without_the_pairs_row_the_halves_of_scale_and_shift_are_refused() -> None:
    with pytest.raises(BadInput, match="live and die together"):
        prune_with(without("pairs", UNET_2D.pairs[0]), **FAMILY["scale and shift"])


def test_without_the_kept_output_the_image_loses_channels() -> None:
    unet = make_unet(out_channels=4)
    adapter = dataclasses.replace(UNET_2D, keep=())
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5, adapter=adapter)
    with pytest.raises(BadInput, match=r"an output of shape \(1, 2, 4, 4\), not \(1, 4, 4, 4\)"):
        dp.remove_(unet, plan, adapter=adapter)


def test_a_keep_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(BadInput, match="matches no layer"):
        dataclasses.replace(UNET_2D, keep=("conv_last",)).kept_layers(make_unet())


@pytest.mark.parametrize(
    ("port", "changes"),
    zip(
        UNET_2D.inputs,
        (
            {},
            {},
            {"time_embedding_type": "fourier"},
            {"num_class_embeds": 10},
            {"class_embed_type": "timestep"},
            {"class_embed_type": "identity"},
        ),
        strict=True,
    ),
    ids=lambda value: getattr(value, "name", ""),
)
def test_without_an_input_port_the_forward_lacks_an_argument(port: Any, changes: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        prune_with(without("inputs", port), **changes)


def test_the_output_port_is_what_comes_out() -> None:
    unet = make_unet(in_channels=3, out_channels=2)
    (port,) = UNET_2D.outputs
    assert port.axes.split()[1] == "{out_channels}"
    assert output_of(unet).shape[1] == unet.config.out_channels


def test_known_attention_processors_agree_on_a_pruned_model_and_others_are_refused_by_name() -> None:
    unet = make_unet()
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.5))
    expected = output_of(unet)
    set_processor(unet, AttnProcessor())
    torch.testing.assert_close(output_of(unet), expected)
    other = make_unet()
    set_processor(other, SlicedAttnProcessor(2))
    with pytest.raises(BadInput, match="SlicedAttnProcessor"):
        dp.make_plan(other, "magnitude")


def set_processor(unet: torch.nn.Module, processor: Any) -> None:
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(processor)


@pytest.mark.parametrize("side", [28, (32, 28)])
def test_a_size_that_does_not_halve_often_enough_is_refused_with_those_near_that_do(side: Any) -> None:
    deep = {"block_out_channels": (16,) * 4, "down_block_types": ("DownBlock2D",) * 4, "norm_num_groups": 4}
    unet = make_unet(sample_size=side, up_block_types=("UpBlock2D",) * 4, **deep)
    with pytest.raises(BadInput, match=r"sample_size: .*28\)? does not divide by 8, as this UNet halves it; \d+ and"):
        dp.make_plan(unet, "magnitude")


def test_a_removal_that_misses_a_coupling_is_refused_by_the_layer_and_changes_nothing() -> None:
    """The FIR filters of NCSN++'s skip blocks reshape channels into the batch, where the graph loses them."""
    adapter = dataclasses.replace(UNET_2D, known=())
    unet = make_unet(in_channels=3, out_channels=3, down_block_types=("SkipDownBlock2D", "DownBlock2D"))
    plan, dense = dp.make_plan(unet, "magnitude", pruning_ratio=0.5, adapter=adapter), output_of(unet)
    with pytest.raises(BadInput, match=r"would not run: down_blocks\.0\.resnet_down\.\S+: .*; its adapter misses"):
        dp.remove_(unet, plan, adapter=adapter)
    assert torch.equal(output_of(unet), dense)


def test_what_class_embeddings_are_added_to_keeps_its_width() -> None:
    unet = make_unet(class_embed_type="identity")
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
    dp.remove_(unet, plan)
    assert unet.time_embedding.linear_2.out_features == UNET_2D.shapes(unet)["class_labels"][1] == 64


def test_rows_of_the_model_itself_name_its_layers_also_after_pruning() -> None:
    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.count = torch.nn.Linear(4, 8), 2

    heads = Heads("Gated", "count", ("proj",), query="proj", scale="scale")
    adapter = dataclasses.replace(UNET_2D, pairs=(Pairs("Gated", "proj", 2),), heads=(heads,))
    for model in (Gated(), type("PrunedGated", (Gated,), {})()):
        assert adapter.paired(model) == adapter.head_counts(model) == {"proj": 2}
        assert adapter.head_layers(model) == {"proj": ""}


def test_a_unet_without_an_adapter_is_refused_with_those_known() -> None:
    with pytest.raises(BadInput, match=r"no adapter for Linear; have .*UNet2DModel"):
        dp.make_plan(torch.nn.Linear(2, 2), "magnitude")


HOOKED = {
    "enable_model_cpu_offload": lambda unet: cpu_offload_with_hook(unet, execution_device="cpu"),
    "enable_sequential_cpu_offload": lambda unet: cpu_offload(unet, torch.device("cpu")),
    "device_map": lambda unet: dispatch_model(unet, {"": "cpu"}, force_hooks=True),
    "enable_layerwise_casting": lambda unet: unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "enable_group_offload": lambda unet: unet.enable_group_offload(*[torch.device("cpu")] * 2, "leaf_level"),
}


@pytest.mark.parametrize("way", HOOKED)
def test_a_model_that_is_moved_or_cast_by_hooks_is_refused_with_how_to_be_rid_of_them(way: str) -> None:
    unet = make_unet()
    HOOKED[way](unet)
    accelerates = "layerwise" not in way and "group" not in way
    told = r"Accelerate's \w+.*pipeline\.remove_all_hooks\(\) first" if accelerates else f"diffusers' .*{way}"
    with pytest.raises(BadInput, match=told):
        dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
    if accelerates:
        remove_hook_from_module(unet, recurse=True)  # what remove_all_hooks calls
        plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
        assert plan == dp.make_plan(make_unet(), "magnitude", pruning_ratio=0.5)
        dp.remove_(unet, plan)
        assert torch.isfinite(output_of(unet)).all()


COMPUTED: dict[str, tuple[Any, Any]] = {
    "prune": (lambda conv: prune.l1_unstructured(conv, "weight", 0.5), lambda conv: prune.remove(conv, "weight")),
    "spectral norm": (torch.nn.utils.spectral_norm, torch.nn.utils.remove_spectral_norm),
    "parametrize": (parametrizations.weight_norm, lambda conv: parametrize.remove_parametrizations(conv, "weight")),
}


@pytest.mark.parametrize(("computed", "permanent"), COMPUTED.values(), ids=COMPUTED)
def test_a_weight_that_is_computed_from_others_is_refused_until_it_is_permanent(computed: Any, permanent: Any) -> None:
    unet = make_unet()
    computed(unet.mid_block.resnets[0].conv1)
    with pytest.raises(BadInput, match=r"mid_block\.resnets\.0\.conv1: its weight is computed \(.*make it permanent"):
        dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
    permanent(unet.mid_block.resnets[0].conv1)
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.5))
    assert torch.isfinite(output_of(unet)).all()


@pytest.mark.parametrize("part", ["", "mid_block"])
def test_a_model_compiled_in_place_is_refused(part: str) -> None:
    unet = make_unet()
    unet.get_submodule(part).compile()
    with pytest.raises(BadInput, match=rf"{part or 'UNet2DModel'} is compiled: load the model without compile\(\)"):
        dp.make_plan(unet, "magnitude", pruning_ratio=0.5)


def tie_(unet: Any) -> None:
    first, second = unet.up_blocks[0].resnets[:2]
    second.conv2.weight = first.conv2.weight


def replace_(unet: Any) -> None:
    before = unet.mid_block.forward
    unet.mid_block.forward = lambda *given, **named: before(*given, **named)


@pytest.mark.parametrize(
    ("change_", "told"),
    [
        (lambda unet: setattr(unet, "mid_block", torch.compile(unet.mid_block)), "mid_block is compiled"),
        (lambda unet: setattr(unet, "mid_block", nn.DataParallel(unet.mid_block)), "mid_block is a DataParallel: give"),
        (replace_, "mid_block: its forward was replaced"),
        (tie_, r"up_blocks\.0\.resnets\.1\.conv2\.weight is up_blocks\.0\.resnets\.0\.conv2\.weight too"),
    ],
)
def test_a_part_that_is_wrapped_replaced_or_shared_is_refused(change_: Any, told: str) -> None:
    """Its directory would not load, or hold what the model computed."""
    unet = make_unet()
    change_(unet)
    with pytest.raises(BadInput, match=told):
        dp.make_plan(unet, "magnitude", pruning_ratio=0.5)


def test_a_model_that_was_made_where_nothing_is_traced_is_refused() -> None:
    with torch.inference_mode():
        unet = make_unet()
    with pytest.raises(BadInput, match=r"conv_in\.weight was made in torch\.inference_mode"):
        dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
