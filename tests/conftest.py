"""Tiny real things that the tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from tiny import make_unet

import diffprune_plugin as dp
from diffprune_plugin.cli import main

torch.set_num_threads(1)


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
