"""What the benchmarks calibrate, remove and train of a model, and how the result is measured; the embedded one unless
another is given.

Directories are kept under runs/, by what they depend on, so that no benchmark makes again what another has made.
"""

from __future__ import annotations

import copy
import time
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from onnxruntime import InferenceSession
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure

import diffprune_plugin as dp
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.diffusion.loss import noise_prediction_loss
from diffprune_plugin.evaluation.features import Features, frechet_distance, load_features
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.plugins import denoiser_of, find_adapter
from diffprune_plugin.pruning.loading import load_pipeline, model_of
from diffprune_plugin.recovery.finetune import finetune
from diffprune_plugin.sensitivity.linear import measure_sensitivity
from diffprune_plugin.sensitivity.sensitivity import Sensitivity
from diffprune_plugin.utils.hashes import json_hash
from shared.subject import DIGITS, Look, Subject, samples_of

Row = dict[str, float]
MODEL = str(DIGITS.training["sha256"])  # results of another model are never mixed in
DENSE_STEPS = DIGITS.steps
HALF = 0.36  # the lowest pruning_ratio that leaves less than half of the MACs
WORK = DIGITS.work
REGIONS = (0, 250, 500, 750)  # where parts of the timesteps begin: the losses of each are measured too


@cache
def dense(of: Subject = DIGITS) -> Any:
    """The pipeline."""
    return load_pipeline(of.model)


def held_out_loss(unet: nn.Module, repeats: int = 4, count: int = 500) -> float:
    """Noise-prediction loss of the embedded model's shape on ``count`` held-out images; see `losses`."""
    return float(losses(unet, repeats, count)[0].mean())


@torch.no_grad()
def losses(unet: nn.Module, repeats: int, count: int, of: Subject = DIGITS) -> tuple[Tensor, Tensor]:
    """Losses of the predictions for ``count`` held-out images with ``repeats`` timesteps and noises each, always the
    same; timesteps."""
    found, times, adapter = [], [], find_adapter(unet)
    for repeat in range(repeats):
        generator = torch.Generator().manual_seed(repeat)
        timesteps = torch.randperm(1000, generator=generator)[:count]
        for rows in torch.arange(count).split(100):
            samples = samples_of(of.held_out)
            sample, extra = samples.sample(rows), samples.inputs(rows)
            noise = torch.randn(sample.shape, generator=generator)
            scheduler, part = dense(of).scheduler, timesteps[rows]
            found.append(noise_prediction_loss(unet, scheduler, sample, noise, part, extra, adapter))
            times.append(timesteps[rows])
    return torch.cat(found), torch.cat(times)


def measure(pipeline: Any, look: Look, of: Subject = DIGITS) -> Row:
    """Held-out loss, also by region of the timesteps, SSIM to the dense model's images from the same noise, Frechet
    distance to real images: the mean over noises."""
    found, timesteps = losses(denoiser_of(pipeline)[1], look.repeats, look.held_out, of)
    ends = (*REGIONS[1:], 1000)
    inside = [(timesteps >= first) & (timesteps < end) for first, end in zip(REGIONS, ends, strict=True)]
    regions = {f"loss {first}": float(found[rows].mean()) for first, rows in zip(REGIONS, inside, strict=True)}
    ssims, distances = [], []
    for noise in range(look.noises):
        images = drawn(pipeline, look, of, noise)
        ssims.append(similarity(images, dense_images(look, of, noise)))
        distances.append(distance(images, of))
    return {"loss": float(found.mean()), **regions, "ssim": fmean(ssims), "distance": fmean(distances)}


def measure_dense(look: Look, of: Subject = DIGITS) -> Row:
    return measure(dense(of), look, of)


def drawn(pipeline: Any, look: Look, of: Subject = DIGITS, noise: int = 0) -> Tensor:
    """Images from the noise of a seed, float (count, channels, height, width) in [0, 1]."""
    return of.images(pipeline, look, noise)


@cache
def dense_images(look: Look, of: Subject = DIGITS, noise: int = 0) -> Tensor:
    return drawn(dense(of), look, of, noise)


def distance(images: Tensor, of: Subject = DIGITS) -> float:
    """Frechet distance of images to real ones, in the features of a classifier."""
    return frechet_distance(real_features(of), classifier(of).of(as_real(images, of), 64))


def recognised(images: Tensor, of: Subject) -> float:
    """Share of the images that the classifier takes for what was asked: of the model's classes one after another."""
    session = InferenceSession(of.features, providers=["CPUExecutionProvider"])
    [logits] = session.run(["logits"], {"image": as_real(images, of).float().numpy() / 255})
    return float((logits.argmax(1) == np.arange(len(images)) % of.classes).mean())


