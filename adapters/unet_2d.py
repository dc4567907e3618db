"""diffusers' UNet2DModel: DDPM, DDIM, score-based, and unconditional latent diffusion."""

from __future__ import annotations

from typing import Any

from diffprune_plugin.adapters.depth import RESIDUALS
from diffprune_plugin.adapters.ports import (
    Config,
    Port,
    any_timestep,
    configured_size,
    counts_classes,
    is_one_of,
)
from diffprune_plugin.adapters.rows import Heads, Keep, Known, Mirror, Pairs, Refused
from diffprune_plugin.adapters.table import ModelAdapter


def timesteps(config: Config) -> range:
    """Those that a learned time embedding has a row for; above 0 where the model divides by them."""
    learned = config.get("time_embedding_type") == "learned"
    return range(config["num_train_timesteps"]) if learned else any_timestep(config)[has_sigmas(config) :]


def time_width(config: Config) -> int:
    """The width of the time embedding, which class embeddings are added to."""
    return int(config.get("time_embedding_dim") or 4 * config["block_out_channels"][0])


def halves(config: Config) -> int:
    """What the sides of a sample have to be a multiple of: skips meet what was halved and doubled again."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def does_not_halve(config: Config) -> bool:
    return any(side % halves(config) for side in configured_size(config))


def sizes_that_halve(config: Config) -> str:
    step, side = halves(config), max(configured_size(config))
    lower = side // step * step
    near = f"{lower} and {lower + step} do" if lower else f"{step} does"
    return f"does not divide by {step}, as this UNet halves it; {near}: set it in config.json"


def level_widths(model: Any) -> dict[str, Any]:
    """What a config of the same class would say of the widths of each level, if all of one level were those of its last
    layer on the way down, and of the time embedding."""
    levels = [block.resnets[-1].conv2.out_channels for block in model.down_blocks]
    return {"block_out_channels": levels, "time_embedding_dim": model.time_embedding.linear_1.out_features}


def narrower(model: Any) -> dict[str, Any]:
    """With the dimensions of a head, of which a config has one number for all levels."""
    one = next((module for module in model.modules() if type(module).__name__ == "Attention"), None)
    if one is None or model.config.get("attention_head_dim") is None:
        return level_widths(model)
    return {**level_widths(model), "attention_head_dim": one.to_q.out_features // one.heads}


has_sigmas = is_one_of("time_embedding_type", "fourier")  # real timesteps above 0: it takes their logarithm
takes_embeddings = is_one_of("class_embed_type", "identity")


UNET_2D = ModelAdapter(
    model_class="UNet2DModel",
    inputs=(
        Port("sample", "batch {in_channels} height width"),
        Port("timestep", "batch", "int64", when=lambda config: not has_sigmas(config)),
        Port("timestep", "batch", when=has_sigmas),
        Port(
            "class_labels",
            "batch",
            "int64",
            when=counts_classes,
            integers_below=("num_class_embeds",),
        ),
        Port("class_labels", "batch", "int64", when=is_one_of("class_embed_type", "timestep")),
        Port("class_labels", ("batch", time_width), when=takes_embeddings),
    ),
    timesteps=timesteps,
    real_timesteps=lambda config: config.get("time_embedding_type") != "learned",
    narrower=narrower,
    residuals=RESIDUALS,
    known=(
        Known("class_embed_type", (None, "timestep", "identity")),
        Known("mid_block_type", (None, "UNetMidBlock2D")),
        Known("down_block_types", ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D")),
        Known("up_block_types", ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D")),
    ),
    refused=(Refused("sample_size", does_not_halve, sizes_that_halve),),
    outputs=(Port("out_sample", "batch {out_channels} height width"),),
    keep=("conv_out", Keep("time_embedding.linear_2", when=takes_embeddings)),
    heads=(Heads("Attention", "heads", ("to_q", "to_k", "to_v"), query="to_q", scale="scale"),),
    pairs=(Pairs("ResnetBlock2D", "time_emb_proj", 2, when=("time_embedding_norm", "scale_shift")),),
    mirrors=(
        Mirror("Upsample2D", "channels", "conv.in_channels"),
        Mirror("Downsample2D", "channels", "conv.in_channels"),
        Mirror("ResnetBlock2D", "upsample.channels", "conv1.in_channels"),
        Mirror("ResnetBlock2D", "downsample.channels", "conv1.in_channels"),
    ),
)
