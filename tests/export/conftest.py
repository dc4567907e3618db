"""One tiny model, dense and pruned, and their ONNX files, for all tests of the export."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import diffprune_plugin
from diffprune_plugin.export import integrity, to_onnx

torch.set_num_threads(1)


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


@dataclass(frozen=True)
class Models:
    """The pipeline directories and their ONNX files; tests copy what they damage."""

    dense: Path
    pruned: Path
    dense_onnx: Path
    pruned_onnx: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    unet = tiny_unet()
    dense = diffprune_plugin.save(DDPMPipeline(unet, DDPMScheduler()), root / "dense")
    diffprune_plugin.remove_(unet, diffprune_plugin.make_plan(unet, "magnitude", pruning_ratio=0.3))
    pruned = diffprune_plugin.save(DDPMPipeline(unet, DDPMScheduler()), root / "pruned")
    to_onnx(dense, root / "dense.onnx")
    to_onnx(pruned, root / "pruned.onnx")
    return Models(dense, pruned, root / "dense.onnx", root / "pruned.onnx")


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy an ONNX file with all that belongs to it, to be damaged."""

    def copy(path: Path) -> Path:
        for name in (*integrity.read_manifest(path)["files"], integrity.manifest_path(path).name):
            shutil.copy(path.with_name(name), tmp_path / name)
        return tmp_path / path.name

    return copy


@pytest.fixture
def copy(models: Models, copied: Callable[[Path], Path]) -> Path:
    """A copy of the pruned ONNX file."""
    return copied(models.pruned_onnx)


@pytest.fixture
def resigned() -> Callable[[Path], None]:
    """Give a changed file a manifest that vouches for it, as a faulty exporter would."""

    def resign(path: Path) -> None:
        integrity.write_manifest(path, {path.name: integrity.fingerprint(path)})

    return resign


@pytest.fixture
def opened() -> Callable[[Path], str]:
    """Read a report that fetches nothing and is light or dark as its reader has it."""

    def read(path: Path) -> str:
        page = path.read_text()
        assert {source.partition(",")[0] for source in re.findall(r'(?:src|href)="([^"]*)', page)} <= {
            "data:image/png;base64"
        }
        assert "url(" not in page
        assert "@import" not in page
        assert "prefers-color-scheme: dark" in page
        return page

    return read


@pytest.fixture(scope="session")
def mixed_onnx(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp16, every axis dynamic, the weights in a file of their own."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.onnx"
    to_onnx(models.pruned, path, dtype="fp16", dynamic=("batch", "height", "width"), external_data=True)
    return path
