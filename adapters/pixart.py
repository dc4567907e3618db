"""diffusers' PixArtTransformer2DModel: PixArt alpha and sigma."""

from __future__ import annotations

from diffprune_plugin.adapters.depth import Blocks
from diffprune_plugin.adapters.dit import HEADS, RESIDUAL, predicted_channels
from diffprune_plugin.adapters.ports import Config, Port, is_set, two_patches, width
from diffprune_plugin.adapters.rows import Keep, Known
from diffprune_plugin.adapters.table import ModelAdapter, always


def sized(config: Config) -> bool:
    """Whether it is conditioned on resolution and aspect ratio, as alpha at 1024 pixels is."""
    asked = config.get("use_additional_conditions")
    return bool(config["sample_size"] == 128 if asked is None else asked)


def caption_width(config: Config) -> int:
    return width(config, "caption_channels" if config.get("caption_channels") else "cross_attention_dim")


PIXART = ModelAdapter(
    model_class="PixArtTransformer2DModel",
    component="transformer",
    sample="hidden_states",
    smallest=two_patches,
    inputs=(
        Port("hidden_states", "batch {in_channels} height width"),
        Port("encoder_hidden_states", ("batch", "sequence", caption_width)),
        Port("timestep", "batch", "int64"),
        Port("encoder_attention_mask", "batch sequence", "int64", integers_below=2, optional=True),
        Port("resolution", "batch 2", when=sized, inside="added_cond_kwargs"),
        Port("aspect_ratio", "batch 1", when=sized, inside="added_cond_kwargs"),
    ),
    blocks=(Blocks("transformer_blocks", "num_layers"),),
    outputs=(Port("out_sample", ("batch", predicted_channels, "height", "width")),),
    keep=(
        Keep("pos_embed.proj", always, RESIDUAL),
        Keep("caption_projection.linear_2", is_set("caption_channels"), RESIDUAL),  # the forward views it so
        "proj_out",
    ),
    heads=(HEADS,),
    known=(Known("activation_fn", ("gelu-approximate", "gelu")), Known("attention_type", (None, "default"))),
    words=(("sequence", 300),),
    patches=("squeeze", "attention_mask"),
    encoded=(
        "encoder_hidden_states",
        "encoder_attention_mask",
        "null encoder_hidden_states",
        "null encoder_attention_mask",
    ),
)
