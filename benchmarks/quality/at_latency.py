"""What is best at the same measured latency: one ratio, the budget spent by MACs, or by latency.

    python benchmarks/bench.py at-latency                              # the digits, 0.6 of the latency, five seeds
    python benchmarks/bench.py at-latency --model emoji                # after: make models
    python benchmarks/bench.py at-latency --target 0.45 --seeds 2

Each way gets the plan whose exported file was measured within 3 % of the target (ONNX Runtime, CPU, one thread), of at
most three: `allocation: uniform` and `linear` with `latency_target` as `diffprune prune` makes them, and `linear` with
the `macs_target` that leads there. All are compensated and none is trained. Results are kept in
benchmarks/results/at_latency_MODEL.json; other targets and seeds add to it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from shared.embedded import Row, measure, measure_dense
from shared.results import RESULTS, RUNS, Seeds, Store, mean, one_of, p_text, paired_p, publish, table
from shared.subject import DIGITS, SUBJECTS, Look, Subject, samples_of

import diffprune_plugin as dp
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.latency.run import timed_on
from diffprune_plugin.latency.target import Meeting
from diffprune_plugin.planning.allocated import LatencyCosts
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.planning.planner import material_of, plan_from, share_of
from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.pruning.loading import load_pipeline
from diffprune_plugin.sensitivity.sensitivity import Sensitivity
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.optional import need_pyplot
from diffprune_plugin.workflow import prune

UNIFORM, MACS, LATENCY = "uniform", "by MACs", "by latency"
COLOURS = {UNIFORM: "tab:grey", MACS: "tab:blue", LATENCY: "tab:orange"}
MOST = Look(held_out=500, repeats=2, count=66, steps=20)
HALVINGS = 12  # of the macs_target that is looked for


def look_at(of: Subject) -> Look:
    """As many held-out images as there are."""
    return replace(MOST, held_out=min(MOST.held_out, len(samples_of(of.held_out))))


class AsMacs(Meeting):
    """Meets a latency by plans that know nothing of it."""

    def slower(self, plan: PruningPlan) -> dict[str, int]:
        return {}


def settings(of: Subject, seed: int, output: Path) -> dict[str, Any]:
    """What all ways share: the calibration and the sensitivity of the seed, and the measured pieces."""
    values: dict[str, Any] = {"model": str(of.model), "output": str(output), "data": str(of.calibration), "seed": seed}
    values |= {key: str(output.parent / f"allocation-{key}-{seed}") for key in ("calibration", "sensitivity")}
    return {**values, "latency": {"table": str(RUNS / "pieces.json")}}


def made(way: str, target: float, seed: int, of: Subject) -> Path:
    """Directory of the pruned and compensated model."""
    output = of.work / "models" / f"at-latency-{way.replace(' ', '-')}-{target}-{seed}"
    if not output.exists():
        values = settings(of, seed, output)
        if way == MACS:  # the plan by latency was made before, and with it the calibration and the sensitivity
            plan = by_macs(dp.PruningConfig.make({**values, "latency_target": target, "allocation": "linear"}))
            plan.write(output.parent / f"{output.name}.plan.json")
            changes: dict[str, Any] = {"pruning_ratio": 0.0, "pruning_ratio_dict": plan.ratios()}
        else:
            changes = {"latency_target": target, "allocation": "uniform" if way == UNIFORM else "linear"}
        prune(dp.PruningConfig.make(values | changes), progress=False)
    return output


def by_macs(config: dp.PruningConfig) -> PruningPlan:
    """The plan of the least error at the share of the MACs that takes the latency of the config."""
    model = load_pipeline(Path(config.model)).unet
    criterion, sensitivity = dp.importance("diff_taylor"), Sensitivity.load(Path(str(config.sensitivity)))
    criterion.calibration = Calibration.load(Path(str(config.calibration)))  # type: ignore[attr-defined]
    material = material_of(config, model, criterion)

    def spent(options: PlanOptions, share: float) -> PruningPlan:
        asked = options.model_copy(update={"latency_target": None, "macs_target": share})
        return plan_from(material, asked, sensitivity=sensitivity)

    def plan(options: PlanOptions, costs: LatencyCosts) -> PruningPlan:
        took, low, high = share_of(material.items, material.costs, costs), 0.2, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            counts = [len(group.removed) for group in spent(options, middle).groups]
            low, high = (low, middle) if took(counts) > (options.latency_target or 0) else (middle, high)
        return spent(options, low)

    with timed_on(config, config.latency, model, material, None, False) as on:
        return AsMacs(on.options, on.structures, on.table, on.costs, on.whole, plan).run()


def measured(way: str, target: float, seed: int, of: Subject) -> Row:
    """Measured share of the latency, shares of the MACs and parameters, and how good the model is."""
    output = made(way, target, seed, of)
    plan, told = read_plan(output), output.parent / f"{output.name}.plan.json"
    latency = (PruningPlan.read(told) if told.exists() else plan).latency
    assert latency is not None
    shares = {"macs": plan.macs[1] / plan.macs[0], "params": plan.params[1] / plan.params[0]}
    return {"latency": latency.measured[0], **shares, **measure(load_pipeline(output), look_at(of), of)}


def rows(store: Store, targets: list[float], seeds: int) -> list[list[str]]:
    """A row a target and way: means, and the excess over the dense loss against that of the other ways."""
    dense, found = store.values["dense"]["loss"], []
    for target in targets:
        runs = {way: [store.values[f"{way} {target} {seed}"] for seed in range(seeds)] for way in COLOURS}
        excess = {way: [run["loss"] - dense for run in of] for way, of in runs.items()}
        for way, of in runs.items():
            cells = [f"{target:g}", way, *(mean([run[key] for run in of], 3) for key in ("latency", "macs", "params"))]
            cells += [mean(excess[way], 4), mean([run["ssim"] for run in of], 3)]
            cells += [against(excess[way], excess[other]) for other in (UNIFORM, MACS)]
            found.append(cells)
    return found


def against(values: list[float], others: list[float]) -> str:
    """How much more or less the first are, with p; nothing where they are the same."""
    p = p_text(paired_p(values, others))
    return "" if values == others else f"{sum(values) / sum(others) - 1:+.0%}" + (f" (p {p})" if p else "")


def picture(store: Store, path: Path) -> None:
    """Loss against measured latency, a point a seed."""
    pyplot = need_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for way, colour in COLOURS.items():
        of = [run for key, run in store.values.items() if key.startswith(f"{way} ")]
        axes.plot([run["latency"] for run in of], [run["loss"] for run in of], ".", color=colour, label=way)
    axes.axhline(store.values["dense"]["loss"], color="black", linewidth=0.8, label="dense")
    axes.set(xlabel="measured share of the dense latency", ylabel="held-out loss")
    axes.legend()
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def main(
    model: Annotated[str, typer.Option(**one_of(SUBJECTS))] = DIGITS.name,
    seeds: Seeds = 5,
    target: Annotated[list[float], typer.Option(help="share of the dense latency; may be repeated")] = [0.6],  # noqa: B006
    workers: Annotated[int, typer.Option(help="processes, of one thread each; timed by the thread's own clock")] = 1,
) -> None:
    """Measure what is missing, then print the table."""
    of = SUBJECTS[model]
    title = f"at_latency_{of.name}"
    look = look_at(of)
    store = Store(title, [str(of), str(look)])
    store.fill({"dense": partial(measure_dense, look, of)}, workers)
    for way in (LATENCY, UNIFORM, MACS):  # the first makes the calibration and the sensitivity of its seed
        store.fill({f"{way} {t} {s}": partial(measured, way, t, s, of) for t in target for s in range(seeds)}, workers)
    picture(store, RESULTS / f"{title}.png")
    intro = (
        f"Mean and standard error over {seeds} seeds; diff_taylor, compensated, not trained; latency: share of the "
        "dense model's, ONNX Runtime on a CPU, one thread, batch 1. Excess: held-out loss above the dense model's "
        f"{store.values['dense']['loss']:.4f}; in brackets p of a paired t-test."
    )
    head = ["asked", "spent", "latency", "MACs", "params", "excess", "SSIM", "excess to uniform", "to by MACs"]
    publish(title, [intro, "", *table(head, rows(store, target, seeds))])