def as_real(images: Tensor, of: Subject) -> Tensor:
    """uint8, as large as the real images: averaged where they are larger."""
    return (functional.adaptive_avg_pool2d(images, of.real().shape[-2:]) * 255).round().byte()


def similarity(images: Tensor, reference: Tensor) -> float:
    """Mean SSIM of pairs of images."""
    return float(similarities(images, reference).mean())


def similarities(images: Tensor, reference: Tensor) -> Tensor:
    """SSIM of pairs of images, shape (count,)."""
    found = structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")
    return torch.as_tensor(found)


@cache
def classifier(of: Subject = DIGITS) -> Features:
    return load_features(of.features)


@cache
def real_features(of: Subject = DIGITS) -> Tensor:
    return classifier(of).of(of.real(), 64)


def calibration(
    seed: int, batch_size: int = 32, timesteps: int | None = None, of: Subject = DIGITS, **options: Any
) -> Calibration:
    """A calibration with these options of the sweep; it is timed, so it is made in one piece."""
    directory = calibration_directory(seed, of, batch_size=batch_size, timesteps=timesteps, **options)
    if not directory.exists():
        settings = {"batch_size": batch_size, "timesteps": timesteps, "seed": seed, "progress": False}
        start, sweep, pipeline = time.perf_counter(), Sweep(**options), dense(of)
        result = dp.calibrate(pipeline.unet, pipeline.scheduler, of.calibration, sweep, **settings)
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.with_suffix(".seconds").write_text(f"{time.perf_counter() - start:.1f}")
        result.save(directory)
    return Calibration.load(directory)


@cache
def sensitivity(seed: int, samples: int, of: Subject = DIGITS) -> Sensitivity:
    """The linear sensitivity of the channels."""
    options: dict[str, Any] = {"samples": samples, "seed": seed, "progress": False}
    return measure_sensitivity(model_of(dense(of)), dense(of).scheduler, of.calibration, **options)


def calibration_directory(seed: int, of: Subject = DIGITS, **options: Any) -> Path:
    name = "-".join(f"{key}={value}" for key, value in sorted(options.items()) if value is not None)
    return of.work / "calibrations" / f"{name}-seed={seed}".replace(".", "_")


def calibrated(seed: int, options: dict[str, Any], of: Subject = DIGITS) -> Row:
    """Make a calibration if it is not there: samples each way and the wall seconds that it took."""
    result = calibration(seed, of=of, **options)
    directory = calibration_directory(seed, of, **{"batch_size": 32, **options})
    seconds = float(directory.with_suffix(".seconds").read_text())
    return {"forward": result.forward, "backward": result.backward, "seconds": seconds}


def agreement(first: PruningPlan, second: PruningPlan) -> float:
    """Share of the removed channels that two plans have in common."""
    pairs = [(set(a.removed), set(b.removed)) for a, b in zip(first.groups, second.groups, strict=True)]
    return sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def pruned(name: str, plan: PruningPlan, of: Subject = DIGITS) -> Path:
    """Directory of the model after a plan, with nothing repaired."""
    output = of.work / "models" / name
    if not output.exists():
        pipeline = copy.deepcopy(dense(of))
        dp.remove_(pipeline.unet, plan)
        dp.save(pipeline, output)
    return output


def from_scratch(name: str, shape: Path, seed: int, of: Subject = DIGITS) -> Path:
    """Directory of a model of the same shape with weights as a new model has them."""
    output = of.work / "models" / name
    if not output.exists():
        pipeline = load_pipeline(shape)
        torch.manual_seed(seed)
        for module in pipeline.unet.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm)):
                module.reset_parameters()
        dp.save(pipeline, output)
    return output


def tuned(name: str, start: Path, seed: int, of: Subject = DIGITS, **settings: Any) -> Path:
    """Directory of the model that starts from ``start`` after a fine-tune with these settings, on the training images.

    Another recipe gets another directory; an interrupted training goes on from its last checkpoint.
    """
    output = of.work / "models" / f"{name}-{json_hash(settings)[:8]}"
    if not output.exists():
        common = {"timestep_sampling": "stratified", "tracker": "none", "checkpoint_every": 100, "seed": seed}
        values = {"model": str(start), "output": str(output), "data": str(of.train()), **common, **settings}
        finetune(dp.FinetuneConfig.make(values), progress=False)
    return output
