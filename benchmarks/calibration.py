"""How much calibration is enough: agreement of the removed channels with a large-budget calibration.

    python benchmarks/calibration.py [--quick]

For the authors' loop and for the default sampling at several budgets: samples forward and backward, wall time, and
which share of the removed channels (ratio 0.3) a calibration of 16,384 fresh samples removes too.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from common import Store, agreement, calibration, dense, mean_and_error, publish, seconds_of

import diffprune_plugin as dp

YARDSTICK = {"threshold": 0.05, "samples": 16384}
BUDGETS = (128, 256, 512, 1024, 2048, 4096)


def plan_of(seed: int, options: dict[str, Any]) -> dp.PruningPlan:
    criterion = dp.importance("diff_taylor", calibration=calibration(seed, **options))
    return dp.make_plan(dense().unet, criterion, pruning_ratio=0.3)


def measure(seed: int, options: dict[str, Any], yardstick: dict[str, Any]) -> dict[str, float]:
    """Samples each way, seconds and agreement of one calibration."""
    result, seconds = calibration(seed, **options), seconds_of(seed, **options)
    same = agreement(plan_of(1000, yardstick), plan_of(seed, options))
    return {"forward": result.forward, "backward": result.backward, "seconds": seconds, "agreement": same}


def main(
    quick: Annotated[bool, typer.Option(help="2 seeds, small budgets, a yardstick of 4096 samples")] = False,
    seeds: int = 3,
    threads: int = 2,
) -> None:
    """Print the table and keep it in benchmarks/results/calibration.md."""
    torch.set_num_threads(threads)
    yardstick = {**YARDSTICK, "samples": 4096} if quick else YARDSTICK
    count, budgets = (2, BUDGETS[:4]) if quick else (seeds, BUDGETS)
    name = "calibration" + ("_quick" if quick else "")
    store = Store(name)
    rows = {f"default, {n} samples": {"threshold": 0.05, "samples": n} for n in budgets}
    if not quick:
        rows["authors' loop (batch 32)"] = {"sampling": "reference"}
    lines = [
        f"Mean and standard error over {count} seeds; yardstick: {yardstick['samples']} fresh samples; 30 % by chance.",
        "",
        "| calibration | samples forward | samples backward | seconds | agreement |",
        "|---|---|---|---|---|",
    ]
    for label, options in rows.items():
        runs = [
            store.get(f"{label} {seed}", lambda s=seed, o=options: measure(s, o, yardstick)) for seed in range(count)
        ]
        mean = {key: mean_and_error([run[key] for run in runs]) for key in runs[0]}
        lines.append(
            f"| {label} | {mean['forward'][0]:.0f} | {mean['backward'][0]:.0f} | {mean['seconds'][0]:.0f} "
            f"| {mean['agreement'][0]:.1%} ± {mean['agreement'][1]:.1%} |"
        )
        print(lines[-1], flush=True)
    publish(name, lines)


if __name__ == "__main__":
    typer.run(main)
