"""diffusers' UNet2DConditionModel: Stable Diffusion 1 and 2, SDXL, conditional latent diffusion."""

from __future__ import annotations

from diffprune_plugin.adapters.ports import Config, Port, is_one_of, is_set, width
from diffprune_plugin.adapters.table import Heads, Known, Mirror, ModelAdapter, Pairs

# SDXL adds the pooled text embedding and a row of numbers: original size, crop and target size, two each. Its refiner
# has an aesthetic score for the target size, five numbers, and one text encoder, whose width the pooled embedding has.


def pooled_beside(config: Config, numbers: int) -> int:
    """The width of the pooled embedding where so many numbers are embedded beside it."""
    return width(config, "projection_class_embeddings_input_dim") - numbers * width(config, "addition_time_embed_dim")


def refiner(config: Config) -> bool:
    return adds_text_and_time(config) and pooled_beside(config, 5) == width(config, "cross_attention_dim")


def base(config: Config) -> bool:
    return adds_text_and_time(config) and not refiner(config)


def adds_text_and_time(config: Config) -> bool:
    return config.get("addition_embed_type") == "text_time"


def pooled_of_base(config: Config) -> int:
    return pooled_beside(config, 6)


UNET_2D_CONDITION = ModelAdapter(
    model_class="UNet2DConditionModel",
    inputs=(
        Port("sample", "batch {in_channels} height width"),
        Port("timestep", "batch", "int64"),
        Port("encoder_hidden_states", "batch sequence {cross_attention_dim}"),
        Port(
            "class_labels",
            "batch",
            "int64",
            when=is_set("num_class_embeds"),
            integers_below=("num_class_embeds",),
        ),
        Port("class_labels", "batch", "int64", when=is_one_of("class_embed_type", "timestep")),
        Port(
            "class_labels",
            "batch {projection_class_embeddings_input_dim}",
            when=is_one_of("class_embed_type", "projection", "simple_projection"),
        ),
        Port(
            "text_embeds",
            ("batch", pooled_of_base),
            when=base,
            inside="added_cond_kwargs",
        ),
        Port("time_ids", "batch 6", when=base, inside="added_cond_kwargs"),
        Port("text_embeds", "batch {cross_attention_dim}", when=refiner, inside="added_cond_kwargs"),
        Port("time_ids", "batch 5", when=refiner, inside="added_cond_kwargs"),
    ),
    outputs=(Port("out_sample", "batch {out_channels} height width"),),
    keep=("conv_out",),
    heads=(Heads("Attention", "heads", ("to_q", "to_k", "to_v"), query="to_q", scale="scale"),),
    pairs=(
        Pairs("GEGLU", "proj", 2),
        Pairs("ResnetBlock2D", "time_emb_proj", 2, when=("time_embedding_norm", "scale_shift")),
    ),
    mirrors=(
        Mirror("Upsample2D", "channels", "conv.in_channels"),
        Mirror("Downsample2D", "channels", "conv.in_channels"),
        Mirror("ResnetBlock2D", "upsample.channels", "conv1.in_channels"),
        Mirror("ResnetBlock2D", "downsample.channels", "conv1.in_channels"),
    ),
    known=(
        Known("addition_embed_type", (None, "text_time")),
        Known("attention_type", (None, "default")),
        # "identity" adds an input of the dense width to the time embedding.
        Known("class_embed_type", (None, "timestep", "projection", "simple_projection")),
        Known("dual_cross_attention", (None, False)),
        Known("encoder_hid_dim_type", (None,)),
        Known("mid_block_type", (None, "UNetMidBlock2DCrossAttn", "UNetMidBlock2D")),
        Known("time_cond_proj_dim", (None,)),
        Known(
            "down_block_types",
            ("DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        ),
        Known("up_block_types", ("UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D")),
    ),
    words=(("sequence", 77),),
)
