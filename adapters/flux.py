"""diffusers' FluxTransformer2DModel: FLUX.1 dev and schnell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffprune_plugin.adapters.depth import STREAMS, Blocks
from diffprune_plugin.adapters.dit import RESIDUAL
from diffprune_plugin.adapters.ports import Config, Packing, Port, is_set
from diffprune_plugin.adapters.rows import JOINT, JOINT_NORMS, Heads, Keep, Known
from diffprune_plugin.adapters.table import ModelAdapter, always

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GUIDANCE = 3.5  # what the pipeline takes by default, and training scripts use
Sizes = Mapping[str, int]


def size(config: Config) -> tuple[int, int]:
    """(height, width) of the latents of a square of 1024 pixels; ``sample_size`` where somebody wrote it down."""
    side = int(config.get("sample_size") or 128)
    return side, side


def smallest(config: Config) -> tuple[int, int]:
    return 4, 4


def tokens(sizes: Sizes) -> int:
    """Every 2 x 2 latents are one."""
    return sizes["height"] * sizes["width"] // 4


def pack(latents: Tensor) -> Tensor:
    """(batch, channels, height, width) to (batch, tokens, 4 channels), as the pipeline does it."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(batch, height * width // 4, 4 * channels)


def unpack(states: Tensor, height: int, width: int) -> Tensor:
    """What `pack` packed."""
    batch, _, channels = states.shape
    squares = states.reshape(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(batch, channels // 4, height, width)


def image_places(sizes: Sizes) -> torch.Tensor:
    """(0, row, column) of each token."""
    import torch

    rows, columns = torch.arange(sizes["height"] // 2), torch.arange(sizes["width"] // 2)
    return torch.cartesian_prod(torch.zeros(1, dtype=rows.dtype), rows, columns).float()


def text_places(sizes: Sizes) -> torch.Tensor:
    import torch

    return torch.zeros(sizes["sequence"], 3)


def guidance(sizes: Sizes) -> torch.Tensor:
    import torch

    return torch.full((sizes["batch"],), GUIDANCE)


FLUX = ModelAdapter(
    model_class="FluxTransformer2DModel",
    component="transformer",
    sample="hidden_states",
    objective="flow_matching",
    model_time=1 / 1000,
    size=size,
    any_size=True,
    smallest=smallest,
    packing=Packing(pack, unpack, 4),
    inputs=(
        Port("hidden_states", "batch tokens {in_channels}"),
        Port("encoder_hidden_states", "batch sequence {joint_attention_dim}"),
        Port("pooled_projections", "batch {pooled_projection_dim}"),
        Port("timestep", "batch"),
        Port("img_ids", "tokens 3", made=image_places),
        Port("txt_ids", "sequence 3", made=text_places),
        Port("guidance", "batch", when=is_set("guidance_embeds"), made=guidance),
    ),
    blocks=(
        Blocks("transformer_blocks", "num_layers", stream=STREAMS),
        Blocks("single_transformer_blocks", "num_single_layers", stream=STREAMS),
    ),
    outputs=(
        Port("out_sample", ("batch", "tokens", lambda config: config.get("out_channels") or config["in_channels"])),
    ),
    keep=(Keep("x_embedder", always, RESIDUAL), "proj_out"),
    known=(Known("patch_size", (1,)),),
    heads=(
        Heads(
            "FluxAttention",
            "heads",
            JOINT,
            "to_q",
            whole=True,
            norms=JOINT_NORMS,
            widths=("inner_dim",),
            value="to_v",
        ),
    ),
    processors=("FluxAttnProcessor",),
    words=(("sequence", 512), ("tokens", tokens)),
    encoded=("encoder_hidden_states", "pooled_projections"),
)
