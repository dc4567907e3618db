"""The demo takes the embedded model the whole way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline
from PIL import Image

import diffprune_plugin as dp
from diffprune_plugin import demo
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.diffusion.loss import noise_prediction_loss
from diffprune_plugin.errors import CheckFailed
from diffprune_plugin.export import ORTUNet


@pytest.mark.slow
def test_the_demo_leaves_a_report_with_pictures_and_a_model_that_reloads(tmp_path, run) -> None:
    output = tmp_path / "out"
    code, out, _ = run("demo", "--output", output)
    assert code == 0
    assert "report.md" in out
    report = (output / "report.md").read_text()
    for picture in ("samples.png", "loss_curve.png", "latency.png", "widths.png"):
        assert picture in report
        assert Image.open(output / picture).size[0] > 300
    assert "diffprune prune" in report
    plan, uniform = (dp.load(output / name).pruning_plan for name in ("pruned", "uniform"))
    for each in (plan, uniform):
        assert each.macs[1] / each.macs[0] == pytest.approx(demo.BUDGET, abs=0.01)
    assert plan.allocation is not None
    assert uniform.allocation is None
    assert plan.params[1] < 0.8 * uniform.params[1]
    assert type(DiffusionPipeline.from_pretrained(output / "pruned").unet).__name__ == "PrunedUNet2DModel"
    assert run("demo", "--output", output)[0] == 2
    verdict = json.loads((output / "model.onnx.verdict.json").read_text())
    assert verdict["passed"]
    assert "dense / pruned" in report
    assert run("inspect", output / "model.onnx", "--json")[0] == 0
    assert_the_file_draws_what_pytorch_draws(output)


def test_what_it_needs_is_asked_for_before_any_work(tmp_path, run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, err = run("demo", "--output", tmp_path / "out")
    assert code == 2
    assert "pip install 'diffprune-plugin[cpu]'" in err
    assert not (tmp_path / "out").exists()


def assert_the_file_draws_what_pytorch_draws(output: Path) -> None:
    """From the same seed, in diffusers' DDIMPipeline, to a fortieth of a grey level.

    Not the same uint8 images: on some processors the rounding of one pixel tips over.
    """
    scheduler = DDIMScheduler.from_config(demo.MODEL / "scheduler")
    unets = (dp.load(output / "pruned"), ORTUNet(output / "model.onnx"))
    drawn = []
    for unet in unets:
        pipeline = DDIMPipeline(unet=unet, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        drawn.append(pipeline(batch_size=2, generator=generator, num_inference_steps=20, output_type="np").images)
    assert np.abs(drawn[0] - drawn[1]).max() * 255 < 1 / 40
    assert np.ptp(drawn[0]) > 0.5


def test_the_embedded_model_is_trained_and_small() -> None:
    weights = demo.MODEL / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 6e6
    facts = json.loads((demo.HERE / "training.json").read_text())
    pipeline = DiffusionPipeline.from_pretrained(demo.MODEL)
    samples = load_samples(demo.HELD_OUT_IMAGES)
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(100)
    noise = torch.randn(100, 1, 32, 32, generator=generator)
    timesteps = torch.randint(0, 1000, (100,), generator=generator)
    with torch.no_grad():
        loss = noise_prediction_loss(pipeline.unet, pipeline.scheduler, samples.sample(rows), noise, timesteps, {})
    assert loss.mean().item() < 2 * facts["held_out_loss"] < 0.06


def test_no_held_out_image_is_among_those_for_calibration() -> None:
    images = [np.load(path)["images"] for path in (demo.CALIBRATION_IMAGES, demo.HELD_OUT_IMAGES)]
    assert not {image.tobytes() for image in images[0]} & {image.tobytes() for image in images[1]}


def test_a_demo_that_fails_leaves_nothing_and_takes_nothing_of_the_users(tmp_path, run, monkeypatch) -> None:
    def make(work: Path, output: Path, seed: int, console: object) -> None:
        (work / "report.md").write_text(f"diffprune inspect {work / 'pruned'}")
        for name in ("pruned", "uniform"):
            (work / name).mkdir()
        if fails:
            raise CheckFailed("no")

    monkeypatch.setattr(demo, "make", make)
    output, fails = tmp_path / "out", True
    assert run("demo", "--output", output)[0] == 1
    assert not list(tmp_path.iterdir())
    fails = False
    assert run("demo", "--output", output)[0] == 0
    assert (output / "report.md").read_text() == f"diffprune inspect {output / 'pruned'}", "not where it was made"
    assert run("demo", "--output", output, "--overwrite")[0] == 0
    (output / "thesis.txt").write_text("years of work")
    code, _, err = run("demo", "--output", output, "--overwrite")
    assert code == 2
    assert "thesis.txt" in err
    assert (output / "thesis.txt").exists()
