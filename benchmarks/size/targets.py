"""Latencies asked for and met: what the exported file was measured to take, and how well its pieces tell it.

    python benchmarks/bench.py targets                                   # both models, three targets, 20 plans
    python benchmarks/bench.py targets --models embedded --targets 0.6 --plans 0
    python benchmarks/bench.py targets --threads 2                       # timed by the wall: an idle machine alone

What `diffprune prune --dry-run` does with `latency_target`, with random weights where the model is a published size;
then random plans, of all depths: the sum of their measured pieces, what a plan is made by (fitted to some of them), and
that after the correction that a second attempt makes, each against the measured whole. Measured pieces are kept in
runs/, results in benchmarks/results/targets.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from diffusers import DDPMPipeline, DDPMScheduler
from shared.architectures import build
from shared.results import RESULTS, RUNS, Store, publish, some_of, some_shares, table

import diffprune_plugin as dp
from diffprune_plugin import demo
from diffprune_plugin.latency.costs import MOST, random_plans
from diffprune_plugin.latency.run import Timed, timed_on
from diffprune_plugin.planning.allocated import choices
from diffprune_plugin.planning.planner import material_of, share_of
from diffprune_plugin.pruning.loading import load_pipeline
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.optional import need_pyplot
from diffprune_plugin.workflow import prune

MODELS = ("embedded", "ddpm-cifar10-32")
PIECES = RUNS / "pieces.json"
SEED = 1  # of the random plans; those that the fit is made from have 0
Row = dict[str, Any]


def pipeline(name: str) -> Path:
    """The embedded model, or a published size with random weights."""
    if name == "embedded":
        return demo.MODEL
    place = RUNS / "random" / name
    if not place.exists():
        DDPMPipeline(build(name), DDPMScheduler()).save_pretrained(place)
    return place


def images(name: str) -> Path:
    """What the sensitivity is measured on: the digits, or noise."""
    if name == "embedded":
        return demo.CALIBRATION_IMAGES
    file = RUNS / "random" / "noise.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, images=np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8))
    return file


def config(name: str, threads: int, output: Path, **changes: Any) -> dp.PruningConfig:
    """By magnitude, so that nothing is calibrated; noise as data needs no more than a few samples."""
    values: dict[str, Any] = {"model": str(pipeline(name)), "data": str(images(name)), "output": str(output)}
    values |= {"importance": "magnitude", "compensate": False, "latency": {"threads": threads, "table": str(PIECES)}}
    if name != "embedded":
        values |= {"sensitivity_samples": 16}
    return dp.PruningConfig.make({**values, **changes})


def met(name: str, target: float, threads: int) -> Row:
    """What a plan for this share of the dense model's latency was measured to take."""
    with tempfile.TemporaryDirectory() as folder:
        asked = config(name, threads, Path(folder) / "pruned", latency_target=target)
        plan = prune(asked, dry_run=True, progress=False).plan
    latency = plan.latency
    assert latency is not None
    shares = {"macs": plan.macs[1] / plan.macs[0], "params": plan.params[1] / plan.params[0]}
    return {**shares, **latency.model_dump(mode="json", include={"predicted", "measured", "noise", "attempts"})}


def told(name: str, plans: int, threads: int) -> list[Row]:
    """Of random plans: the shares by the sum of pieces, by what plans are made by, and of the measured whole."""
    model = load_pipeline(pipeline(name)).unet
    with tempfile.TemporaryDirectory() as folder:
        asked = config(name, threads, Path(folder) / "pruned", latency_target=0.5)
        material = material_of(asked, model, "magnitude")
        with timed_on(asked, asked.latency, model, material, None, False) as on:
            widths = choices(material.items, on.options, MOST)
            dense = on.structures.pieces([of[min(of)] for of in widths])
            return [row_of(on, planned, dense) for planned in random_plans(widths, plans, SEED)]


def row_of(on: Timed, planned: Sequence[Any], dense: Sequence[Any]) -> Row:
    material, pieces = on.structures.material, on.structures.pieces(planned)
    on.table.measure([*dense, *pieces])
    column = share_of(material.items, material.costs, on.costs)([len(group.removed) for group in planned])
    measured = on.whole(on.structures.shrunk(planned)).share
    return {"pieces": on.table.total(pieces) / on.table.total(dense), "column": column, "measured": measured}


