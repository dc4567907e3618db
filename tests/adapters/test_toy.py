"""The core knows no UNet: a class with other names goes the whole way by its table alone."""

from __future__ import annotations

import copy
import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from toy import MIXER, Mixer, MixerPipeline

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput
from diffprune_plugin.evaluation.evaluate import evaluate
from diffprune_plugin.evaluation.settings import Drawing
from diffprune_plugin.export import ORTUNet, read_provenance, to_onnx, verify_onnx
from diffprune_plugin.testing import check_adapter


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.EntryPoint("toy", "toy", "diffprune")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [found] if group == "diffprune" else [])


@pytest.fixture
def pipeline() -> MixerPipeline:
    torch.manual_seed(0)
    return MixerPipeline(Mixer().eval(), DDPMScheduler(num_train_timesteps=20))


@pytest.fixture
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)


def test_its_table_holds_all_that_it_needs_and_no_more() -> None:
    check_adapter(MIXER, Mixer(colours=2))


def test_it_is_calibrated_planned_removed_compensated_saved_loaded_evaluated_and_exported(
    pipeline: MixerPipeline, pictures: np.ndarray, tmp_path: Path
) -> None:
    dense, images = copy.deepcopy(pipeline.denoiser), dp.encode(pipeline, pictures)
    calibration = dp.calibrate(
        dense, pipeline.scheduler, images, dp.Sweep(samples=8, curve_samples=2), timesteps=4, progress=False
    )
    assert set(calibration.gradients) == {name for name, _ in dense.named_parameters()}
    plan = dp.make_plan(dense, dp.importance("diff_taylor", calibration=calibration), pruning_ratio=0.5)
    assert {g.root: len(g.removed) for g in plan.groups} == {"first": 8, "inner": 16, "last": 0}
    dp.remove_(pipeline.denoiser, plan)
    report = dp.compensate_(pipeline.denoiser, dense, plan, pipeline.scheduler, images, samples=16, progress=False)
    assert [repair.block for repair in report.repairs]
    dp.save(pipeline, tmp_path / "small")
    loaded = dp.load(tmp_path / "small")
    assert type(loaded).__name__ == "PrunedMixer"
    inputs = MIXER.flat_inputs(dense, batch=2)
    assert torch.equal(MIXER.denoise(loaded, inputs), MIXER.denoise(pipeline.denoiser, inputs))

    quick = Drawing(count=2, steps=2, loss_samples=2)
    facts = evaluate(
        pipeline, against=MixerPipeline(dense, pipeline.scheduler), reference=pictures, drawing=quick, progress=False
    ).facts
    assert facts["models"]["model"]["params"] < facts["models"]["against"]["params"]
    assert facts["compared"]["SSIM"] < 1
    assert facts["models"]["model"]["loss"] > 0

    file = tmp_path / "mixer.onnx"
    to_onnx(loaded, file, dynamic=("batch", "height", "width"))
    assert verify_onnx(file, loaded, scheduler=DDIMScheduler(20), steps=3).passed
    session = ORTUNet(file)
    expected = MIXER.denoise(loaded, inputs)
    found = session(x=inputs["x"], t=inputs["t"], return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(session(inputs["x"], inputs["t"]).sample, found)


def test_an_objective_that_nobody_knows_is_named(
    pipeline: MixerPipeline, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MIXER.__dict__, "objective", "telepathy")
    with pytest.raises(BadInput, match="adapter Mixer: objective 'telepathy': known: noise_prediction"):
        dp.calibrate(pipeline.denoiser, pipeline.scheduler, pictures, timesteps=4, progress=False)


def test_a_pipeline_with_nothing_to_prune_says_what_it_has(pipeline: MixerPipeline) -> None:
    del pipeline.denoiser
    with pytest.raises(
        BadInput, match=r"MixerPipeline has no denoiser, transformer or UNet \(it has denoiser, scheduler\)"
    ):
        dp.encode(pipeline, np.zeros((2, 8, 8, 1), np.uint8))


def test_the_names_of_its_inputs_are_in_the_exported_file(pipeline: MixerPipeline, tmp_path: Path) -> None:
    to_onnx(pipeline.denoiser, tmp_path / "mixer.onnx")
    assert json.loads(read_provenance(tmp_path / "mixer.onnx")["inputs"]) == {"sample": "x", "timestep": "t"}
