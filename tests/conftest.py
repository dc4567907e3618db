"""Tiny real things that the tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.cli import main

torch.set_num_threads(1)
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


@pytest.fixture
def unet() -> UNet2DModel:
    return make_unet()


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=100)


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """16 images with structure: bars at random places."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((16, 16, 16, 1), np.uint8)
    for image in pixels:
        row, column = rng.integers(2, 12, 2)
        image[row : row + 3, column - 2 : column + 3] = 255
    return pixels


@pytest.fixture
def pipeline(unet: UNet2DModel, scheduler: DDPMScheduler) -> DDPMPipeline:
    return DDPMPipeline(unet, scheduler)


@pytest.fixture
def dense_dir(pipeline: DDPMPipeline, tmp_path: Path) -> Path:
    return dp.save(pipeline, tmp_path / "dense")


@pytest.fixture
def npz(images: np.ndarray, tmp_path: Path) -> Path:
    path = tmp_path / "images.npz"
    np.savez(path, images=images)
    return path


@pytest.fixture
def config_file(dense_dir: Path, npz: Path, tmp_path: Path) -> Path:
    """A config that calibrates in a second."""
    path = tmp_path / "config.json"
    values = {
        "model": str(dense_dir),
        "output": str(tmp_path / "pruned"),
        "data": str(npz),
        "importance": {"name": "diff_taylor", "samples": 8, "curve_samples": 2},
        "timesteps": 5,
        "batch_size": 4,
    }
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line in this process: returns (exit code, standard output, standard error)."""

    def call(*words: object) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
