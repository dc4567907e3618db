"""A tiny UNet and its output; a module of its own, since two conftest.py cannot both be imported by name."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel

from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.criteria.sweep import Sweep

TINY = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
# A calibration that takes a second.
SMALL = Sweep(samples=12, curve_samples=2)
FAST: dict[str, Any] = {"batch_size": 4, "timesteps": 5, "progress": False}


def make_unet(seed: int = 0, **changes: Any) -> UNet2DModel:
    """A UNet with 0.2 M random parameters; biases and norms are random too, so that nothing hides behind zeros."""
    torch.manual_seed(seed)
    unet = UNet2DModel(**{**TINY, **changes}).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def output_of(unet: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return unet(**UNET_2D.example_inputs(unet, batch=2, seed=seed)).sample
