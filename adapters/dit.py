"""diffusers' DiTTransformer2DModel: class-conditional DiT."""

from __future__ import annotations

from diffprune_plugin.adapters.depth import Blocks
from diffprune_plugin.adapters.ports import Config, Port, two_patches
from diffprune_plugin.adapters.rows import Heads, Keep, Known
from diffprune_plugin.adapters.table import ModelAdapter, always

RESIDUAL = "kept: the width of the residual stream, which every block, modulation and position embedding shares"

HEADS = Heads(
    "Attention",
    "heads",
    ("to_q", "to_k", "to_v"),
    "to_q",
    "scale",
    widths=("inner_dim", "inner_kv_dim"),
    value="to_v",
)


def predicted_channels(config: Config) -> int:
    """Those of the sample, and as many for the variance where it is learned."""
    return int(config.get("out_channels") or config["in_channels"])


DIT = ModelAdapter(
    model_class="DiTTransformer2DModel",
    component="transformer",
    sample="hidden_states",
    smallest=two_patches,
    inputs=(
        Port("hidden_states", "batch {in_channels} height width"),
        Port("timestep", "batch", "int64"),
        Port("class_labels", "batch", "int64", integers_below=("num_embeds_ada_norm",), none=True),
    ),
    blocks=(Blocks("transformer_blocks", "num_layers", first_is_read=True),),  # its embedding, for the output
    outputs=(Port("out_sample", ("batch", predicted_channels, "height", "width")),),
    keep=(Keep("pos_embed.proj", always, RESIDUAL), "proj_out_2"),
    heads=(HEADS,),
    known=(Known("activation_fn", ("gelu-approximate", "gelu")),),
)
