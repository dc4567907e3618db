"""Where channels go: the embedded model at the same MACs by one ratio and by allocation, compensated, nothing trained.

    python benchmarks/bench.py allocation            # three seeds, two budgets
    python benchmarks/bench.py allocation --quick    # one seed, one budget

Everything is what `diffprune prune` does with `macs_target` and `allocation`. Results are kept in
benchmarks/results/allocation.json; interrupted, it goes on where it was.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from shared.embedded import MODEL, WORK, Look, Row, measure, measure_dense
from shared.results import Store, mean, over, p_text, paired_p, publish, table

import diffprune_plugin as dp
from diffprune_plugin import demo
from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.pruning.loading import load_pipeline
from diffprune_plugin.workflow import prune

BUDGETS = (0.46, 0.25)  # of the MACs
WAYS = ("uniform", "linear")
LOOK = Look(held_out=500, repeats=2, count=66, steps=20)
COLUMNS = {"macs": 3, "params": 3, "loss": 4, "ssim": 3, "distance": 0}


def made(way: str, budget: float, seed: int) -> Path:
    """Directory of the embedded model at a share of its MACs; the calibration is one of a seed, the sensitivity too."""
    output = WORK / "models" / f"allocation-{way}-{budget}-{seed}"
    if not output.exists():
        values: dict[str, Any] = {"model": str(demo.MODEL), "output": str(output), "data": str(demo.CALIBRATION_IMAGES)}
        values |= {"macs_target": budget, "allocation": way, "seed": seed}
        start = time.perf_counter()
        prune(dp.PruningConfig.make(values), progress=False)
        output.with_suffix(".seconds").write_text(f"{time.perf_counter() - start:.1f}")
    return output


def measured(way: str, budget: float, seed: int) -> Row:
    """Shares of the MACs and parameters, and how good the model is."""
    output = made(way, budget, seed)
    plan = read_plan(output)
    shares = {"macs": plan.macs[1] / plan.macs[0], "params": plan.params[1] / plan.params[0]}
    return {**shares, **measure(load_pipeline(output), LOOK)}


def main(
    quick: Annotated[bool, typer.Option("--quick", help="one seed, one budget")] = False,
    seeds: int = 3,
    workers: Annotated[int, typer.Option(help="processes, of one thread each")] = 2,
) -> None:
    """Measure what is missing, then print the table."""
    title, seeds, budgets = ("allocation_quick", 1, BUDGETS[:1]) if quick else ("allocation", seeds, BUDGETS)
    store = Store(title, [MODEL, str(LOOK)])
    jobs = {f"{w} {b} {s}": partial(measured, w, b, s) for b in budgets for w in WAYS for s in range(seeds)}
    store.fill({"dense": partial(measure_dense, LOOK)} | jobs, workers)
    dense, rows = store.values["dense"], []
    for budget in budgets:
        of = {way: [store.values[f"{way} {budget} {seed}"] for seed in range(seeds)] for way in WAYS}
        for way, runs in of.items():
            cells = [mean([run[key] for run in runs], digits) for key, digits in COLUMNS.items()]
            p = paired_p([run["loss"] for run in runs], [run["loss"] for run in of[WAYS[0]]])
            rows.append([f"{budget:.0%}", way, *cells, p_text(p)])
    head = ["budget", "allocation", "MACs", "params", "held-out loss", "SSIM", "FD (digits_classifier)", "p"]
    intro = (
        f"{over(seeds)}. diff_taylor, compensated, not trained; {LOOK.count} images of {LOOK.steps} DDIM steps. p: "
        f"paired t-test of the loss against uniform. Dense: loss {dense['loss']:.4f}, FD {dense['distance']:.0f}."
    )
    publish(title, [intro, "", *table(head, rows)])
