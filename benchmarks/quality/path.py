"""Where on the way from noise to picture a pruned model loses it: step by step, the digits' model.

    python benchmarks/bench.py path                                   # models of one seed, three of them trained first
    python benchmarks/bench.py path --ways "uniform;linear output_error"      # minutes: nothing trained

Each DDIM step of the dense model's own path is once taken by the pruned model, all others by the dense one: how far its
prediction is from the dense one's there, and what that step alone does to the picture. Beside it the same distance of
the predictions on held-out images with noise, which is what a loss sees. Results are kept in benchmarks/results;
interrupted, it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DDIMScheduler
from shared.embedded import MODEL, dense
from shared.results import RESULTS, Seeds, Store, Workers, mean, over, publish, some_of, table
from shared.subject import DIGITS, samples_of
from torch import Tensor, nn

from diffprune_plugin.pruning.loading import load_pipeline
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.optional import need_pyplot
from quality import finetuned
from quality.allocation import made
from quality.recover import FULL

IMAGES, STEPS = 32, 25
FIRSTS = (800, 600, 400, 200, 0)  # the first timesteps of the table's rows
PICTURE = 0.06  # gamma of min-SNR weights that fall with noise about as what a prediction does to the picture
WAYS: dict[str, tuple[str, float | None]] = {  # of `finetuned`, and gamma of the fine-tune if there is one
    "uniform": ("uniform", None),
    "linear output_error": ("linear output_error", None),
    "uniform, fine-tuned": ("uniform", finetuned.SNR_GAMMA),
    "linear output_error, fine-tuned": ("linear output_error", finetuned.SNR_GAMMA),
    "linear output_error to half, fine-tuned by the picture": ("linear output_error to half", PICTURE),
}
COLOURS = {"uniform": "C0", "linear output_error": "C1", "linear output_error to half": "C2"}
SCALE = replace(FULL, batch_size=32, look=finetuned.LOOK)
Run = dict[str, list[float]]


def place(way: str, seed: int) -> Path:
    """Directory of the model: compensated, or after the fine-tune of `finetuned`."""
    name, gamma = WAYS[way]
    return made(name, finetuned.BUDGET, seed) if gamma is None else finetuned.trained(name, seed, SCALE, gamma)


def walk(unet: nn.Module, scheduler: Any, sample: Tensor, timesteps: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each step its prediction and the sample after it."""
    for timestep in timesteps:
        predicted = unet(sample, timestep).sample
        sample = scheduler.step(predicted, timestep, sample).prev_sample
        yield predicted, sample


@torch.no_grad()
def measured(way: str, seed: int) -> Run:
    """By step the mean squared difference: of the predictions on the dense model's path and on noisy images, and of the
    pictures."""
    whole, small = dense().unet, load_pipeline(place(way, seed)).unet
    scheduler = DDIMScheduler.from_config(dense().scheduler.config)
    scheduler.set_timesteps(STEPS)
    times, generator = scheduler.timesteps, torch.Generator().manual_seed(seed)
    images = samples_of(DIGITS.held_out).sample(torch.arange(IMAGES))
    start = torch.randn(images.shape, generator=generator)
    path = list(walk(whole, scheduler, start, times))
    samples, found = [start, *(sample for _, sample in path)], Run(path=[], data=[], picture=[])
    for step, timestep in enumerate(times):
        ((predicted, sample),) = walk(small, scheduler, samples[step], times[step : step + 1])
        *_, picture = [sample, *(after for _, after in walk(whole, scheduler, sample, times[step + 1 :]))]
        noisy = scheduler.add_noise(images, torch.randn(images.shape, generator=generator), timestep)
        both = [unet(noisy, timestep).sample for unet in (small, whole)]
        pairs = {"path": (predicted, path[step][0]), "data": both, "picture": (picture, samples[-1])}
        for key, (one, other) in pairs.items():
            found[key].append(float((one - other).square().mean()))
    return found | {"timesteps": times.tolist()}


def rows(way: str, runs: list[Run]) -> list[list[str]]:
    """A row a part of the timesteps: means of the predictions' errors, the sum of what the steps do to the picture, and
    how much of it a prediction's error brings."""
    cells, times = [], np.array(runs[0]["timesteps"])
    for first, end in zip(FIRSTS, (1000, *FIRSTS[:-1]), strict=True):
        inside = (times >= first) & (times < end)
        data, path = ([float(np.mean(np.array(run[key])[inside])) for run in runs] for key in ("data", "path"))
        lost = [float(np.array(run["picture"])[inside].sum()) for run in runs]
        gain = [a / (b * inside.sum()) for a, b in zip(lost, path, strict=True)]
        cells.append([way, f"{first}-{end - 1}", mean(data, 6), mean(path, 6), mean(lost, 5), mean(gain, 2)])
    return cells


def plot(found: dict[str, list[Run]], path: Path) -> None:
    """By timestep the error of a prediction on the path, and what the step does to the picture, a line a way."""
    pyplot = need_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for way, runs in found.items():
        for panel, key in zip(axes, ("path", "picture"), strict=True):
            line = np.mean([run[key] for run in runs], 0)
            name, gamma = WAYS[way]
            style = {"marker": ".", "ls": ":" if gamma is None else "-", "color": COLOURS[name], "label": way}
            panel.semilogy(runs[0]["timesteps"], line, **style)
    titles = ("error of a prediction, on the dense model's path", "error of the picture by this step alone")
    for panel, title in zip(axes, titles, strict=True):
        panel.set(title=title, xlabel="timestep", ylabel="mean squared difference to the dense model's")
        panel.invert_xaxis()
    axes[0].legend(fontsize=8)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    pyplot.close(figure)


def main(
    seeds: Seeds = 1,
    ways: Annotated[str, typer.Option(**some_of(WAYS, ";"))] = ";".join(WAYS),
    workers: Workers = 2,
) -> None:
    """Measure what is missing, then print the table and draw the plot."""
    store = Store(
        "path", [MODEL, IMAGES, STEPS, finetuned.BUDGET, finetuned.told(finetuned.SNR_GAMMA), WAYS, str(SCALE)]
    )
    jobs = {f"{way} {seed}": partial(measured, way, seed) for seed in range(seeds) for way in ways.split(";")}
    store.fill(jobs, workers)
    found = {
        way: runs
        for way in WAYS
        if (runs := [run for key, run in store.values.items() if key.rpartition(" ")[0] == way])
    }
    plot(found, RESULTS / "path.png")
    most = max(map(len, found.values()))
    intro = (
        f"{over(most)}; {finetuned.BUDGET:.0%} of the MACs; {IMAGES} images of {STEPS} DDIM steps. Errors are mean "
        "squared differences to the dense model: of predictions on held-out images with noise and on its own path, "
        "means over the steps in these timesteps; of the picture when one of these steps is taken by the pruned model, "
        "summed over them. Gain: the picture's error over the prediction's."
    )
    head = ["way", "timesteps", "error on images", "error on the path", "error of the picture", "gain"]
    publish("path", [intro, "", *table(head, [line for way, runs in found.items() for line in rows(way, runs)])])
