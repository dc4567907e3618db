"""Tiny real things that the tests share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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


def pytest_configure(config: pytest.Config) -> None:
    """The CPU's results are what is asserted, also on a machine with a GPU: it is hidden, but from `-m gpu`."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


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


@pytest.fixture(scope="session")
def call() -> Any:
    """A program that has to end with 0; returns its standard output."""

    def run(*words: object, cwd: Path, **env: object) -> str:
        given = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        given |= {name: str(value) for name, value in env.items()}
        result = subprocess.run([str(word) for word in words], cwd=cwd, env=given, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="session")
def site(call: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the checkout, installed: the folders adapters/ and export/ are in the package there."""
    place = tmp_path_factory.mktemp("wheel")
    copy_checkout(place / "source")
    pip = (sys.executable, "-m", "pip")
    call(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", place, place / "source", cwd=place)
    call(*pip, "install", "-q", "--no-deps", "--target", place / "site", *place.glob("*.whl"), cwd=place)
    return place / "site"


def copy_checkout(target: Path) -> None:
    """What goes into the wheel, copied, so that no build leftovers land in the checkout."""
    root = Path(__file__).parent.parent
    for name in ("diffprune_plugin", "adapters", "export"):
        shutil.copytree(root / name, target / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, target / name)
