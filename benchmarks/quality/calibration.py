"""How much calibration is enough: agreement of the removed channels with a large-budget calibration.

    python benchmarks/bench.py calibration [--quick]

For the authors' loop and for the default sampling at several budgets: samples forward and backward, wall time (two
calibrations at once, one thread each), and which share of the removed channels (ratio 0.3) a calibration of 16,384
fresh samples removes too.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer
from shared.embedded import MODEL, Row, agreement, calibrated, calibration, dense
from shared.results import Seeds, Store, Workers, mean, publish, table

import diffprune_plugin as dp

YARDSTICK = {"threshold": 0.05, "samples": 16384}
BUDGETS = (128, 256, 512, 1024, 2048, 4096)


def plan_of(seed: int, options: dict[str, Any]) -> dp.PruningPlan:
    criterion = dp.importance("diff_taylor", calibration=calibration(seed, **options))
    return dp.make_plan(dense().unet, criterion, pruning_ratio=0.3)


def measured(seed: int, options: dict[str, Any], yardstick: dict[str, Any]) -> Row:
    """Samples each way, seconds and agreement of one calibration."""
    same = 100 * agreement(plan_of(1000, yardstick), plan_of(seed, options))
    return {**calibrated(seed, options), "agreement": same}


def main(
    quick: Annotated[bool, typer.Option("--quick", help="2 seeds, small budgets, a yardstick of 4096 samples")] = False,
    seeds: Seeds = 3,
    workers: Workers = 2,
) -> None:
    """Print the table and keep it in benchmarks/results/calibration.md."""
    yardstick = {**YARDSTICK, "samples": 4096} if quick else YARDSTICK
    count, budgets = (2, BUDGETS[:4]) if quick else (seeds, BUDGETS)
    rows: dict[str, dict[str, Any]] = {f"default, {n} samples": {"threshold": 0.05, "samples": n} for n in budgets}
    if not quick:
        rows["authors' loop (batch 32)"] = {"sampling": "reference"}
    name = "calibration" + ("_quick" if quick else "")
    store = Store(name, [MODEL, rows, yardstick])
    store.fill({"yardstick": partial(calibrated, 1000, yardstick)}, workers)
    store.fill({f"{n} {s}": partial(measured, s, o, yardstick) for n, o in rows.items() for s in range(count)}, workers)
    lines = []
    for label in rows:
        runs = [store.values[f"{label} {seed}"] for seed in range(count)]
        of = {key: [run[key] for run in runs] for key in runs[0]}
        cells = [mean(of[key], 0).split(" ")[0] for key in ("forward", "backward", "seconds")]
        lines.append([label, *cells, f"{mean(of['agreement'], 1)} %"])
    intro = f"Mean and standard error over {count} seeds; yardstick: {yardstick['samples']} samples; 30 % by chance."
    head = ["calibration", "samples forward", "samples backward", "seconds", "agreement"]
    publish(name, [intro, "", *table(head, lines)])
