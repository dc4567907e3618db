"""Tiny random UNets."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel


def tiny_unet() -> UNet2DModel:
    """Norm groups, heads and concatenations in 0.2 M random parameters."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return unsettled_(model).eval()


def unsettled_(model: Any) -> Any:
    """Norms and biases moved away from ones and zeros, behind which a fault could hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
