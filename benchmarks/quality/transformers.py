"""Transformers of digits at the same MACs: by width, by depth and by both, allocated; by criteria; not trained unless
asked.

    python benchmarks/making/train_transformer.py dit                              # first: half an hour on one core
    python benchmarks/bench.py transformers                                        # three seeds, two budgets: hours
    python benchmarks/bench.py transformers --model sd3                            # joint streams and flow matching
    python benchmarks/bench.py transformers --ways "width;depth;both" --seeds 1
    python benchmarks/bench.py transformers --steps 200      # each fine-tuned with the dense model as teacher
    python benchmarks/bench.py transformers --quick          # one seed, one budget, two ways, few images

Everything is what `diffprune prune` does with `macs_target`. Results are kept in
benchmarks/results/transformers_MODEL.json, of trained ones in transformers_MODEL_STEPS_steps.json; interrupted, it goes
on where it was, and other ways, seeds and budgets add to it.
"""

from __future__ import annotations

import itertools
import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from shared.embedded import Row, classifier, measure, measure_dense, tuned
from shared.results import (
    Seeds,
    Store,
    Workers,
    mean,
    one_of,
    over,
    p_text,
    paired_p,
    publish,
    some_of,
    some_shares,
    table,
)
from shared.subject import TRANSFORMERS, Look, Subject

import diffprune_plugin as dp
from diffprune_plugin.pruning.loading import load_pipeline, model_of
from diffprune_plugin.utils.tensors import weights_hash
from diffprune_plugin.workflow import prune
from quality.recover import RECIPES, TAUGHT

# Of the MACs: two and four of the eight blocks are a hair less; two and three of the six.
BUDGETS = {"dit": (0.76, 0.51), "sd3": (0.67, 0.5)}
TOLD = {"dit": "A DiT of 2.8 M parameters", "sd3": "SD3's joint streams in 3.5 M parameters, flow matching,"}
ALONE: dict[str, Any] = {"depth": "auto", "max_pruning_ratio": 0}
UNIFORM: dict[str, Any] = {"allocation": "uniform"}
WAYS: dict[str, dict[str, Any]] = {
    "width": {},
    "depth": ALONE,
    "both": {"depth": "auto"},
    "width, nothing refitted": {"compensate": False},
    "depth, nothing refitted": {**ALONE, "compensate": False},
    "both, nothing refitted": {"depth": "auto", "compensate": False},
    "random, one ratio": {**UNIFORM, "importance": "random"},
    "magnitude, one ratio": {**UNIFORM, "importance": "magnitude"},
    "taylor, one ratio": {**UNIFORM, "importance": "taylor"},
    "diff_taylor, one ratio": {**UNIFORM, "importance": "diff_taylor"},
    "output_error, one ratio": UNIFORM,
}
SHORT = "width;depth;both"
LOOK = Look(held_out=250, repeats=2, count=40, steps=10)
QUICK = Look(held_out=100, repeats=1, count=10, steps=5)
COLUMNS = {"macs": 3, "params": 3, "loss": 4, "ssim": 3, "distance": 0}
TESTED = ("loss", "ssim")


def made(way: str, budget: float, seed: int, of: Subject) -> tuple[Path, Row]:
    """Directory of the model at a share of its MACs, and what is left of it; one sensitivity of a seed."""
    name = f"{way}-{budget}-{seed}".replace(", ", "-").replace(" ", "-")
    output, facts = of.work / "models" / name, of.work / "models" / f"{name}.json"
    if not output.exists():
        values: dict[str, Any] = {"model": str(of.model), "output": str(output), "data": str(of.calibration)}
        values |= {"macs_target": budget, "seed": seed, "importance": "output_error", **WAYS[way]}
        kept = {key: str(of.work / f"{key}-{seed}") for key in ("calibration", "sensitivity")}
        values |= kept if values["importance"] != "taylor" else {"sensitivity": kept["sensitivity"]}
        start = time.perf_counter()
        plan = prune(dp.PruningConfig.make(values), progress=False).plan
        sizes = {key: getattr(plan.blocks, key) if plan.blocks else getattr(plan, key)[0] for key in ("macs", "params")}
        shares = {key: getattr(plan, key)[1] / whole for key, whole in sizes.items()}
        row: Row = {**shares, "blocks": len(plan.depth), "seconds": time.perf_counter() - start}
        facts.write_text(json.dumps(row))
    return output, json.loads(facts.read_text())


