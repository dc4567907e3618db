"""What is accumulated over timesteps, and with which weights: agreement between seeds, and loss right after removal.

    python benchmarks/policies.py [--quick]

Agreement: the share of the channels removed that the selections of two seeds have in common, over all pairs of seeds.
Results are kept in benchmarks/results/policies.json; interrupted, it goes on where it was.
"""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Annotated, Any

import numpy as np
import typer
from common import Store, mean, publish, table
from criteria import FULL, PAPER, RATIOS, sweep_of
from embedded import MODEL, agreement, calibrated, calibration, dense, held_out_loss

import diffprune_plugin as dp

ALL, THRESHOLDED = sweep_of("taylor", FULL) or {}, sweep_of(PAPER, FULL) or {}
# Settings of the calibration, by the name in the table.
POLICIES: dict[str, dict[str, Any]] = {
    "diff_taylor (paper)": THRESHOLDED,
    "all timesteps (taylor)": ALL,
    "absolute (taylor_absolute)": {**ALL, "accumulate": "absolute"},
    "square (fisher)": {**ALL, "accumulate": "square"},
    "log_decrease": {**ALL, "timestep_weights": "log_decrease"},
    "min_snr": {**ALL, "timestep_weights": "min_snr"},
    "square, single samples": {**ALL, "accumulate": "square", "micro_batch": 1},
    "square, threshold 0.05": {**THRESHOLDED, "accumulate": "square"},
}


def plan_of(options: dict[str, Any], ratio: float, seed: int) -> dp.PruningPlan:
    criterion = dp.importance("diff_taylor", calibration=calibration(seed, **options), **options)
    return dp.make_plan(dense().unet, criterion, pruning_ratio=ratio)


def loss_after(options: dict[str, Any], ratio: float, seed: int) -> float:
    """Held-out loss right after removal."""
    unet = copy.deepcopy(dense().unet)
    dp.remove_(unet, plan_of(options, ratio, seed))
    return held_out_loss(unet, repeats=1)


def agreements(options: dict[str, Any], ratio: float, seeds: int) -> list[float]:
    """Of every pair of seeds."""
    plans = [plan_of(options, ratio, seed) for seed in range(seeds)]
    return [agreement(first, second) for first, second in itertools.combinations(plans, 2)]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="2 seeds, the first four rows")] = False,
    seeds: int = 3,
    workers: Annotated[int, typer.Option(help="processes, of one thread each")] = 2,
) -> None:
    """Print the table and keep it in benchmarks/results/policies.md."""
    count, policies = (2, dict(itertools.islice(POLICIES.items(), 4))) if quick else (seeds, POLICIES)
    name, seeds_of = "policies" + ("_quick" if quick else ""), range(count)
    store = Store(name, [MODEL, policies, RATIOS])
    store.fill({f"{n} {s}": partial(calibrated, s, o) for n, o in policies.items() for s in seeds_of}, workers)
    cells = [(n, o, r) for n, o in policies.items() for r in RATIOS]
    store.fill(
        {f"{n} {r} agreement": partial(agreements, o, r, count) for n, o, r in cells}
        | {f"{n} {r} {s}": partial(loss_after, o, r, s) for n, o, r in cells for s in seeds_of},
        workers,
    )
    rows = []
    for label in policies:
        seconds = np.mean([store.values[f"{label} {s}"]["seconds"] for s in seeds_of])
        pairs = [f"{np.mean(store.values[f'{label} {ratio} agreement']):.0%}" for ratio in RATIOS]
        losses = [mean([store.values[f"{label} {ratio} {s}"] for s in seeds_of]) for ratio in RATIOS]
        rows.append([label, f"{seconds:.0f}", *pairs, *losses])
    head = ["accumulated, weights", "seconds"]
    head += [f"{what} at {ratio}" for what in ("agreement", "loss") for ratio in RATIOS]
    intro = (
        f"{FULL.samples} gradient samples; mean and standard error over {count} seeds of the calibration (of the "
        "agreement: mean over pairs of seeds). Seconds: two calibrations at once, one thread each."
    )
    publish(name, [intro, "", *table(head, rows)])


if __name__ == "__main__":
    typer.run(main)
