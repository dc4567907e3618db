"""Low-rank adapters: what a hand-written loop gives, no gradient of a weight, resumed to the bit, merged or kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from tiny import make_unet
from tiny_pipelines import PIPELINES, captioned_folder

import diffprune_plugin as dp
from diffprune_plugin.config.lora import LoraConfig
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.diffusion.batches import FINETUNE, draw
from diffprune_plugin.errors import BadInput, MissingExtra
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.directory import ADAPTER_FILE
from diffprune_plugin.recovery import training
from diffprune_plugin.recovery.finetune import finetune
from diffprune_plugin.recovery.lora import LowRank
from diffprune_plugin.utils import optional

STEPS, BATCH, RATE = 4, 4, 3e-3
LAYER = "mid_block.resnets.0.time_emb_proj"


@pytest.fixture
def values(images: np.ndarray, tmp_path: Path) -> dict[str, Any]:
    pipeline = DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=100))
    np.savez(tmp_path / "images.npz", images=images)
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude", pruning_ratio=0.5))
    dp.save(pipeline, tmp_path / "pruned")
    paths = {"model": str(tmp_path / "pruned"), "output": str(tmp_path / "tuned"), "data": str(tmp_path / "images.npz")}
    numbers = {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, "ema_decay": 0.0, "warmup_steps": 0}
    return {**paths, **numbers, "tracker": "none", "lora": {"rank": 2}}


def tune(values: dict[str, Any], **changes: Any) -> dict[str, torch.Tensor]:
    finetune(dp.FinetuneConfig.make({**values, **changes}), progress=False, overwrite=True)
    return dict(dp.load(values["output"]).state_dict())


def test_one_layer_gets_the_change_of_a_hand_written_loop_and_all_others_none(values) -> None:
    """W + alpha / rank * B A, with AdamW on A and B alone."""
    tuned = tune(values, lora={"rank": 2, "alpha": 6.0, "target_modules": [LAYER]})
    pipeline = DiffusionPipeline.from_pretrained(values["model"])
    unet, samples = pipeline.unet.requires_grad_(False), load_samples(values["data"])
    with_factors = LowRank.add_(dp.load(values["model"]), LoraConfig(rank=2, target_modules=(LAYER,)), seed=0)
    start = dict(with_factors.tuner.model.named_parameters())
    down, up = (start[f"{LAYER}.lora_{which}.default.weight"].detach().clone().requires_grad_() for which in "AB")
    assert not up.any()
    layer = unet.get_submodule(LAYER)
    layer.register_forward_hook(lambda _, given, out: out + 3.0 * given[0] @ down.T @ up.T)
    optimizer = torch.optim.AdamW([down, up], weight_decay=0.0)
    for step in range(STEPS):
        draws = [draw(samples, 0, FINETUNE, step * BATCH + i, np.arange(100)) for i in range(BATCH)]
        noise, timesteps = torch.stack([d.noise for d in draws]), torch.tensor([d.timestep for d in draws])
        noisy = pipeline.scheduler.add_noise(samples.sample(torch.tensor([d.row for d in draws])), noise, timesteps)
        optimizer.zero_grad()
        (unet(noisy, timesteps).sample - noise).square().mean().backward()
        torch.nn.utils.clip_grad_norm_([down, up], 1.0)
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.step()
    change = 3.0 * (up @ down).detach()
    assert change.abs().max() > 1e-4
    before = dp.load(values["model"]).state_dict()
    for name, tensor in tuned.items():
        expected = before[name] + change if name == f"{LAYER}.weight" else before[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)


def test_no_weight_has_a_gradient_and_every_layer_gets_a_change(values, monkeypatch) -> None:
    seen: list[training.Training] = []
    monkeypatch.setattr(training.Training, "clip", lambda self, batch: seen.append(self) or self.held())
    held: set[str] = set()

    def look(self: training.Training) -> None:
        held.update(name for name, p in self.model.named_parameters() if p.grad is not None)

    monkeypatch.setattr(training.Training, "held", look, raising=False)
    tuned, before = tune(values), dp.load(values["model"]).state_dict()
    assert held
    assert all(".lora_A." in name or ".lora_B." in name for name in held)
    changed = {name for name, tensor in tuned.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, tensor in before.items() if tensor.ndim > 1}, "convolutions and linear layers"


def test_stopped_after_a_checkpoint_it_goes_on_to_the_same_bits(values, monkeypatch) -> None:
    whole = tune(values, checkpoint_every=2)
    save = training.Training.save

    def stop(self: training.Training) -> None:
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Training, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        tune(values, checkpoint_every=2)
    monkeypatch.setattr(training.Training, "save", save)
    report = finetune(dp.FinetuneConfig.make({**values, "checkpoint_every": 2}), progress=False, overwrite=True)
    assert report.resumed == 2
    again = dp.load(values["output"]).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_kept_beside_the_weights_it_is_loaded_by_the_pipeline_and_draws_what_the_merged_one_does(tmp_path) -> None:
    make, side = PIPELINES["stable diffusion"]
    pipeline = make(tmp_path)
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude", pruning_ratio=0.5))
    dp.save(pipeline, tmp_path / "pruned")
    paths = {name: str(tmp_path / name) for name in ("pruned", "tuned", "data")}
    captioned_folder(tmp_path / "data", side)
    values = {"model": paths["pruned"], "output": paths["tuned"], "data": paths["data"], "steps": 2, "batch_size": 2}
    values |= {"learning_rate": 0.05, "tracker": "none", "warmup_steps": 0}
    adapter = {"rank": 2, "alpha": 4.0}  # not the rank, so that a lost alpha shows
    tune(values, lora=adapter)
    merged = noise_of(DiffusionPipeline.from_pretrained(paths["tuned"]).unet)
    kept = tune(values, lora={**adapter, "merge": False})
    before = dp.load(paths["pruned"]).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items())
    loaded = DiffusionPipeline.from_pretrained(paths["tuned"])
    plain = noise_of(loaded.unet)
    loaded.load_lora_weights(paths["tuned"])
    torch.testing.assert_close(noise_of(loaded.unet), merged, rtol=1e-4, atol=1e-5)
    assert (plain - merged).abs().max() > 1e-3
    assert (tmp_path / "tuned" / ADAPTER_FILE).is_file()
    assert "`pipeline.load_lora_weights`" in (tmp_path / "tuned" / "README.md").read_text()


@torch.no_grad()
def noise_of(unet: Any) -> torch.Tensor:
    inputs = find_adapter(unet).example_inputs(unet, batch=2)
    return unet(**inputs).sample


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rnak": 4}, "lora: unknown key 'rnak'; did you mean 'rank'"),
        ({"rank": 0}, "rank: 0 is outside"),
        ({"target_modules": ["conv_inn"]}, "lora.target_modules: 'conv_inn' matches no layer; did you mean 'conv_in'"),
        ({"target_modules": ["conv_norm_out"]}, "matches no linear layer or convolution"),
        ({"merge": False}, "lora.merge: false: DDPMPipeline loads no adapter of a unet"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(values, lora, words, tmp_path) -> None:
    with pytest.raises(BadInput) as error:
        tune(values, lora=lora)
    assert words in str(error.value)
    assert not (tmp_path / "tuned").exists()


def test_without_peft_it_says_what_to_install(values, monkeypatch) -> None:
    monkeypatch.setattr(optional, "has", lambda package: package != "peft")
    with pytest.raises(MissingExtra, match=r"peft is not installed; run: pip install 'diffprune-plugin\[train\]'"):
        tune(values)