def measured(way: str, budget: float, seed: int, steps: int, look: Look, of: Subject) -> Row:
    """What is left, and how good it is, after so many steps of training."""
    output, row = made(way, budget, seed, of)
    if steps:
        settings = {**RECIPES[TAUGHT], "teacher": str(of.model)}
        same = weights_hash(model_of(load_pipeline(output)))[:12]  # where no block goes, "both" is "width"
        output = tuned(f"{same}-{seed}-{steps}", output, seed, of, steps=steps, batch_size=32, **settings)
    return {**row, **measure(load_pipeline(output), look, of)}


def line(store: Store, budget: float, way: str, steps: int, seeds: int) -> list[str]:
    """Means over the seeds that were measured, and paired tests against width over those that both have."""
    runs = {seed: run for seed in range(seeds) if (run := store.values.get(key_of(way, budget, seed, steps)))}
    both = [(run, other) for s, run in runs.items() if (other := store.values.get(key_of("width", budget, s, steps)))]
    cells = [mean([run["blocks"] for run in runs.values()], 1)]
    for key, digits in COLUMNS.items():
        cells.append(mean([run[key] for run in runs.values()], digits))
        if key in TESTED:
            cells.append(p_text(paired_p([run[key] for run, _ in both], [other[key] for _, other in both])))
    return [f"{budget:.0%}", way, str(steps), str(len(runs)), *cells]


def key_of(way: str, budget: float, seed: int, steps: int) -> str:
    return f"{way} {budget} {steps} steps seed {seed}"


def main(
    model: Annotated[str, typer.Option(**one_of(TRANSFORMERS))] = "dit",
    quick: Annotated[bool, typer.Option("--quick", help="one seed, one budget, width and depth, few images")] = False,
    seeds: Seeds = 3,
    ways: Annotated[str, typer.Option(**some_of(WAYS, ";"))] = ";".join(WAYS),
    budgets: Annotated[str, typer.Option(**some_shares("of the MACs; two unless given"))] = "",
    steps: Annotated[int, typer.Option(help="of a fine-tune of each, batch 32")] = 0,
    workers: Workers = 2,
) -> None:
    """Measure what is missing, then print the table."""
    of, (most, least) = TRANSFORMERS[model], BUDGETS[model]
    name = f"transformers_{model}" + (f"_{steps}_steps" if steps else "")
    title, look = (f"{name}_quick", QUICK) if quick else (name, LOOK)
    seeds, ways, budgets = (1, "width;depth", str(least)) if quick else (seeds, ways, budgets or f"{least},{most}")
    store, shares = Store(title, [str(of), str(look)]), [float(share) for share in budgets.split(",")]
    store.fill({"dense": partial(measure_dense, look, of)}, workers)
    for seed in range(seeds):  # the first makes the sensitivity of a seed
        places = list(itertools.product(shares, ways.split(";")))
        jobs = {key_of(way, b, seed, steps): partial(measured, way, b, seed, steps, look, of) for b, way in places}
        first = next(iter(jobs))
        for keys in (
            [first],
            [key for key in jobs if not key.startswith("both")],
            jobs,
        ):  # none trains what another does
            store.fill({key: jobs[key] for key in keys}, workers)
    publish(title, text(store, of, look))


def text(store: Store, of: Subject, look: Look) -> list[str]:
    """The table of all that was measured so far."""
    keys = [key for key in store.values if key != "dense"]
    most = max(int(key.rpartition(" ")[2]) for key in keys) + 1
    tried = {(float(words[1]), int(words[2])) for key in keys for words in [key.rsplit(" ", 5)]}
    dense, steps = store.values["dense"], of.steps
    known = [(b, way, n) for b, n in sorted(tried, reverse=True) for way in WAYS if key_of(way, b, 0, n) in keys]
    intro = (
        f"{over(most)}. {TOLD[of.name]} trained here for {steps} steps; channels ranked by output_error unless the "
        f"way names another, allocated, and refitted; {look.count} images of {look.steps} steps. p: paired t-test "
        f"against width. Dense: loss {dense['loss']:.4f}, FD {dense['distance']:.0f}."
    )
    head = ["budget", "way", "steps", "seeds", "blocks gone", "MACs", "params", "held-out loss", "p", "SSIM", "p"]
    return [intro, "", *table([*head, classifier(of).frechet], [line(store, *one, most) for one in known])]
