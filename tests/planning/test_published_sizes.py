"""Ratio 0.3 by the published rule gives the sizes of arXiv 2305.10924, table 1 and 2."""

from __future__ import annotations

import pytest
import torch_pruning as tp
from diffusers import UNet2DModel

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D

DDPM = {"in_channels": 3, "out_channels": 3, "layers_per_block": 2, "attention_head_dim": None, "norm_num_groups": 32}
DDPM |= {"norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
DOWN, UP = "DownBlock2D", "UpBlock2D"


def ddpm(sample_size: int, widths: tuple[int, ...], attention: int) -> UNet2DModel:
    """A DDPM UNet with attention in one down block."""
    down = [DOWN] * len(widths)
    up = [UP] * len(widths)
    down[attention] = "AttnDownBlock2D"
    up[len(widths) - 1 - attention] = "AttnUpBlock2D"
    blocks = {"down_block_types": tuple(down), "up_block_types": tuple(up)}
    return UNet2DModel(sample_size=sample_size, block_out_channels=widths, **blocks, **DDPM).eval()


@pytest.mark.parametrize(
    ("sample_size", "widths", "attention", "dense", "pruned"),
    [
        (32, (128, 256, 256, 256), 1, (35.7, 6.1), (19.8, 3.4)),
        (64, (128, 256, 256, 256, 512), 2, (78.7, 23.9), (43.7, 13.3)),
        (256, (128, 128, 256, 256, 512, 512), 4, (113.7, 248.7), (63.2, 138.8)),
    ],
    ids=["cifar10", "celeba", "lsun"],
)
def test_a_ratio_of_030_gives_the_published_params_and_macs(sample_size, widths, attention, dense, pruned) -> None:
    unet = ddpm(sample_size, widths, attention)
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.3)
    for sizes, (params, macs) in zip(zip(plan.params, plan.macs, strict=True), (dense, pruned), strict=True):
        assert sizes[0] / 1e6 == pytest.approx(params, abs=0.06)
        assert sizes[1] / 1e9 == pytest.approx(macs, rel=0.01)
    dp.remove_(unet, plan)
    assert sum(p.numel() for p in unet.parameters()) == plan.params[1]
    if sample_size < 256:  # torch-pruning's counter runs the model; at 256x256 that takes too long
        counted, _ = tp.utils.count_ops_and_params(unet, UNET_2D.example_inputs(unet))
        assert plan.macs[1] == pytest.approx(counted, rel=1e-3)
