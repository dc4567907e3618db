"""What a short fine-tune recovers: the embedded model at half its MACs, compensated, then 10 % of the dense steps.

    python benchmarks/recover.py            # every row
    python benchmarks/recover.py --quick    # a tenth of the steps, fewer images

Held-out loss, SSIM to the images that the dense model draws from the same noise, and the Frechet distance of the drawn
to the held-out digits in the features of a digit classifier (not FID). Beside it a model of the same shape, trained
from scratch for as long. Each finished row is in benchmarks/results/recover.json at once; a training
that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import RUNS, Store, dense, publish
from compensate import mean, similarity
from torch import nn
from train_demo import digits, held_out_loss, to_sample

import diffprune_plugin as dp
from diffprune_plugin import demo
from diffprune_plugin.checkpoint import load_pipeline, read_plan
from diffprune_plugin.features import frechet_distance, load_features
from diffprune_plugin.finetune import finetune
from diffprune_plugin.sample import sample_images
from diffprune_plugin.workflow import prune

RATIO = 0.36  # the lowest that leaves less than half of the MACs
DENSE_STEPS = json.loads((demo.HERE / "training.json").read_text())["steps"]
COMMON = {"batch_size": 32, "timestep_sampling": "stratified", "tracker": "none", "checkpoint_every": 50}
TAUGHT = {"teacher": str(demo.MODEL), "task_weight": 0.0}
FINE = {"learning_rate": 1e-3, "ema_decay": 0.99}
RECIPES: dict[str, tuple[bool, dict[str, Any]]] = {  # whether from scratch, and the settings
    "fine-tuned": (False, FINE),
    "taught by the dense model's prediction": (False, FINE | TAUGHT),
    "taught by its prediction and features": (False, FINE | TAUGHT | {"feature_weight": 0.01}),
    "from scratch": (True, FINE),
    "from scratch, taught": (True, FINE | TAUGHT),
}
DENSE, PRUNED = "dense", "pruned and compensated"
ROWS = (DENSE, PRUNED, *RECIPES)


class Bench:
    """The directories that rows start from, and what is measured of each model."""

    def __init__(self, quick: bool) -> None:
        self.store = Store("recover-quick" if quick else "recover")
        self.steps = DENSE_STEPS // (100 if quick else 10)
        self.count, self.draw_steps = (80, 25) if quick else (192, 50)
        self.work = RUNS / ("recover-quick" if quick else "recover")
        images, held_out = digits()
        self.held_out = to_sample(held_out)
        self.features = load_features(Path(__file__).parent / "digits_classifier.onnx")
        self.real = self.features.of(torch.from_numpy(held_out).permute(0, 3, 1, 2), 64)
        self.data = self.work / "digits.npz"
        self.work.mkdir(parents=True, exist_ok=True)
        if not self.data.exists():
            np.savez(self.data, images=images)

    def measure(self, name: str, seed: int) -> dict[str, float]:
        """Loss, SSIM and the seconds of training of the model of a row."""
        if name in RECIPES:
            pipeline, seconds = self.tuned(name, seed, *RECIPES[name])
        else:
            pipeline, seconds = (dense() if name == DENSE else load_pipeline(self.pruned(seed))), 0.0
        row = {"loss": held_out_loss(pipeline.unet, dense().scheduler, self.held_out), "seconds": seconds}
        images = self.drawn(pipeline)
        distance = frechet_distance(self.real, self.features.of((images * 255).round().byte(), 64))
        return row | {"ssim": similarity(images, self.dense_images), "distance": distance}

    def drawn(self, pipeline: Any) -> torch.Tensor:
        """Images from fixed noise, float (count, 1, height, width) in [0, 1]."""
        images = sample_images(pipeline, self.count, seed=0, steps=self.draw_steps, progress=False)
        return torch.stack([torch.from_numpy(np.array(image.convert("L"))) for image in images])[:, None] / 255.0

    @functools.cached_property
    def dense_images(self) -> torch.Tensor:
        return self.drawn(dense())

    def pruned(self, seed: int) -> Path:
        """The embedded model at half its MACs, compensated."""
        output = self.work / f"pruned-{seed}"
        if not output.exists():
            values = {"model": str(demo.MODEL), "output": str(output), "data": str(demo.CALIBRATION_IMAGES)}
            prune(dp.PruningConfig.make({**values, "pruning_ratio": RATIO, "seed": seed}))
        return output

    def scratch(self, seed: int) -> Path:
        """The same shape with weights as a new model has them."""
        output = self.work / f"scratch-{seed}"
        if not output.exists():
            pipeline = load_pipeline(self.pruned(seed))
            torch.manual_seed(seed)
            for module in pipeline.unet.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm)):
                    module.reset_parameters()
            dp.save(pipeline, output)
        return output

    def tuned(self, name: str, seed: int, scratch: bool, settings: dict[str, Any]) -> tuple[Any, float]:
        """The model after a recipe, and the seconds of its training."""
        start = self.scratch(seed) if scratch else self.pruned(seed)
        output = self.work / f"{name.replace(' ', '-')}-{seed}"
        values = {"model": str(start), "output": str(output), "data": str(self.data), "seed": seed}
        report = finetune(dp.FinetuneConfig.make({**COMMON, **values, "steps": self.steps, **settings}), overwrite=True)
        return load_pipeline(output), report.seconds


def table(bench: Bench) -> list[str]:
    """Mean and standard error over seeds of every row that is there, as Markdown."""
    macs = read_plan(bench.pruned(0)).macs
    lines = [
        f"{bench.steps} steps of batch {COMMON['batch_size']} ({bench.steps / DENSE_STEPS:.0%} of the dense model's), "
        f"{macs[1] / macs[0]:.0%} of its MACs (pruning_ratio {RATIO}); "
        f"SSIM over {bench.count} images of {bench.draw_steps} DDIM steps.",
        "",
        f"| model | seeds | held-out loss | SSIM to the dense | {bench.features.frechet} | seconds of training |",
        "|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        group = [row for key, row in bench.store.values.items() if key.rpartition(" seed ")[0] == name]
        if group:
            of = {key: [row[key] for row in group] for key in group[0]}
            figures = [mean(of["loss"]), mean(of["ssim"], 3), mean(of["distance"], 1), mean(of["seconds"], 0)]
            lines.append(f"| {name} | {len(group)} | {' | '.join(figures)} |")
    return lines


def main(
    quick: Annotated[bool, typer.Option("--quick", help="a tenth of the steps, fewer images")] = False,
    seeds: int = 1,
    only: Annotated[str, typer.Option(help="measure only the rows whose name contains this")] = "",
    threads: int = 1,
) -> None:
    """Measure what is missing, then print the table of what is there."""
    torch.set_num_threads(threads)
    bench = Bench(quick)
    for seed in range(seeds):
        for name in (name for name in ROWS if only in name):
            row = bench.store.get(f"{name} seed {seed}", functools.partial(bench.measure, name, seed))
            print(name, seed, row, flush=True)
    publish(bench.store.path.stem, table(bench))


if __name__ == "__main__":
    typer.run(main)