def corrected(rows: Sequence[Row]) -> list[float]:
    """Each prediction times what the nearest other plan was measured at over what was predicted of it."""
    found = []
    for row in rows:
        near = min(
            (other for other in rows if other is not row), key=lambda other: abs(other["column"] - row["column"])
        )
        found.append(row["column"] * near["measured"][0] / near["column"])
    return found


def errors(rows: Sequence[Row], found: Sequence[float]) -> str:
    """Mean and largest relative error."""
    off = [abs(share / row["measured"][0] - 1) for row, share in zip(rows, found, strict=True)]
    return f"{np.mean(off):.1%}, at most {max(off):.1%}"


def picture(known: dict[str, list[Row]], path: Path) -> None:
    """Predicted against measured, a panel a model."""
    pyplot = need_pyplot()
    figure, panels = pyplot.subplots(1, len(known), figsize=(5 * len(known), 4.5), layout="constrained", squeeze=False)
    for axes, (name, rows) in zip(panels[0], known.items(), strict=True):
        across = [row["measured"][0] for row in rows]
        ways = {
            "sum of pieces": [row["pieces"] for row in rows],
            "fitted, which plans are made by": [row["column"] for row in rows],
            "fitted and corrected": corrected(rows),
        }
        for marker, (way, found) in zip("x.+", ways.items(), strict=True):
            axes.plot(across, found, marker, label=way)
        ends = [min(across), max(across)]
        axes.plot(ends, ends, color="grey", linewidth=0.8)
        axes.set(title=name, xlabel="measured share of the dense latency", ylabel="predicted share")
        axes.legend()
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def lines(store: Store, threads: int) -> list[str]:
    """The tables as Markdown."""
    rows = []
    for key, row in sorted((key, row) for key, row in store.values.items() if key.startswith("target ")):
        _, name, target = key.split(" ")
        share, low, high = row["measured"]
        off = share / float(target) - 1
        cells = [name, target, f"{share:.3f} [{low:.3f}, {high:.3f}]", f"{off:+.1%}", str(row["attempts"])]
        noise = f"[{row['noise'][0]:.3f}, {row['noise'][1]:.3f}]"
        rows.append([*cells, f"{row['predicted']:.3f}", f"{row['macs']:.3f}", f"{row['params']:.3f}", noise])
    head = ["model", "asked", "measured, 95 % interval", "off", "plans", "predicted", "MACs", "params", "A/A"]
    found = [
        f"Shares of the dense model's, ONNX Runtime on a CPU, fp32, batch 1, {threads} thread.",
        "",
        *table(head, rows),
    ]
    plans = []
    for name, rows in random_rows(store).items():
        ways = [row["pieces"] for row in rows], [row["column"] for row in rows], corrected(rows)
        plans.append([name, str(len(rows)), *(errors(rows, way) for way in ways)])
    if plans:
        head = ["model", "random plans", "sum of pieces", "fitted, which plans are made by", "fitted and corrected"]
        found += ["", "Relative error of the predicted share, mean and largest:", "", *table(head, plans)]
    return found


def random_rows(store: Store) -> dict[str, list[Row]]:
    return {name: store.values[f"plans {name}"] for name in MODELS if f"plans {name}" in store.values}


def main(
    models: Annotated[str, typer.Option(**some_of(MODELS))] = ",".join(MODELS),
    targets: Annotated[str, typer.Option(**some_shares("of the latency"))] = "0.75,0.6,0.45",
    plans: Annotated[int, typer.Option(help="random ones, to see what is predicted; 0: none")] = 20,
    threads: int = 1,
) -> None:
    """Measure what is missing, one thing at a time, then print the tables."""
    store, names = Store("targets", [threads, SEED]), models.split(",")
    jobs = {f"target {n} {t}": partial(met, n, float(t), threads) for n in names for t in targets.split(",") if t}
    store.fill(jobs | ({f"plans {n}": partial(told, n, plans, threads) for n in names} if plans else {}), workers=1)
    if known := random_rows(store):
        picture(known, RESULTS / "targets.png")
    publish("targets", lines(store, threads))
