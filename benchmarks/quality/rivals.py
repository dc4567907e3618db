"""Ways to repair under one roof: ours, GRAIL's and OBS-Diff's, of the same pruned models, at the same MACs.

    python benchmarks/bench.py rivals                    # digits
    python benchmarks/bench.py rivals --model emoji      # after: make models

The formulas are in shared/rivals.py. All see as many noisy samples, from the same images; memory is what the process
needed at most while repairing, above what it had before.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from shared.embedded import HALF, Row, dense, measure, measure_dense
from shared.results import (
    RESULTS,
    Seeds,
    Store,
    Workers,
    holm,
    mean,
    one_of,
    over,
    p_text,
    paired_p,
    publish,
    some_shares,
    table,
)
from shared.rivals import WAYS
from shared.subject import SUBJECTS, Look

import diffprune_plugin as dp
from diffprune_plugin.pruning.loading import load_pipeline
from diffprune_plugin.utils.images import image_grid, pil_images, save_image
from quality.criteria import FULL, PAPER, Budget, start_of
from quality.thresholds import budget_of

OURS, NOTHING = "ours", "nothing repaired"
REPAIRS: dict[str, Callable[..., Any]] = {**WAYS, OURS: dp.compensate_}
RATIOS = (HALF, 0.5)


def repaired(way: str, ratio: float, seed: int, budget: Budget) -> tuple[Any, float, float]:
    """The pipeline, seconds and MB."""
    pipeline, of = load_pipeline(start_of(PAPER, ratio, seed, budget)), budget.of
    if way == NOTHING:
        return pipeline, 0.0, 0.0
    model, whole = pipeline.unet, copy.deepcopy(dense(of))
    before, start = peak(True), time.perf_counter()
    REPAIRS[way](model, whole.unet, model.pruning_plan, whole.scheduler, of.calibration, seed=seed, progress=False)
    return pipeline, time.perf_counter() - start, peak() - before


def peak(forget: bool = False) -> float:
    """MB of memory that this process has had at most, or, where that is to be forgotten, has now. Of Linux."""
    if forget:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed and kept for later would hide what is needed
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1000 if found else 0.0


def measured(way: str, ratio: float, seed: int, budget: Budget) -> Row:
    pipeline, seconds, memory = repaired(way, ratio, seed, budget)
    return {**measure(pipeline, budget.look, budget.of), "seconds": seconds, "memory": memory}


def lines(store: Store, ratios: list[float], seeds: int, budget: Budget) -> list[str]:
    """The table as Markdown."""
    names = (NOTHING, *REPAIRS)
    of = {
        (r, n, key): [store.values[f"{n} {r} {s}"][key] for s in range(seeds)]
        for r, n, key in itertools.product(ratios, names, ("loss", "ssim", "distance", "seconds", "memory"))
    }
    places = [(r, n) for r in ratios for n in names if n not in (OURS, NOTHING)]
    tests = holm([paired_p(of[r, n, "loss"], of[r, OURS, "loss"]) for r, n in places])
    p = dict(zip(places, tests, strict=True))
    rows = [
        [str(r), n, *(mean(of[r, n, key], digits) for key, digits in (("loss", 4), ("ssim", 3), ("distance", 0)))]
        + [p_text(p[r, n]) if (r, n) in p else ""]
        + [mean(of[r, n, key], 0) if n != NOTHING else "" for key in ("seconds", "memory")]
        for r in ratios
        for n in names
    ]
    look, whole = budget.look, store.values["dense"]
    head = ["ratio", "repair", "loss", "SSIM", f"FD ({budget.of.features.stem})", "p (Holm)", "seconds", "MB"]
    return [
        f"{over(seeds)}. Chosen by {PAPER}; {look.count} images of {look.steps} DDIM steps. p: paired t-test of the "
        f"loss against ours. Dense: loss {whole['loss']:.4f}, FD {whole['distance']:.0f}.",
        "",
        *table(head, rows),
    ]


def picture(ratio: float, budget: Budget, path: Path) -> None:
    """Images of the first seed from the same noise, a row a repair."""
    look = Look(count=18, steps=25)
    rows = {"dense": dense(budget.of)}
    rows |= {way: repaired(way, ratio, 0, budget)[0] for way in (NOTHING, *REPAIRS)}
    images = {name: budget.of.images(each, look, 0).permute(0, 2, 3, 1).numpy() for name, each in rows.items()}
    save_image(image_grid({name: pil_images(each) for name, each in images.items()}), path)


def main(
    model: Annotated[str, typer.Option(**one_of(SUBJECTS))] = "digits",
    seeds: Seeds = 5,
    ratios: Annotated[str, typer.Option(**some_shares("pruning ratios"))] = ",".join(map(str, RATIOS)),
    workers: Workers = 2,
) -> None:
    """Measure what is missing, then print the table and draw the picture."""
    title, budget, chosen = f"rivals_{model}", budget_of(model, FULL.batch_size), [float(r) for r in ratios.split(",")]
    store = Store(title, [budget.of.training["sha256"], str(budget)])
    places = itertools.product((NOTHING, *REPAIRS), chosen, range(seeds))
    first = {f"{NOTHING} {chosen[0]} {s}": partial(measured, NOTHING, chosen[0], s, budget) for s in range(seeds)}
    store.fill({"dense": partial(measure_dense, budget.look, budget.of)} | first, workers)  # each makes a calibration
    store.fill({f"{n} {r} {s}": partial(measured, n, r, s, budget) for n, r, s in places}, workers)
    publish(title, lines(store, chosen, seeds, budget))
    picture(chosen[0], budget, RESULTS / f"{title}.png")
