"""What the benchmarks share: the embedded model, its held-out loss, and results that survive an interruption."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffprune_plugin as dp
from diffprune_plugin import demo
from diffprune_plugin.calibration import Calibration
from diffprune_plugin.checkpoint import load_pipeline
from diffprune_plugin.data import Samples, load_samples
from diffprune_plugin.objective import noise_prediction_loss
from diffprune_plugin.plan import PruningPlan

RESULTS = Path(__file__).parent / "results"
RUNS = Path(__file__).parent.parent / "runs"


class Store:
    """Results by key in one JSON file; what is there is not computed again."""

    def __init__(self, name: str, fresh: bool = False) -> None:
        RESULTS.mkdir(exist_ok=True)
        self.path = RESULTS / f"{name}.json"
        self.values: dict[str, Any] = {}
        if self.path.exists() and not fresh:
            self.values = json.loads(self.path.read_text())
        if self.values.get("model") != model_facts():
            self.values = {"model": model_facts()}

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The stored value, or the computed one, stored at once."""
        if key not in self.values:
            self.values[key] = compute()
            self.path.write_text(json.dumps(self.values, indent=1) + "\n")
        return self.values[key]


def model_facts() -> str:
    """The hash of the embedded weights: results of another model are never mixed in."""
    return str(json.loads((demo.HERE / "training.json").read_text())["sha256"])


@cache
def dense() -> Any:
    """The embedded pipeline."""
    return load_pipeline(demo.MODEL)


@cache
def held_out() -> Samples:
    return load_samples(demo.HELD_OUT_IMAGES)


@torch.no_grad()
def held_out_loss(unet: torch.nn.Module) -> float:
    """Noise-prediction loss on the 500 held-out images, 4 timesteps and noises each, the same at every call."""
    losses = []
    for repeat in range(4):
        generator = torch.Generator().manual_seed(repeat)
        for rows in torch.split(torch.arange(len(held_out())), 100):
            sample = held_out().sample(rows)
            noise = torch.randn(sample.shape, generator=generator)
            timesteps = torch.randint(0, 1000, (len(rows),), generator=generator)
            losses.append(noise_prediction_loss(unet, dense().scheduler, sample, noise, timesteps, {}))
    return float(torch.cat(losses).mean())


def calibration(seed: int, batch_size: int = 32, **options: Any) -> Calibration:
    """A calibration of the embedded model with these options of diff_taylor, kept under runs/."""
    directory = calibration_directory(seed, batch_size, options)
    if not directory.exists():
        sweep = dp.importance("diff_taylor", **options).sweep
        settings = {"batch_size": batch_size, "seed": seed, "checkpoint": directory.with_suffix(".progress")}
        pipeline, start = dense(), time.perf_counter()
        result = dp.calibrate(pipeline.unet, pipeline.scheduler, demo.CALIBRATION_IMAGES, sweep, **settings)
        result.save(directory)
        directory.with_suffix(".seconds").write_text(f"{time.perf_counter() - start:.1f}")
    return Calibration.load(directory)


def seconds_of(seed: int, batch_size: int = 32, **options: Any) -> float:
    """Wall time that a calibration took when it was made."""
    calibration(seed, batch_size, **options)
    return float(calibration_directory(seed, batch_size, options).with_suffix(".seconds").read_text())


def calibration_directory(seed: int, batch_size: int, options: dict[str, Any]) -> Path:
    name = "-".join(f"{key}={value}" for key, value in sorted(options.items())).replace(".", "_")
    return RUNS / "calibrations" / model_facts()[:12] / f"{name}-batch={batch_size}-seed={seed}"


def agreement(first: PruningPlan, second: PruningPlan) -> float:
    """Share of the removed channels that two plans have in common."""
    pairs = [(set(a.removed), set(b.removed)) for a, b in zip(first.groups, second.groups, strict=True)]
    return sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def publish(name: str, lines: Sequence[str]) -> None:
    """Print a Markdown table and keep it beside the results."""
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
