"""Transformers, dense and pruned, in ONNX Runtime: as PyTorch computes them, at other batches and lengths too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention
from tiny_transformers import make
from torch import Tensor

import diffprune_plugin as dp
from diffprune_plugin.export import to_onnx, verify_onnx
from diffprune_plugin.export.eager import eager_run
from diffprune_plugin.export.feeds import fixed_dims

SLOW = pytest.mark.slow
DYNAMIC = {
    "DiT": ("batch",),
    "PixArt sigma": ("batch", "sequence"),
    "PixArt alpha": ("batch", "sequence"),
    "SD 3": ("batch", "sequence"),
    "SD 3.5": ("batch", "sequence"),
    "Flux": ("batch", "tokens", "sequence"),
}


@pytest.mark.parametrize("name", ["DiT", *(pytest.param(name, marks=SLOW) for name in DYNAMIC if name != "DiT")])
def test_a_pruned_transformer_is_exported_and_computes_as_pytorch_at_every_size_that_is_dynamic(
    name: str, tmp_path: Path
) -> None:
    model = make(name, num_layers=1) if name == "DiT" else make(name)
    dp.remove_(model, dp.make_plan(model, "magnitude", pruning_ratio=0.3))
    before = Tensor.squeeze, Attention.prepare_attention_mask
    to_onnx(model, tmp_path / "model.onnx", dynamic=DYNAMIC[name])
    assert (Tensor.squeeze, Attention.prepare_attention_mask) == before
    result = verify_onnx(tmp_path / "model.onnx", model, batches=(1, 3))
    assert result.passed, result.worst
    assert result.worst.relative < 1e-5
    eager_run(model, tmp_path / "model.onnx", fixed_dims(tmp_path / "model.onnx", batch=3), torch.get_num_threads())()
