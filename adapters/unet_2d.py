"""diffusers' UNet2DModel: DDPM, DDIM, score-based, and unconditional latent diffusion."""

from __future__ import annotations

from diffprune_plugin.adapters.ports import Config, Port, any_timestep, is_set
from diffprune_plugin.adapters.table import Heads, Known, Mirror, ModelAdapter, Pairs


def timesteps(config: Config) -> range:
    """Those that a learned time embedding has a row for."""
    learned = config.get("time_embedding_type") == "learned"
    return range(config["num_train_timesteps"]) if learned else any_timestep(config)


UNET_2D = ModelAdapter(
    model_class="UNet2DModel",
    inputs=(
        Port("sample", "batch {in_channels} height width"),
        Port("timestep", "batch", "int64"),
        Port(
            "class_labels",
            "batch",
            "int64",
            when=is_set("num_class_embeds"),
            integers_below=("num_class_embeds",),
        ),
    ),
    timesteps=timesteps,
    known=(Known("class_embed_type", (None,)),),
    outputs=(Port("out_sample", "batch {out_channels} height width"),),
    keep=("conv_out",),
    heads=(Heads("Attention", "heads", ("to_q", "to_k", "to_v"), query="to_q", scale="scale"),),
    pairs=(Pairs("ResnetBlock2D", "time_emb_proj", 2, when=("time_embedding_norm", "scale_shift")),),
    mirrors=(
        Mirror("Upsample2D", "channels", "conv.in_channels"),
        Mirror("Downsample2D", "channels", "conv.in_channels"),
        Mirror("ResnetBlock2D", "upsample.channels", "conv1.in_channels"),
        Mirror("ResnetBlock2D", "downsample.channels", "conv1.in_channels"),
    ),
)
