"""Everything on a device that is not the CPU: a stand-in for a GPU, which refuses what a GPU refuses (elsewhere.py).

That tensors are where they have to be, no CPU shows; what a real GPU computes is asserted in test_gpu.py.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from elsewhere import There, a_gpu
from tiny import FAST, SMALL, make_unet, output_of
from tiny_pipelines import captioned_folder, stable_diffusion
from tiny_transformers import make

import diffprune_plugin as dp
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.batches import Batch
from diffprune_plugin.plugins import adapter_for

GPU = "cuda"


@pytest.fixture
def gpu() -> Iterator[None]:
    AcceleratorState._reset_state(True)  # of a process there is one
    with a_gpu():
        yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("mixed", "refused"),
    [
        (lambda here, there: here + there, "same device"),
        (lambda here, there: there.copy_(here).add_(here), "same device"),
        (lambda here, there: here[there.long()], "same device"),
        (lambda here, there: there.numpy(), "numpy"),
        (lambda here, there: torch.randn(2, device=GPU, generator=torch.Generator()), "generator"),
        (lambda here, there: torch.nn.Linear(3, 1)(there), "same device"),
    ],
)
def test_what_a_gpu_refuses_is_refused(gpu, mixed, refused) -> None:
    with pytest.raises((RuntimeError, TypeError), match=refused):
        mixed(torch.ones(3), torch.ones(3, device=GPU))


def test_what_a_gpu_takes_is_computed_there(gpu) -> None:
    here = torch.arange(6.0).reshape(2, 3)
    there = here.to(GPU)
    assert (type(there), there.device.type, there.to(GPU)) == (There, GPU, there)
    assert (there @ there.T + 1).cpu().tolist() == (here @ here.T + 1).tolist()
    assert there[[1], torch.tensor([2])].item() == 5
    there[:, 0] = 7
    assert there.tolist() == [[7, 1, 2], [7, 4, 5]]
    layer = torch.nn.Linear(3, 1).to(GPU)
    layer(there).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[14, 5, 7]]
    assert torch.empty(2, device="meta").is_meta


def test_samples_given_there_are_those_of_the_cpu(gpu) -> None:
    here = Samples(torch.ones(2, 4, 8, 8), {"label": torch.tensor([1, 2])}, {"label": torch.tensor([0])})
    there = Samples(here.values.to(GPU), {"label": here.extra["label"].to(GPU)}, {"label": here.null["label"].to(GPU)})
    assert load_samples(here) is here
    assert load_samples(there).sha256 == here.sha256


def test_prune_gives_there_what_it_gives_on_the_cpu(run, config_file) -> None:
    given: dict[str, Any] = json.loads(config_file.read_text())
    given |= {"macs_target": 0.6, "sensitivity_samples": 4, "sensitivity_probes": 2}
    models = []
    for device, place in (("cpu", contextlib.nullcontext), (GPU, a_gpu)):
        config_file.write_text(json.dumps({**given, "device": device, "output": str(config_file.with_name(device))}))
        with place():
            code, _, errors = run("prune", config_file)
        assert code == 0, errors
        models.append(dp.load(config_file.with_name(device)))
    here, there = models
    assert here.pruning_plan.removed_units() == there.pruning_plan.removed_units()
    torch.testing.assert_close(output_of(there), output_of(here), rtol=1e-3, atol=1e-4)


def test_what_stays_on_the_cpu_by_a_mistake_is_noticed(gpu, images, monkeypatch) -> None:
    whole = Batch.to
    monkeypatch.setattr(Batch, "to", lambda self, like: replace(whole(self, like), noise=self.noise))
    with pytest.raises(RuntimeError, match=re.escape("same device, but found cuda:0 and cpu")):
        dp.calibrate(make_unet().to(GPU), DDPMScheduler(num_train_timesteps=100), images, SMALL, **FAST)


def test_a_text_to_image_model_is_trained_and_drawn_from_there(gpu, run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = stable_diffusion(tmp_path)
    dp.save(pipeline, "dense")
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude", pruning_ratio=0.5))
    dp.save(pipeline, "pruned")
    tune = {
        "model": "pruned",
        "teacher": "dense",
        "output": "tuned",
        "data": str(captioned_folder(tmp_path / "data", 16)),
    }
    Path("tune.json").write_text(json.dumps({**tune, "steps": 2, "batch_size": 2, "tracker": "none"}))
    Path("prompts.txt").write_text("a bar\nanother bar\n")
    drawing = ("--prompts", "prompts.txt", "--steps", 2, "--count", 2, "--device", GPU)
    for words in (("finetune", "tune.json"), ("evaluate", "tuned", "--against", "dense", "-o", "evaluated", *drawing)):
        code, output, errors = run(*words)
        assert code == 0, errors
        assert (
            "on 1 processes (cuda)" if words[0] == "finetune" else "From the same noise: SSIM 0."
        ) in output + errors


@pytest.mark.parametrize("name", ["DiT", "SD 3.5", "Flux"])
def test_a_transformer_loses_there_what_it_loses_on_the_cpu(gpu, name) -> None:
    outputs = []
    for device in ("cpu", GPU):
        model = make(name).to(device)
        dp.remove_(model, dp.make_plan(model, "magnitude", pruning_ratio=0.5))
        given = adapter_for(type(model)).example_inputs(model)
        with torch.no_grad():
            outputs.append(model(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in given.items()}).sample)
    assert outputs[1].device.type == GPU
    torch.testing.assert_close(outputs[1].cpu(), outputs[0], rtol=1e-5, atol=1e-5)
