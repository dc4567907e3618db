"""Tiny UNet2DConditionModels: Stable Diffusion 1 and 2, SDXL and their relatives."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

SD: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
LINEAR = {**SD, "attention_head_dim": (2, 4), "use_linear_projection": True}
LINEAR |= {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
SDXL = {**LINEAR, "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time"}
SDXL |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
SDXL |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
SDXL |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
REFINER = {**SDXL, "projection_class_embeddings_input_dim": 24 + 5 * 8}
RESNET = {**SD, "layers_per_block": 2, "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D")}
RESNET |= {"up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D")}
CLASSES = {**SD, "num_class_embeds": 10}
PROJECTED = {**SD, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 12}
IDENTITY = {**SD, "class_embed_type": "identity"}
LCM = {**SD, "time_cond_proj_dim": 12}
FAMILIES = {"sd 1.5": SD, "sd 2.1": LINEAR, "sdxl": SDXL}
ADDED = (SDXL, SDXL, REFINER, REFINER)
RELATIVES = {
    "class labels": CLASSES,
    "class as a timestep": {**SD, "class_embed_type": "timestep"},
    "class projected and concatenated": {**PROJECTED, "class_embeddings_concat": True},
    "class already embedded": IDENTITY,
    "class already embedded, concatenated": {**IDENTITY, "class_embeddings_concat": True},
    "guidance as an input": LCM,
    "states projected": {**SD, "encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 12},
    "class in a linear layer": {**PROJECTED, "class_embed_type": "simple_projection"},
    "scale and shift": {**SD, "resnet_time_scale_shift": "scale_shift"},
    "resnet up and down": RESNET,
    "cross-attention only": {**SD, "only_cross_attention": True, "upcast_attention": True},
    "sdxl refiner": REFINER,
    "no middle": {**SD, "mid_block_type": None},
}
# The class-conditional latent diffusion model of ImageNet 256x256, arXiv 2112.10752.
LDM4: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (192, 384, 576, 960),
    "cross_attention_dim": 512,
    "attention_head_dim": 1,
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
}


def make_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """A UNet with about a million random parameters; biases and norms are random too."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def four_stages() -> UNet2DConditionModel:
    """With as many layers a stage as BK-SDM's plans are for."""
    torch.manual_seed(0)
    cross = "CrossAttn{}Block2D"
    return UNet2DConditionModel(
        **{
            **SD,
            "block_out_channels": (16, 16, 32, 32),
            "down_block_types": (*[cross.format("Down")] * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *[cross.format("Up")] * 3),
            "layers_per_block": 2,
        }
    ).eval()
