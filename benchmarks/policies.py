"""What is accumulated over timesteps, and with which weights: agreement between seeds, and loss right after removal.

    python benchmarks/policies.py [--quick]

Agreement: the share of the channels removed at ratio 0.3 that the selections of two seeds have in common, over all
pairs of seeds. Results are kept in benchmarks/results/policies.json; interrupted, it goes on where it was.
"""

from __future__ import annotations

import copy
import itertools
from typing import Annotated, Any

import torch
import typer
from common import Store, agreement, calibration, dense, held_out_loss, mean_and_error, publish, seconds_of

import diffprune_plugin as dp

RATIOS = (0.3, 0.5)
ALL: dict[str, Any] = {"threshold": 0.0, "samples": 512, "curve_samples": 4}
PAPER = {**ALL, "threshold": 0.05}
# Options of diff_taylor, by the name in the table.
POLICIES: dict[str, dict[str, Any]] = {
    "diff_taylor (paper)": PAPER,
    "all timesteps (taylor)": ALL,
    "absolute (taylor_absolute)": {**ALL, "accumulate": "absolute"},
    "square (fisher)": {**ALL, "accumulate": "square"},
    "log_decrease": {**ALL, "timestep_weights": "log_decrease"},
    "min_snr": {**ALL, "timestep_weights": "min_snr"},
    "square, single samples": {**ALL, "accumulate": "square", "micro_batch": 1},
    "square, micro_batch 32": {**ALL, "accumulate": "square", "micro_batch": 32},
    "square, threshold 0.05": {**PAPER, "accumulate": "square"},
}


def plan_of(options: dict[str, Any], ratio: float, seed: int) -> dp.PruningPlan:
    criterion = dp.importance("diff_taylor", calibration=calibration(seed, **options), **options)
    return dp.make_plan(dense().unet, criterion, pruning_ratio=ratio)


def measure(options: dict[str, Any], ratio: float, seed: int) -> dict[str, Any]:
    """Held-out loss after removal, and the seconds that the calibration took."""
    plan, unet = plan_of(options, ratio, seed), copy.deepcopy(dense().unet)
    dp.remove_(unet, plan)
    return {"loss": held_out_loss(unet), "seconds": seconds_of(seed, **options)}


def agreements(options: dict[str, Any], seeds: int) -> list[float]:
    """Of every pair of seeds."""
    plans = [plan_of(options, RATIOS[0], seed) for seed in range(seeds)]
    return [agreement(first, second) for first, second in itertools.combinations(plans, 2)]


def main(
    quick: Annotated[bool, typer.Option(help="2 seeds")] = False,
    seeds: int = 3,
    threads: int = 1,
) -> None:
    """Print the table and keep it in benchmarks/results/policies.md."""
    torch.set_num_threads(threads)
    count, store = (2 if quick else seeds), Store("policies")
    lines = [
        f"{ALL['samples']} gradient samples; mean and standard error over {count} seeds of the calibration (of the "
        "agreement: mean over pairs of seeds); 30 % agree by chance.",
        "",
        "| accumulated, weights | seconds | agreement between seeds | loss at 0.3 | loss at 0.5 |",
        "|---|---|---|---|---|",
    ]
    for name, options in POLICIES.items():
        runs = {
            ratio: [
                store.get(f"{name} {ratio} {s}", lambda o=options, r=ratio, s=s: measure(o, r, s)) for s in range(count)
            ]
            for ratio in RATIOS
        }
        pairs = store.get(f"{name} agreement of {count}", lambda o=options: agreements(o, count))
        losses = [mean_and_error([run["loss"] for run in runs[ratio]]) for ratio in RATIOS]
        seconds = mean_and_error([run["seconds"] for run in runs[RATIOS[0]]])[0]
        cells = [f"{seconds:.0f}", f"{mean_and_error(pairs)[0]:.1%}", *(f"{m:.4f} ± {e:.4f}" for m, e in losses)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    publish("policies" + ("_quick" if quick else ""), lines)


if __name__ == "__main__":
    typer.run(main)
