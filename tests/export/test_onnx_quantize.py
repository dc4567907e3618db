"""NNCF quantizes the ONNX file of a pruned UNet."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.pruning.loading import load

nncf = pytest.importorskip("nncf")


def test_the_int8_model_runs_and_is_near_the_one_it_came_from(models) -> None:
    unet, model = load(models.pruned / "unet"), onnx.load(models.pruned_onnx)
    feeds = [
        {key: value.numpy() for key, value in UNET_2D.flat_inputs(unet, batch=2, seed=seed).items()}
        for seed in range(4)
    ]
    quantized = nncf.quantize(model, nncf.Dataset(feeds), subset_size=4)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in quantized.graph.node}
    exact, rounded = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds[0])[0]
        for m in (model, quantized)
    )
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.2  # random weights; trained ones lose 3 %
