"""On an NVIDIA GPU: what the CPU gives, by the same commands. Run by `make gpu`; elsewhere skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from processes import LAUNCH
from tiny import make_unet, output_of
from tiny_pipelines import captioned_folder, stable_diffusion
from tiny_transformers import MODELS, make

import diffprune_plugin as dp
from diffprune_plugin.export.cli import main as export_main
from diffprune_plugin.plugins import adapter_for
from diffprune_plugin.sensitivity.linear import measure_sensitivity

GPU = "cuda"
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
needs_provider = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu"
)
SWEEP: dict[str, Any] = {"importance": {"name": "diff_taylor", "samples": 8, "curve_samples": 2}, "timesteps": 4}
MANY = dp.Sweep(samples=256, curve_samples=2)
ROUNDING = 0.02  # of a number's size, at most: convolutions there compute in TF32


@pytest.fixture
def exported() -> Any:
    """diffprune-export in this process: its exit code."""

    def call(*words: object) -> int:
        with pytest.raises(SystemExit) as stop:
            export_main([str(word) for word in words])
        return int(stop.value.code or 0)

    return call


def removed(plan: dp.PruningPlan) -> set[tuple[str, int]]:
    return {(group.root, unit) for group in plan.groups for unit in group.removed}


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance of two tensors, wherever they are."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / max(b.norm(), 1e-12))


def output_on(model: Any, device: str) -> torch.Tensor:
    given = adapter_for(type(model)).example_inputs(model)
    with torch.no_grad():
        output: torch.Tensor = model(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in given.items()}).sample
    return output


@pytest.mark.parametrize(
    "asked",
    [
        {"pruning_ratio": 0.3},
        {"macs_target": 0.6},
        {"macs_target": 0.6, "importance": "output_error"},
        {"macs_target": 0.6, "allocation": "measured"},
        {"macs_target": 0.6, "importance": "output_error", "depth": "auto"},
        {"pruning_ratio": 0.3, "blocks_at_once": 1, "gradient_checkpointing": True},
        {"pruning_ratio": 0.3, "autocast": True},
        {"pruning_ratio": 0.3, "dtype": "bfloat16", "compensate": False},
        {"pruning_ratio": 0.3, "max_pruning_ratio": 0.4},
    ],
    ids=json.dumps,
)
def test_prune_removes_the_channels_that_it_removes_on_the_cpu(run, config_file, asked) -> None:
    given = json.loads(config_file.read_text())
    plans, outputs = [], []
    for name, device in (("here", "cpu"), ("there", GPU)):
        given |= {"device": device, "output": str(config_file.with_name(name)), **asked}
        config_file.write_text(json.dumps(given))
        code, _, errors = run("prune", config_file)
        assert code == 0, errors
        loaded = dp.load(given["output"])
        plans.append(loaded.pruning_plan)
        outputs.append(output_of(loaded.float()))
    cpu, gpu = (removed(plan) for plan in plans)
    assert len(cpu & gpu) >= 0.9 * max(len(cpu), len(gpu)), "other channels"
    if cpu == gpu and "compensate" not in asked:
        assert far(outputs[1], outputs[0]) < 5 * ROUNDING


def test_the_sensitivity_is_the_cpus(images) -> None:
    found = []
    for device in ("cpu", GPU):
        unet, scheduler = make_unet().to(device), DDPMScheduler(num_train_timesteps=20)
        found.append(measure_sensitivity(unet, scheduler, images, samples=16, probes=2, progress=False))
    for root, values in found[0].scores.items():
        assert far(torch.tensor(found[1].scores[root]), torch.tensor(values)) < 5 * ROUNDING, root


@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_loses_the_same_there(name) -> None:
    outputs = []
    for device in ("cpu", GPU):
        model = make(name).to(device)
        dp.remove_(model, dp.make_plan(model, "magnitude", pruning_ratio=0.5))
        outputs.append(output_on(model, device))
    assert outputs[1].device.type == GPU
    assert far(outputs[1], outputs[0]) < ROUNDING


def test_a_text_to_image_pipeline_goes_the_whole_way(run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    dp.save(stable_diffusion(tmp_path), tmp_path / "dense")
    captioned_folder(tmp_path / "data", 16)
    prune = {"model": "dense", "output": "pruned", "data": "data", "device": GPU, "macs_target": 0.6, **SWEEP}
    Path("prune.json").write_text(json.dumps(prune))
    tune = {"model": "pruned", "teacher": "dense", "output": "tuned", "data": "data", "steps": 3, "batch_size": 4}
    Path("tune.json").write_text(json.dumps({**tune, "tracker": "none", "mixed_precision": "bf16"}))
    Path("prompts.txt").write_text("a bar\nanother bar\n")
    drawing = ("--prompts", "prompts.txt", "--steps", 2, "--count", 2, "--device", GPU)
    for words in (
        ("prune", "prune.json"),
        ("frontier", "prune.json"),
        ("finetune", "tune.json"),
        ("sample", "tuned", "-o", "drawn.png", *drawing),
        ("evaluate", "tuned", "--against", "dense", "-o", "evaluated", *drawing),
    ):
        code, _, errors = run(*words)
        assert code == 0, (words, errors)


@pytest.fixture
def tuning(config_file, images, tmp_path) -> Any:
    """A pruned model, and its fine-tune in a process of its own: the report."""
    pipeline = DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=100))
    dp.save(pipeline, tmp_path / "whole")
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude", pruning_ratio=0.5))
    dp.save(pipeline, tmp_path / "small")
    values = {"model": "small", "data": "images.npz", "steps": 6, "batch_size": 4, "tracker": "none", "warmup_steps": 2}
    launch = [*LAUNCH, "--num_processes", "1"]

    def call(name: str, *launcher: str, env: Any = None, **changes: Any) -> Any:
        (tmp_path / f"{name}.json").write_text(json.dumps({**values, "output": name, **changes}))
        first = [*launch, *launcher, "-m"] if launcher else [sys.executable, "-m"]
        words = [*first, "diffprune_plugin", "finetune", f"{name}.json", "--json"]
        ended = subprocess.run(
            words, cwd=tmp_path, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=200
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return json.loads(ended.stdout)

    return call


def test_a_finetune_there_has_the_losses_of_the_cpu(tuning) -> None:
    there, here = tuning("there"), tuning("here", env={"ACCELERATE_USE_CPU": "true"})
    np.testing.assert_allclose(there["curve"]["loss"], here["curve"]["loss"], rtol=ROUNDING)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16", "teacher": "whole", "feature_weight": 0.1},
        {"mixed_precision": "fp16", "gradient_checkpointing": True},
        {"lora": {"rank": 2}, "gradient_accumulation_steps": 2, "num_workers": 1},
    ],
    ids=json.dumps,
)
def test_a_finetune_in_other_precisions_and_with_an_adapter(tuning, tmp_path, changes) -> None:
    assert np.isfinite(tuning("tuned", **changes)["curve"]["loss"]).all()
    assert torch.isfinite(output_of(dp.load(tmp_path / "tuned"))).all()


@pytest.mark.parametrize("how", ["plain", "fsdp"])
def test_a_launched_finetune_is_the_same(how, tuning) -> None:
    alone = tuning("alone")
    fsdp = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP")
    launched = tuning("launched", *(("--gpu_ids", "0") if how == "plain" else fsdp))
    np.testing.assert_allclose(launched["curve"]["loss"], alone["curve"]["loss"], rtol=ROUNDING)


def test_a_batch_that_the_gpu_has_no_memory_for_is_halved(images, capsys) -> None:
    unet, scheduler = make_unet(block_out_channels=(64, 128), sample_size=64).to(GPU), DDPMScheduler()
    pixels = np.tile(images, (16, 4, 4, 1))
    torch.cuda.set_per_process_memory_fraction(0.7 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        found = dp.calibrate(unet, scheduler, pixels, MANY, batch_size=256, timesteps=5, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory at batch size 256: going on with 128" in capsys.readouterr().err
    again = dp.calibrate(unet, scheduler, pixels, MANY, batch_size=16, timesteps=5, progress=False)
    np.testing.assert_allclose(found.loss, again.loss, rtol=ROUNDING)


def test_masks_and_compiled_models() -> None:
    pytest.importorskip("nncf")
    unet, small = (make_unet().to(GPU) for _ in range(2))
    plan = dp.make_plan(small, "magnitude", pruning_ratio=0.3)
    dp.mask_(unet, plan)
    dp.remove_(small, plan)
    small.compile()
    assert far(output_on(small, GPU), output_on(unet, GPU)) < ROUNDING


@needs_provider
@pytest.mark.parametrize(
    "words",
    [
        ("--dtype", "fp32", "--torch"),
        ("--dtype", "fp16", "--torch", "--batch", "1,4"),
        ("--dtype", "fp16", "--fuse"),
        ("--dtype", "fp16", "--nhwc"),
        ("--dtype", "fp16", "--cuda-graph", "--nhwc"),
        ("--dtype", "fp32", "--cuda-graph"),
        ("--dtype", "fp16", "--tune"),
        ("--dtype", "fp16", "--dynamic", "batch,height,width"),
    ],
    ids=" ".join,
)
def test_an_export_is_proved_verified_and_timed(exported, tuning, tmp_path, words) -> None:
    models = ("--model", tmp_path / "small", "--baseline", tmp_path / "whole")
    code = exported(tmp_path / "m.onnx", *models, "--provider", GPU, "--rounds", 5, *words)
    verdict = json.loads((tmp_path / "m.onnx.verdict.json").read_text())
    assert (code, verdict["passed"]) == (0, True), verdict
    placements = verdict["latency"]["placements"].values()
    assert all(proof["held"] for placement in placements for proof in placement["proofs"])


@needs_provider
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_whole_pipeline_is_exported_and_timed(exported, tmp_path, dtype) -> None:
    pipeline = stable_diffusion(tmp_path)
    dp.save(pipeline, tmp_path / "dense")
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude", pruning_ratio=0.3))
    dp.save(pipeline, tmp_path / "pruned")
    models = ("--model", tmp_path / "pruned", "--baseline", tmp_path / "dense", "--provider", GPU, "--dtype", dtype)
    assert exported(tmp_path / "onnx", *models, "--rounds", 5) == 0
