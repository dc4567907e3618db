"""Whole pipelines in optimum-onnx itself, which does not import beside transformers 5: an environment of its own.

python -m venv env && env/bin/pip install optimum-onnx==0.1.0 transformers==4.57.6 diffusers==0.36.0 onnxruntime
DIFFPRUNE_OPTIMUM_PYTHON=env/bin/python pytest tests/export/test_optimum_onnx.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import PIPELINES

import diffprune_plugin as dp
from diffprune_plugin.export.options import Options
from diffprune_plugin.export.pipeline_workflow import run_pipeline

PYTHON = os.environ.get("DIFFPRUNE_OPTIMUM_PYTHON", "")
CLASSES = {"stable diffusion": "ORTStableDiffusionPipeline", "stable diffusion xl": "ORTStableDiffusionXLPipeline"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="DIFFPRUNE_OPTIMUM_PYTHON names no Python with optimum-onnx 0.1.0"),
]


@pytest.mark.parametrize("family", CLASSES)
def test_optimum_onnx_draws_pytorchs_images_with_guidance_at_batch_1_and_2(family: str, tmp_path: Path) -> None:
    pipeline = PIPELINES[family][0](tmp_path / "tokenizer")
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude", pruning_ratio=0.3))
    dp.save(pipeline, tmp_path / "pruned")
    run_pipeline(tmp_path / "pruned", tmp_path / "onnx", Options(steps=4, latency=False))
    common = {"num_inference_steps": 4, "guidance_scale": 7.5, "seed": 3}
    calls = {f"batch_{n}": {"prompt": ["a bar at the top", "nothing"][:n], **common} for n in (1, 2)}
    words = str(tmp_path / "onnx"), CLASSES[family], str(tmp_path / "images.npz"), json.dumps(calls)
    script = str(Path(__file__).with_name("optimum_draws.py"))
    child = subprocess.run([PYTHON, "-I", script, *words], capture_output=True, text=True, cwd=tmp_path)
    assert child.returncode == 0, child.stderr[-3000:]
    drawn, loaded = np.load(tmp_path / "images.npz"), DiffusionPipeline.from_pretrained(tmp_path / "pruned")
    for name, given in calls.items():
        generator = torch.Generator().manual_seed(given.pop("seed"))
        expected = loaded(**given, generator=generator, output_type="np").images
        difference = float(np.abs(drawn[name] - expected).max())
        print(f"{family}, {name}: largest difference of a pixel {difference:.1e}")
        assert difference < 1e-4
        assert np.array_equal(np.round(drawn[name] * 255), np.round(expected * 255))
