"""What the regressions of a compensation cost: done plainly in float64 and as they are, in turn, on the same models.

    python benchmarks/bench.py regressions            # four pairs of the embedded model, two of 35.7 M parameters
    python benchmarks/bench.py regressions --quick    # one pair of the embedded model

Plainly: whole Gram matrices in float64, every strength (`shared/plain_ridge.py`). Each pair runs in one process; who is
first alternates. Results are kept in benchmarks/results/regressions.json; interrupted, it goes on where it was.
"""

from __future__ import annotations

import contextlib
import copy
import time
from functools import partial
from typing import Annotated, Any
from unittest import mock

import typer
from diffusers import DDPMScheduler
from shared.architectures import build
from shared.embedded import MODEL, dense
from shared.plain_ridge import PLAIN
from shared.results import Store, Workers, mean, publish, table
from size.scale import samples_of

import diffprune_plugin as dp
from diffprune_plugin import demo
from diffprune_plugin.recovery import ridge
from diffprune_plugin.recovery.compensate import compensate_

SIZES = {"embedded": 256, "ddpm-cifar10-32": 64}  # samples
WAYS = ("plain", "now")
RATIO = 0.3


def one(size: str, way: str) -> tuple[float, float]:
    """CPU seconds of a compensation after magnitude, and the held-out errors that it leaves, added up."""
    if size == "embedded":
        before, scheduler, images = dense().unet, dense().scheduler, demo.CALIBRATION_IMAGES
    else:
        before, scheduler = build(size), DDPMScheduler()
        images = samples_of(before, SIZES[size])
    model = copy.deepcopy(before)
    plan = dp.make_plan(model, "magnitude", pruning_ratio=RATIO)
    dp.remove_(model, plan)
    with mock.patch.multiple(ridge, **PLAIN) if way == "plain" else contextlib.nullcontext():
        start = time.process_time()
        report = compensate_(model, before, plan, scheduler, images, samples=SIZES[size], progress=False)
    return time.process_time() - start, sum(repair.after for repair in report.repairs)


def pair(size: str, number: int) -> dict[str, Any]:
    """Both ways in turn."""
    return {way: one(size, way) for way in (WAYS if number % 2 == 0 else WAYS[::-1])}


def main(
    quick: Annotated[bool, typer.Option("--quick", help="one pair of the embedded model")] = False,
    workers: Workers = 1,
) -> None:
    """Measure what is missing, then print the table."""
    pairs = {"embedded": 1} if quick else {"embedded": 4, "ddpm-cifar10-32": 2}
    store = Store("regressions" + ("_quick" if quick else ""), [MODEL, SIZES, RATIO])
    store.fill({f"{size} {i}": partial(pair, size, i) for size, count in pairs.items() for i in range(count)}, workers)
    rows = []
    for size, count in pairs.items():
        found = [store.values[f"{size} {i}"] for i in range(count)]
        seconds = [mean([each[way][0] for each in found], 1) for way in WAYS]
        ratio = mean([each["plain"][0] / each["now"][0] for each in found], 2)
        error = mean([each["now"][1] / each["plain"][1] for each in found])
        rows.append([size, str(SIZES[size]), str(count), *seconds, f"{ratio}x", error])
    head = ["model", "samples", "pairs", "plainly, CPU s", "now, CPU s", "faster", "held-out error, now / plainly"]
    intro = "Whole compensations after magnitude at 0.3, the passes of both UNets included; one thread."
    publish(store.path.stem, [intro, "", *table(head, rows)])
