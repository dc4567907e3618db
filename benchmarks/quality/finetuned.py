"""What the fine-tune of `recover` makes of a budget spent by one ratio, by allocation, and of an adapter alone.

    python benchmarks/bench.py finetuned                               # five seeds, four ways: hours
    python benchmarks/bench.py finetuned --ways linear --seeds 2
    python benchmarks/bench.py finetuned --batch-size 32 --ways "uniform;linear"       # the dense model's batch
    python benchmarks/bench.py finetuned --batch-size 32 --ways "uniform;linear output_error to half" --snr-gamma 0.06
    python benchmarks/bench.py finetuned --quick                       # one seed, 30 steps, fewer images

46 % of the embedded model's MACs, compensated, then 10 % of the dense model's steps with the dense model as teacher,
timesteps weighed by min-SNR (arXiv 2303.09556), which brings what is drawn nearer than the recipe of `recover`;
``lora`` trains a low-rank adapter of the allocated model for as many. Results are kept in
benchmarks/results/finetuned.json; interrupted, it goes on where it was, and other ways and seeds add to it.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from shared.embedded import MODEL, Row, classifier, measure, measure_dense, tuned
from shared.results import Seeds, Store, Workers, mean, p_text, paired_p, publish, some_of, table

from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.pruning.loading import load_pipeline
from quality.allocation import made
from quality.recover import FULL, LONG, QUICK, RECIPES, TAUGHT, Scale

BUDGET = 0.46
LOOK = replace(LONG, noises=4)
SNR_GAMMA = 5.0
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "linear": ("linear", {}),
    "linear output_error": ("linear output_error", {}),
    "linear output_error to half": ("linear output_error to half", {}),
    "linear, lora": ("linear", {"lora": {"rank": 16}}),
}
COLUMNS = {"loss": 4, "ssim": 3, "distance": 1}


def recipe(snr_gamma: float) -> dict[str, Any]:
    """Settings of the fine-tune."""
    return {**RECIPES[TAUGHT], "snr_gamma": snr_gamma}


def told(snr_gamma: float) -> dict[str, Any]:
    """The recipe without the teacher, which is a path: MODEL says which it is."""
    return {key: value for key, value in recipe(snr_gamma).items() if key != "teacher"}


def trained(way: str, seed: int, scale: Scale, snr_gamma: float = SNR_GAMMA) -> Path:
    """Directory of the fine-tuned model."""
    allocation, changes = WAYS[way]
    name = f"finetuned-{way.replace(', ', '-')}-{seed}-{scale.steps}-of-{scale.batch_size}"
    settings = {**recipe(snr_gamma), **changes}
    return tuned(name, made(allocation, BUDGET, seed), seed, steps=scale.steps, batch_size=scale.batch_size, **settings)


def measured(way: str, seed: int, scale: Scale, snr_gamma: float) -> Row:
    """Share of the parameters, and how good the model is."""
    output = trained(way, seed, scale, snr_gamma)
    plan = read_plan(output)
    return {"params": plan.params[1] / plan.params[0], **measure(load_pipeline(output), scale.look)}


def row(store: Store, way: str, seeds: int) -> list[str]:
    """Means over the seeds that were measured, and paired tests against uniform over those that both have."""
    runs = {seed: run for seed in range(seeds) if (run := store.values.get(f"{way} {seed}"))}
    both = [(run, other) for seed, run in runs.items() if (other := store.values.get(f"uniform {seed}"))]
    cells = [way, str(len(runs)), mean([run["params"] for run in runs.values()], 3)]
    for key, digits in COLUMNS.items():
        cells.append(mean([run[key] for run in runs.values()], digits))
        cells.append(p_text(paired_p([run[key] for run, _ in both], [other[key] for _, other in both])))
    share = sum(run["distance"] for run in runs.values()) / len(runs) / store.values["dense"]["distance"]
    return [*cells, f"{share:.2f}x"]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="one seed, 30 steps, fewer images")] = False,
    seeds: Seeds = 5,
    ways: Annotated[str, typer.Option(**some_of(WAYS, ";"))] = ";".join(WAYS),
    batch_size: Annotated[int, typer.Option(help="of a step; the dense model was trained with 32")] = FULL.batch_size,
    snr_gamma: Annotated[float, typer.Option(min=1e-6, help="of the min-SNR weights of the timesteps")] = SNR_GAMMA,
    workers: Workers = 2,
) -> None:
    """Measure what is missing, then print the table."""
    other = "" if batch_size == FULL.batch_size else f"_batch_{batch_size}"
    other += "" if snr_gamma == SNR_GAMMA else f"_snr_gamma_{snr_gamma:g}".replace(".", "_")
    full = replace(FULL, batch_size=batch_size, look=LOOK)
    title, scale = ("finetuned_quick", QUICK) if quick else (f"finetuned{other}", full)
    seeds = 1 if quick else seeds
    store = Store(title, [MODEL, told(snr_gamma), BUDGET, str(scale)])
    pairs = itertools.product(range(seeds), ways.split(";"))
    jobs = {f"{way} {seed}": partial(measured, way, seed, scale, snr_gamma) for seed, way in pairs}
    store.fill({"dense": partial(measure_dense, scale.look)} | jobs, workers)
    most = max(int(key.rpartition(" ")[2]) for key in store.values if key != "dense") + 1
    of_dense = store.values["dense"]
    intro = (
        f"Mean and standard error over seeds. {BUDGET:.0%} of the MACs, compensated, {scale.steps} steps of batch "
        f"{scale.batch_size}, weighed by min-SNR (gamma {snr_gamma:g}); {scale.look.count} images of "
        f"{scale.look.steps} DDIM steps from each of {scale.look.noises} noises, the mean of them. p: paired t-test "
        "against uniform. "
        f"Dense: loss {of_dense['loss']:.4f}, FD {of_dense['distance']:.1f}."
    )
    head = ["way", "seeds", "params", "held-out loss", "p", "SSIM", "p", classifier().frechet, "p", "of the dense"]
    known = [way for way in WAYS if f"{way} 0" in store.values]
    publish(title, [intro, "", *table(head, [row(store, way, most) for way in known])])
