"""diffusers' UNet2DConditionModel: Stable Diffusion 1 and 2, SDXL, conditional latent diffusion."""

from __future__ import annotations

from typing import Any

from diffprune_plugin.adapters.depth import BK_SDM, RESIDUALS
from diffprune_plugin.adapters.ports import Config, Port, counts_classes, is_one_of, is_set, width
from diffprune_plugin.adapters.rows import Heads, Keep, Known, Mirror, Pairs, Refused
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.adapters.unet_2d import level_widths

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


def states_width(config: Config) -> int:
    """The width of the text encoder's states, before a layer of the UNet's own projects them."""
    return width(config, "encoder_hid_dim" if config.get("encoder_hid_dim_type") else "cross_attention_dim")


def time_width(config: Config) -> int:
    """The width of the time embedding, which class embeddings are added to or put beside."""
    factor = 2 if config.get("time_embedding_type") == "fourier" else 4
    return int(config.get("time_embedding_dim") or factor * config["block_out_channels"][0])


def differs(config: Config) -> bool:
    widths = config.get("cross_attention_dim")
    return isinstance(widths, (list, tuple)) and len(set(widths)) > 1


def narrower(model: Any) -> dict[str, Any]:
    """With the number of heads of each level, which this class calls attention_head_dim."""
    stated, count = model.config["attention_head_dim"], len(model.down_blocks)
    heads = list(stated) if isinstance(stated, (list, tuple)) else [stated] * count
    for level, block in enumerate(model.down_blocks):
        attentions = (module for module in block.modules() if type(module).__name__ == "Attention")
        heads[level] = next((attention.heads for attention in attentions), heads[level])
    return {**level_widths(model), "attention_head_dim": heads}


takes_embeddings = is_one_of("class_embed_type", "identity")
guided = is_set("time_cond_proj_dim")  # distilled with the guidance scale as an input (LCM)

UNET_2D_CONDITION = ModelAdapter(
    model_class="UNet2DConditionModel",
    inputs=(
        Port("sample", "batch {in_channels} height width"),
        Port("timestep", "batch", "int64"),
        Port("encoder_hidden_states", ("batch", "sequence", states_width)),
        Port(
            "class_labels",
            "batch",
            "int64",
            when=counts_classes,
            integers_below=("num_class_embeds",),
        ),
        Port("class_labels", "batch", "int64", when=is_one_of("class_embed_type", "timestep")),
        Port(
            "class_labels",
            "batch {projection_class_embeddings_input_dim}",
            when=is_one_of("class_embed_type", "projection", "simple_projection"),
        ),
        Port("class_labels", ("batch", time_width), when=takes_embeddings),
        Port("timestep_cond", "batch {time_cond_proj_dim}", when=guided),
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
    depths=BK_SDM,
    residuals=RESIDUALS,
    outputs=(Port("out_sample", "batch {out_channels} height width"),),
    keep=(
        "conv_out",
        Keep("time_embedding.linear_2", when=takes_embeddings),
        Keep("time_embedding.cond_proj", when=guided),  # it is added to the sinusoids
    ),
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
        Known("class_embed_type", (None, "timestep", "identity", "projection", "simple_projection")),
        Known("dual_cross_attention", (None, False)),
        Known("encoder_hid_dim_type", (None, "text_proj")),
        Known("mid_block_type", (None, "UNetMidBlock2DCrossAttn", "UNetMidBlock2D")),
        Known(
            "down_block_types",
            ("DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        ),
        Known("up_block_types", ("UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D")),
    ),
    refused=(
        Refused("cross_attention_dim", differs, "differs between blocks, which all take one encoder_hidden_states"),
    ),
    words=(("sequence", 77),),
    patches=("concat",),
    narrower=narrower,
    real_timesteps=lambda _: True,  # of sinusoids
)
