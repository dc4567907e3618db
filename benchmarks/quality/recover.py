"""What a short fine-tune recovers: the embedded model at half its MACs, compensated, then 10 % of the dense steps.

    python benchmarks/bench.py recover            # a quarter of an hour on two cores
    python benchmarks/bench.py recover --quick    # one seed, 30 steps, fewer images

The fine-tune learns from the dense model's predictions, the way this project recommends. Beside it a model of the same
shape, trained from scratch on the images for as long. Held-out loss, SSIM to the images that the dense model draws from
the same noise, and the Frechet distance of the drawn to the held-out digits in the features of a digit classifier (not
FID). Results are kept in benchmarks/results/recover.json; a training that was interrupted goes on from its last
checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from shared.embedded import (
    DENSE_STEPS,
    HALF,
    MODEL,
    WORK,
    Row,
    classifier,
    dense,
    from_scratch,
    measure,
    measure_dense,
    tuned,
)
from shared.results import RESULTS, Seeds, Store, Workers, mean, over, publish, table
from shared.subject import Look

import diffprune_plugin as dp
from diffprune_plugin import demo
from diffprune_plugin.evaluation.sampling import sample_images
from diffprune_plugin.evaluation.settings import SamplingSettings
from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.pruning.loading import load_pipeline
from diffprune_plugin.utils.images import image_grid, save_image
from diffprune_plugin.workflow import prune

FINE: dict[str, Any] = {"learning_rate": 1e-3, "ema_decay": 0.99}
DENSE, PRUNED, TAUGHT, SCRATCH = "dense", "pruned and compensated", "fine-tuned", "same shape from scratch, as long"
RECIPES = {TAUGHT: FINE | {"teacher": str(demo.MODEL), "task_weight": 0.0}, SCRATCH: FINE}

LONG = Look(count=128, steps=25)


@dataclass(frozen=True)
class Scale:
    """Steps of the training, images in each; how it is measured; gradient samples of the calibration and those of its
    loss curve."""

    steps: int = DENSE_STEPS // 10
    batch_size: int = 16
    look: Look = LONG
    samples: int = 1024
    curve_samples: int = 16


FULL, QUICK = Scale(), Scale(DENSE_STEPS // 300, 16, Look(held_out=100, repeats=1, count=66, steps=5), 64, 1)


def compensated(seed: int, scale: Scale) -> Path:
    """The embedded model at half its MACs, at full scale with the defaults of `diffprune prune`."""
    output = WORK / "models" / f"compensated-{HALF}-{seed}-{scale.samples}"
    if not output.exists():
        values: dict[str, Any] = {"model": str(demo.MODEL), "output": str(output)}
        values |= {"data": str(demo.CALIBRATION_IMAGES)}
        sizes = {"samples": scale.samples, "curve_samples": scale.curve_samples}
        values |= {"importance": {"name": "diff_taylor", **sizes}}
        prune(dp.PruningConfig.make({**values, "pruning_ratio": HALF, "seed": seed}), progress=False)
    return output


def model(name: str, seed: int, scale: Scale) -> Path:
    """Directory of the model of a row."""
    if name == PRUNED:
        return compensated(seed, scale)
    scratch, start = name == SCRATCH, compensated(0 if name == SCRATCH else seed, scale)
    start = from_scratch(f"scratch-{HALF}-{seed}", start, seed) if scratch else start
    place = f"recover-{'scratch' if scratch else 'taught'}-{seed}-{scale.steps}-of-{scale.batch_size}"
    return tuned(place, start, seed, steps=scale.steps, batch_size=scale.batch_size, **RECIPES[name])


def measured(name: str, seed: int, scale: Scale) -> Row:
    return measure(load_pipeline(model(name, seed, scale)), scale.look)


def lines(store: Store, seeds: int, scale: Scale) -> list[str]:
    """The table as Markdown."""
    macs, steps, look = read_plan(compensated(0, scale)).macs, scale.steps, scale.look
    head = ["model", "held-out loss", "SSIM to the dense images", classifier().frechet, "of the dense"]
    rows = []
    for name in (DENSE, PRUNED, TAUGHT, SCRATCH):
        keys = [DENSE] if name == DENSE else [f"{name} {seed}" for seed in range(seeds)]
        of = {key: [store.values[k][key] for k in keys] for key in ("loss", "ssim", "distance")}
        share = float(np.mean(of["distance"])) / store.values[DENSE]["distance"]
        rows.append([name, mean(of["loss"]), mean(of["ssim"], 3), mean(of["distance"], 1), f"{share:.2f}x"])
    return [
        f"{over(seeds)}. {steps} steps of batch {scale.batch_size} "
        f"({steps / DENSE_STEPS:.1%} of the dense model's steps, which had batches of 32), {macs[1] / macs[0]:.0%} of "
        f"its MACs (pruning_ratio {HALF}); SSIM and distance over {look.count} images of {look.steps} DDIM steps.",
        "",
        *table(head, rows),
    ]


def picture(scale: Scale, path: Path) -> None:
    """Digits of the first seed from the same noise, a row a model."""
    pipelines = {DENSE: dense()} | {name: load_pipeline(model(name, 0, scale)) for name in (PRUNED, TAUGHT, SCRATCH)}
    settings = SamplingSettings(count=12, seed=1, steps=scale.look.steps)
    rows = {name: sample_images(each, settings, progress=False) for name, each in pipelines.items()}
    save_image(image_grid(rows), path)


def recover(title: str, seeds: int, scale: Scale, workers: int) -> None:
    """Measure what is missing, then print the table and draw the picture; all is kept under this title."""
    store = Store(title, [MODEL, RECIPES, HALF, str(scale)])
    store.fill(
        {DENSE: partial(measure_dense, scale.look)}
        | {f"{PRUNED} {s}": partial(measured, PRUNED, s, scale) for s in range(seeds)},
        workers,
    )
    store.fill({f"{n} {s}": partial(measured, n, s, scale) for n in RECIPES for s in range(seeds)}, workers)
    picture(scale, RESULTS / f"{title}.png")
    publish(title, lines(store, seeds, scale))


def main(
    quick: Annotated[bool, typer.Option("--quick", help="one seed, 30 steps, fewer images")] = False,
    seeds: Seeds = 2,
    workers: Workers = 2,
) -> None:
    """Measure what is missing, then print the table."""
    if quick:
        recover("recover_quick", 1, QUICK, workers)
    else:
        recover("recover", seeds, FULL, workers)
