"""The embedded model in the benchmarks: what is calibrated, removed and trained of it, and how the result is measured.

Directories are kept under runs/, by what they depend on, so that no benchmark makes again what another has made.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from making.train_demo import digits
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

import diffprune_plugin as dp
from diffprune_plugin import demo
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.loss import noise_prediction_loss
from diffprune_plugin.evaluation.features import Features, frechet_distance, load_features
from diffprune_plugin.evaluation.sampling import sample_images
from diffprune_plugin.evaluation.settings import SamplingSettings
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.pruning.loading import load_pipeline
from diffprune_plugin.recovery.finetune import finetune
from diffprune_plugin.sensitivity.linear import measure_sensitivity
from diffprune_plugin.sensitivity.sensitivity import Sensitivity
from diffprune_plugin.utils.files import new_file
from shared.results import RUNS

Row = dict[str, float]
TRAINING: dict[str, Any] = json.loads((demo.HERE / "training.json").read_text())
MODEL = str(TRAINING["sha256"])  # results of another model are never mixed in
DENSE_STEPS = int(TRAINING["steps"])
HALF = 0.36  # the lowest pruning_ratio that leaves less than half of the MACs
CLASSIFIER = Path(__file__).parents[1] / "making" / "digits_classifier.onnx"
WORK = RUNS / MODEL[:12]


@dataclass(frozen=True)
class Look:
    """How a model is measured: held-out images of the loss and noises for each; images drawn, their DDIM steps."""

    held_out: int = 500
    repeats: int = 4
    count: int = 192
    steps: int = 50


@cache
def dense() -> Any:
    """The embedded pipeline."""
    return load_pipeline(demo.MODEL)


@cache
def held_out() -> Samples:
    """500 digits that the model was not trained on."""
    return load_samples(demo.HELD_OUT_IMAGES)


@torch.no_grad()
def held_out_loss(unet: nn.Module, repeats: int = 4, count: int = 500) -> float:
    """Noise-prediction loss on ``count`` held-out images, ``repeats`` timesteps and noises each, always the same."""
    losses = []
    for repeat in range(repeats):
        generator = torch.Generator().manual_seed(repeat)
        timesteps = torch.randperm(1000, generator=generator)[:count]
        for rows in torch.arange(count).split(100):
            sample = held_out().sample(rows)
            noise = torch.randn(sample.shape, generator=generator)
            losses.append(noise_prediction_loss(unet, dense().scheduler, sample, noise, timesteps[rows], {}))
    return float(torch.cat(losses).mean())


def measure(pipeline: Any, look: Look) -> Row:
    """Held-out loss, SSIM to the dense model's images from the same noise, Frechet distance to the held-out digits."""
    images = drawn(pipeline, look)
    distance = frechet_distance(real_features(), classifier().of((images * 255).round().byte(), 64))
    ssim = similarity(images, dense_images(look))
    return {"loss": held_out_loss(pipeline.unet, look.repeats, look.held_out), "ssim": ssim, "distance": distance}


def measure_dense(look: Look) -> Row:
    return measure(dense(), look)


def drawn(pipeline: Any, look: Look) -> Tensor:
    """Images from fixed noise, float (count, 1, height, width) in [0, 1]."""
    images = sample_images(
        pipeline, SamplingSettings(count=look.count, seed=0, steps=look.steps, batch_size=32), progress=False
    )
    return torch.stack([torch.from_numpy(np.array(image.convert("L"))) for image in images])[:, None] / 255.0


@cache
def dense_images(look: Look) -> Tensor:
    return drawn(dense(), look)


def similarity(images: Tensor, reference: Tensor) -> float:
    """Mean SSIM of pairs of images."""
    return torch.as_tensor(structural_similarity_index_measure(images, reference, data_range=1.0)).item()


@cache
def classifier() -> Features:
    return load_features(CLASSIFIER)


@cache
def real_features() -> Tensor:
    return classifier().of(held_out().values.permute(0, 3, 1, 2), 64)


def calibration(seed: int, batch_size: int = 32, timesteps: int | None = None, **options: Any) -> Calibration:
    """A calibration of the embedded model with these options of the sweep; it is timed, so it is made in one piece."""
    directory = calibration_directory(seed, batch_size=batch_size, timesteps=timesteps, **options)
    if not directory.exists():
        settings = {"batch_size": batch_size, "timesteps": timesteps, "seed": seed, "progress": False}
        start, sweep, pipeline = time.perf_counter(), Sweep(**options), dense()
        images = demo.CALIBRATION_IMAGES
        result = dp.calibrate(pipeline.unet, pipeline.scheduler, images, sweep, **settings)
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.with_suffix(".seconds").write_text(f"{time.perf_counter() - start:.1f}")
        result.save(directory)
    return Calibration.load(directory)


@cache
def sensitivity(seed: int, samples: int) -> Sensitivity:
    """The linear sensitivity of the embedded model's channels."""
    options: dict[str, Any] = {"samples": samples, "seed": seed, "progress": False}
    return measure_sensitivity(dense().unet, dense().scheduler, demo.CALIBRATION_IMAGES, **options)


def calibration_directory(seed: int, **options: Any) -> Path:
    name = "-".join(f"{key}={value}" for key, value in sorted(options.items()) if value is not None)
    return WORK / "calibrations" / f"{name}-seed={seed}".replace(".", "_")


def calibrated(seed: int, options: dict[str, Any]) -> Row:
    """Make a calibration if it is not there: samples each way and the wall seconds that it took."""
    result = calibration(seed, **options)
    directory = calibration_directory(seed, **{"batch_size": 32, **options})
    seconds = float(directory.with_suffix(".seconds").read_text())
    return {"forward": result.forward, "backward": result.backward, "seconds": seconds}


def agreement(first: PruningPlan, second: PruningPlan) -> float:
    """Share of the removed channels that two plans have in common."""
    pairs = [(set(a.removed), set(b.removed)) for a, b in zip(first.groups, second.groups, strict=True)]
    return sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def pruned(name: str, plan: PruningPlan) -> Path:
    """Directory of the embedded model after a plan, with nothing repaired."""
    output = WORK / "models" / name
    if not output.exists():
        pipeline = copy.deepcopy(dense())
        dp.remove_(pipeline.unet, plan)
        dp.save(pipeline, output)
    return output


def from_scratch(name: str, shape: Path, seed: int) -> Path:
    """Directory of a model of the same shape with weights as a new model has them."""
    output = WORK / "models" / name
    if not output.exists():
        pipeline = load_pipeline(shape)
        torch.manual_seed(seed)
        for module in pipeline.unet.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm)):
                module.reset_parameters()
        dp.save(pipeline, output)
    return output


def tuned(name: str, start: Path, seed: int, **settings: Any) -> Path:
    """Directory of the model that starts from ``start`` after a fine-tune with these settings, on the training digits.

    An interrupted training goes on from its last checkpoint.
    """
    output = WORK / "models" / name
    if not output.exists():
        common = {"timestep_sampling": "stratified", "tracker": "none", "checkpoint_every": 100, "seed": seed}
        values = {"model": str(start), "output": str(output), "data": str(training_images()), **common, **settings}
        finetune(dp.FinetuneConfig.make(values), progress=False)
    return output


def training_images() -> Path:
    """The digits that the dense model was trained on, as an .npz."""
    file = WORK / "digits.npz"
    if not file.exists():
        with new_file(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, images=digits()[0])
    return file
