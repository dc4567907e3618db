"""Where channels go: the embedded model at the same MACs by one ratio and by allocation, compensated, nothing trained.

    python benchmarks/bench.py allocation                        # five seeds, two budgets, nine ways: hours
    python benchmarks/bench.py allocation --quick                # one seed, one budget, uniform and linear
    python benchmarks/bench.py allocation --speed                # and how fast ONNX Runtime runs those of seed 0
    python benchmarks/bench.py allocation --ways uniform,linear --seeds 2

Everything is what `diffprune prune` does with `macs_target` and `allocation` or `global_pruning`. Results are kept in
benchmarks/results/allocation.json; interrupted, it goes on where it was, and other ways, seeds and budgets add to it.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from shared.embedded import MODEL, Row, dense, measure, measure_dense
from shared.results import Seeds, Store, Workers, mean, p_text, paired_p, publish, some_of, some_shares, table
from shared.subject import DIGITS, Look, Subject

import diffprune_plugin as dp
from diffprune_plugin.export import measure as timed
from diffprune_plugin.export import to_onnx
from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.pruning.loading import load_pipeline
from diffprune_plugin.workflow import prune

BUDGETS = (0.46, 0.25)  # of the MACs
WAYS: dict[str, dict[str, Any]] = {
    "uniform": {"allocation": "uniform"},
    "global_pruning": {"allocation": "uniform", "global_pruning": True},
    "isomorphic": {"allocation": "uniform", "global_pruning": True, "isomorphic": True},
    "linear": {"allocation": "linear"},
    "linear depth": {"allocation": "linear", "depth": "auto"},
    "measured": {"allocation": "measured"},
    "linear output_error": {"allocation": "linear", "importance": "output_error"},
    "linear output_error to half": {"allocation": "linear", "importance": "output_error", "max_pruning_ratio": 0.5},
    "measured output_error": {"allocation": "measured", "importance": "output_error"},
}
LEAST = {"linear output_error to half": 0.26}  # of the MACs, that a way can reach
QUICK = "uniform,linear"
LOOK = Look(held_out=500, repeats=2, count=66, steps=20)
COLUMNS = {"macs": 3, "params": 3, "loss": 4, "ssim": 3, "distance": 0}
TESTED = ("loss", "ssim")
HEAD = ["budget", "way", "seeds", "MACs", "params", "held-out loss", "p", "SSIM", "p", "FD (digits_classifier)"]


def made(way: str, budget: float, seed: int, of: Subject = DIGITS, compensate: bool = True) -> Path:
    """Directory of a model at a share of its MACs; the calibration and the sensitivity are one of a seed."""
    name = f"allocation-{way.replace(' ', '-')}-{budget}-{seed}"
    output = of.work / "models" / (name if compensate else f"{name}-as-it-is")
    if not output.exists():
        values: dict[str, Any] = {"model": str(of.model), "output": str(output), "data": str(of.calibration)}
        values |= {"macs_target": budget, "seed": seed, "compensate": compensate, **WAYS[way]}
        values |= {key: str(output.parent / f"allocation-{key}-{seed}") for key in ("calibration", "sensitivity")}
        start = time.perf_counter()
        prune(dp.PruningConfig.make(values), progress=False)
        (output.parent / f"{output.name}.seconds").write_text(f"{time.perf_counter() - start:.1f}")
    return output


def measured(way: str, budget: float, seed: int) -> Row:
    """Shares of the MACs and parameters, and how good the model is."""
    output = made(way, budget, seed)
    plan = read_plan(output)
    shares = {"macs": plan.macs[1] / plan.macs[0], "params": plan.params[1] / plan.params[0]}
    return {**shares, **measure(load_pipeline(output), LOOK)}


def row(store: Store, budget: float, way: str, seeds: int) -> list[str]:
    """Means over the seeds that were measured, and paired tests against uniform over those that both have."""
    runs = {seed: run for seed in range(seeds) if (run := store.values.get(f"{way} {budget} {seed}"))}
    both = [(run, other) for seed, run in runs.items() if (other := store.values.get(f"uniform {budget} {seed}"))]
    cells = []
    for key, digits in COLUMNS.items():
        cells.append(mean([run[key] for run in runs.values()], digits))
        if key in TESTED:
            cells.append(p_text(paired_p([run[key] for run, _ in both], [other[key] for _, other in both])))
    return [f"{budget:.0%}", way, str(len(runs)), *cells]


def speed(store: Store, budget: float) -> list[str]:
    """ONNX Runtime on one thread: how much faster than dense the models of the first seed are, interleaved."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dense_file = Path(folder) / "dense.onnx"
        to_onnx(dense().unet, dense_file)
        for way in WAYS:
            if f"{way} {budget} 0" in store.values:
                file = Path(folder) / f"{way}.onnx"
                to_onnx(load_pipeline(made(way, budget, 0)).unet, file)
                result = timed(file, dense_file, provider="cpu", batches=[1], threads=1)
                ratio = next(ratio for ratio in result.ratios if ratio.name == "dense / pruned")
                rows.append([f"{budget:.0%}", way, f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"])
    intro = "One model each, compensated; ONNX Runtime, CPU, one thread, batch 1, interleaved with the dense model."
    return [intro, "", *table(["budget", "way", "faster than dense, 95 % interval"], rows)]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="one seed, one budget, uniform and linear")] = False,
    seeds: Seeds = 5,
    ways: Annotated[str, typer.Option(**some_of(WAYS))] = ",".join(WAYS),
    budgets: Annotated[str, typer.Option(**some_shares("of the MACs"))] = "0.46,0.25",
    speeds: Annotated[bool, typer.Option("--speed", help="time the first seed's models in ONNX Runtime too")] = False,
    workers: Workers = 2,
) -> None:
    """Measure what is missing, then print the table."""
    title = "allocation_quick" if quick else "allocation"
    seeds, ways, budgets = (1, QUICK, "0.46") if quick else (seeds, ways, budgets)
    store, shares = Store(title, [MODEL, str(LOOK)]), [float(share) for share in budgets.split(",")]
    places = itertools.product(range(seeds), shares, ways.split(","))
    possible = [(way, share, seed) for seed, share, way in places if share >= LEAST.get(way, 0)]
    jobs = {f"{way} {share} {seed}": partial(measured, way, share, seed) for way, share, seed in possible}
    first = {
        key: jobs[key] for key in (f"{ways.split(',')[0]} {shares[0]} {seed}" for seed in range(seeds)) if key in jobs
    }
    store.fill({"dense": partial(measure_dense, LOOK)} | first, workers)  # each makes the calibration of its seed
    store.fill(jobs, workers)
    of_dense = store.values["dense"]
    known = [(b, way) for b in BUDGETS for way in WAYS if f"{way} {b} 0" in store.values]
    intro = (
        "Mean and standard error over seeds. diff_taylor unless another criterion is named, compensated, not trained; "
        f"{LOOK.count} images of {LOOK.steps} DDIM steps. p: paired t-test against uniform. To half: max_pruning_ratio "
        f"0.5, which reaches no less than {LEAST['linear output_error to half']:.0%}. "
        f"Dense: loss {of_dense['loss']:.4f}, FD {of_dense['distance']:.0f}."
    )
    most = max(int(key.rpartition(" ")[2]) for key in store.values if key != "dense") + 1
    lines = [intro, "", *table(HEAD, [row(store, budget, way, most) for budget, way in known])]
    publish(title, lines)
    if speeds:
        publish(f"{title}_speed", speed(store, shares[0]))
