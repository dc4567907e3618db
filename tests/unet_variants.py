"""Every block type, embedding and option of the two UNets that diffusers builds and runs: what is pruned, what refused.

A table for the sweep of the tests and for `benchmarks/bench.py variants`, which prints it with what was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from tiny_conditional import SD, SDXL

from diffprune_plugin.plugins import find_adapter

Config = dict[str, Any]

PLAIN: Config = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}
ADDED = {"addition_embed_type_num_heads": 4}
HIDDEN = {"encoder_hid_dim": 12}
PROJECTED = {"projection_class_embeddings_input_dim": 12}
SIMPLE: Config = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
THREE: Config = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
SINGLE: Config = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
TIME_IDS = {key: SDXL[key] for key in ("addition_embed_type", "addition_time_embed_dim")}


def down(*names: str) -> list[Config]:
    return [{"down_block_types": (name, "DownBlock2D")} for name in names]


def up(*names: str) -> list[Config]:
    return [{"up_block_types": ("UpBlock2D", name)} for name in names]


def each(key: str, *values: Any, **with_: Any) -> list[Config]:
    return [{key: value, **with_} for value in values]


# What changes against PLAIN.
UNCONDITIONAL = [
    {},
    *down("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    *up("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
    *each("mid_block_type", None),
    *each("time_embedding_type", "fourier"),
    *each("time_embedding_type", "learned", num_train_timesteps=20),
    *each("time_embedding_dim", 48),
    *each("freq_shift", 1),
    *each("flip_sin_to_cos", False),
    *each("center_input_sample", True),
    *each("class_embed_type", "timestep", "identity"),
    *each("class_embed_type", "timestep", "identity", time_embedding_type="fourier"),
    *each("num_class_embeds", 10),
    *each("in_channels", 1, 2, 6, 7),
    *each("out_channels", 1, 6),
    *each("in_channels", 7, out_channels=6),
    *each("sample_size", None, 16, (8, 16)),
    *each("block_out_channels", (32, 32), (64, 32), (40, 48)),
    *each("block_out_channels", (32, 48, 64), **THREE),
    *each("block_out_channels", (32,), **SINGLE),
    *each("layers_per_block", 2, 3),
    *each("mid_block_scale_factor", 0.5, 1.41421),
    *each("downsample_padding", 0),
    *each("downsample_type", "conv", "resnet"),
    *each("upsample_type", "conv", "resnet"),
    *each("dropout", 0.1),
    *each("act_fn", "swish", "mish", "gelu", "relu"),
    *each("attention_head_dim", None, 4, 32, 64),
    *each("norm_num_groups", 1, 4, 16, 32),
    *each("attn_norm_num_groups", 4, 16),
    *each("norm_eps", 1e-3),
    *each("resnet_time_scale_shift", "scale_shift"),
    *each("resnet_time_scale_shift", "scale_shift", attn_norm_num_groups=4),
    *each("add_attention", False),
]
# The first key is the one that the refusal names.
UNCONDITIONAL_REFUSED = [
    *down("SkipDownBlock2D", "AttnSkipDownBlock2D", "KDownBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    *up("SkipUpBlock2D", "AttnSkipUpBlock2D", "KUpBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    *each("down_block_types", ("SkipDownBlock2D",) * 2, up_block_types=("SkipUpBlock2D",) * 2),
    *each("down_block_types", ("AttnSkipDownBlock2D",) * 2, up_block_types=("AttnSkipUpBlock2D",) * 2),
    *each("down_block_types", ("KDownBlock2D",) * 2, up_block_types=("KUpBlock2D",) * 2),
    *each("sample_size", 9, (8, 7)),
]
# What changes against SD.
CONDITIONAL = [
    {},
    *down("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"),
    *up("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D"),
    *each("mid_block_type", None, "UNetMidBlock2D"),
    *each("only_cross_attention", True, (True, False)),
    *each("mid_block_only_cross_attention", True, False),
    *each("in_channels", 5, 7, 8, 9),
    *each("out_channels", 8),
    *each("sample_size", 9),
    *each("center_input_sample", True),
    *each("freq_shift", 1),
    *each("flip_sin_to_cos", False),
    *each("layers_per_block", 2, (1, 2)),
    *each("downsample_padding", 0),
    *each("mid_block_scale_factor", 1.41421),
    *each("dropout", 0.1),
    *each("act_fn", "gelu", "mish", "relu"),
    *each("norm_num_groups", 4, 16),
    *each("cross_attention_dim", (24, 24)),
    *each("transformer_layers_per_block", 2, (1, 2)),
    *each("encoder_hid_dim", 12),
    *each("encoder_hid_dim_type", "text_proj", **HIDDEN),
    *each("attention_head_dim", 2, 8, (2, 4)),
    *each("use_linear_projection", True),
    *each("class_embed_type", "timestep", "identity"),
    *each("class_embed_type", "projection", "simple_projection", **PROJECTED),
    *each("class_embed_type", "timestep", "identity", time_embedding_type="fourier"),
    *each("class_embeddings_concat", True, num_class_embeds=10),
    *each("class_embeddings_concat", True, class_embed_type="identity"),
    *each("projection_class_embeddings_input_dim", 80, 64, **TIME_IDS),
    *each("num_class_embeds", 10),
    *each("upcast_attention", True),
    *each("resnet_time_scale_shift", "scale_shift"),
    *each("resnet_skip_time_act", True),
    *each("resnet_out_scale_factor", 1.41421),
    *each("resnet_out_scale_factor", 1.41421, down_block_types=("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D")),
    *each("time_embedding_type", "fourier"),
    *each("time_embedding_dim", 48),
    *each("time_embedding_act_fn", "silu", "gelu"),
    *each("timestep_post_act", "silu"),
    *each("time_cond_proj_dim", 16),
    *each("conv_in_kernel", 1, 5),
    *each("conv_out_kernel", 1, 5),
    *each("cross_attention_norm", "layer_norm"),
    *each("block_out_channels", (32, 32), (64, 32)),
    *each("norm_eps", 1e-3),
    *each("reverse_transformer_layers_per_block", (2, 1), transformer_layers_per_block=(1, 2)),
]
CONDITIONAL_REFUSED = [
    *down("SimpleCrossAttnDownBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D", "KDownBlock2D"),
    *down("KCrossAttnDownBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    *up("SimpleCrossAttnUpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D", "KUpBlock2D", "KCrossAttnUpBlock2D"),
    *up("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    *each("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    *each("mid_block_type", "UNetMidBlock2DSimpleCrossAttn", **SIMPLE),
    *each("cross_attention_dim", [16, 24]),
    *each("encoder_hid_dim_type", "text_image_proj", "image_proj", **HIDDEN),
    *each("dual_cross_attention", True),
    *each("addition_embed_type", "text", **ADDED),
    *each("addition_embed_type", "text", encoder_hid_dim_type="text_proj", **HIDDEN, **ADDED),
    *each("addition_embed_type", "text_image"),
    *each("addition_embed_type", "image", "image_hint", encoder_hid_dim_type="image_proj", **HIDDEN),
    *each("attention_type", "gated", "gated-text-image"),
]


@dataclass(frozen=True, eq=False)
class Variant:
    """A tiny UNet: its class, a config that works, and what changes against it."""

    cls: type
    base: Config
    change: Config

    def __str__(self) -> str:
        return f"{self.cls.__name__}: {', '.join(f'{key} {value}' for key, value in self.change.items()) or 'plain'}"

    def made(self) -> Any:
        torch.manual_seed(0)
        return self.cls(**{**self.base, **self.change}).eval()

    @torch.no_grad()
    def output(self, model: Any) -> torch.Tensor:
        """Of seeded inputs, a batch of two."""
        adapter = find_adapter(model)
        return adapter.denoise(model, adapter.flat_inputs(model, batch=2))


def variants(unconditional: list[Config], conditional: list[Config]) -> Iterator[Variant]:
    yield from (Variant(UNet2DModel, PLAIN, change) for change in unconditional)
    yield from (Variant(UNet2DConditionModel, SD, change) for change in conditional)


PRUNED = [*variants(UNCONDITIONAL, CONDITIONAL)]
REFUSED = [*variants(UNCONDITIONAL_REFUSED, CONDITIONAL_REFUSED)]
