"""What a sensitivity says of a cut, and what the cut does: each width of each group by itself, estimated and tried.

    python benchmarks/bench.py sensitivity                          # digits: minutes
    python benchmarks/bench.py sensitivity --model emoji            # or dit, or sd3; after: make models

A quarter, a half and three quarters of each group's units, those that `output_error` ranks lowest: the linear estimate,
with the layers behind refitted or not, beside the mean squared change of the output on fresh noisy samples. Results are
kept in benchmarks/results/sensitivity_MODEL.json; interrupted, it goes on where it was.
"""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.stats import spearmanr
from shared.embedded import dense, sensitivity
from shared.results import RESULTS, Seeds, Store, Workers, mean, one_of, over, publish, table
from shared.subject import SUBJECTS, TRANSFORMERS, Subject

import diffprune_plugin as dp
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.diffusion.schedulers import training_scheduler
from diffprune_plugin.planning.allocated import choices
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.planner import material_of
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.loading import model_of
from diffprune_plugin.pruning.removal import shrink_
from diffprune_plugin.sensitivity.linear import SAMPLES
from diffprune_plugin.sensitivity.trials import Trials
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.optional import need_pyplot

EVERY = SUBJECTS | TRANSFORMERS
SHARES = (0.25, 0.5, 0.75)  # of a group's units
STATES = ("refitted", "not refitted")
Cut = dict[str, Any]


def measured(seed: int, of: Subject) -> dict[str, Any]:
    """The cuts, estimated and tried, and what each way took in seconds."""
    start = time.perf_counter()
    found = sensitivity(seed, SAMPLES, of)
    seconds = {"linear": time.perf_counter() - start}
    model, criterion = model_of(dense(of)), dp.importance("output_error", sensitivity=found)
    adapter, options = find_adapter(model), PlanOptions(pruning_ratio=0.0)
    items, scheduler = material_of(options, model, criterion, adapter).items, training_scheduler(dense(of).scheduler)
    data = fitting(load_samples(of.calibration), model, adapter, scheduler)
    said = dict(zip(STATES, (found, found.unrefitted()), strict=True))
    start, cuts = time.perf_counter(), list[Cut]()
    trials = Trials.of(model, scheduler, data, adapter, SAMPLES, seed)
    for item, plans in zip(items, choices(items, options, 1.0), strict=True):
        for share in SHARES if not item.heads and len(plans) > 1 else ():
            units = plans[min(plans, key=lambda count: abs(count - share * item.group.units))].removed
            root = item.group.root
            estimates = {state: each.error(root, units) for state, each in said.items()}
            cuts.append({"root": root, "share": share, "linear": estimates, "tried": tried(trials, root, units)})
    return {"cuts": cuts, "power": found.power, "seconds": seconds | {"tried": time.perf_counter() - start}}


def tried(trials: Trials, root: str, units: tuple[int, ...]) -> dict[str, float]:
    """The error of the output without these units, the layers around refitted or not."""
    small, refitted = (
        copy.deepcopy(trials.dense),
        trials.refitted(trials.dense, {root: units}, {}, trials.touched(root)),
    )
    shrink_(small, trials.gone({root: units}), {}, trials.adapter)
    return dict(zip(STATES, (trials.look.error(refitted), trials.look.error(small)), strict=True))


def pairs(run: dict[str, Any], state: str, share: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Estimated and tried errors, shape (cuts,) each, of one share or of all."""
    cuts = [cut for cut in run["cuts"] if share in (None, cut["share"])]
    return np.array([cut["linear"][state] for cut in cuts]), np.array([cut["tried"][state] for cut in cuts])


def rows(runs: list[dict[str, Any]]) -> list[list[str]]:
    """A row a state and share: rank correlation, and by how much the estimate is too low, over seeds."""
    found = []
    for state in STATES:
        for share in (None, *SHARES):
            both = [pairs(run, state, share) for run in runs]
            ranks = [float(spearmanr(*pair).statistic) for pair in both]
            times = [float(np.median(tried_ / np.maximum(linear, 1e-300))) for linear, tried_ in both]
            cells = ["all" if share is None else f"{share:.0%}", str(len(both[0][0])), mean(ranks, 3), mean(times, 2)]
            found.append([state, *cells])
    return found


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Tried against estimated error, a point a cut, coloured by share."""
    pyplot = need_pyplot()
    figure, axes = pyplot.subplots(1, len(STATES), figsize=(9, 4.2), layout="constrained", sharex=True, sharey=True)
    for panel, state in zip(axes, STATES, strict=True):
        for share in SHARES:
            linear, tried_ = np.concatenate([pairs(run, state, share) for run in runs], 1) / runs[0]["power"]
            panel.loglog(linear, tried_, ".", label=f"{share:.0%} of a group gone")
        ends = np.array(panel.get_xlim())
        panel.plot(ends, ends, color="grey", lw=0.8)
        panel.set(title=state, xlabel="linear estimate, share of the output's power", ylabel="tried")
    axes[0].legend(fontsize=8)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    pyplot.close(figure)


def main(
    model: Annotated[str, typer.Option(**one_of(EVERY))] = "digits",
    seeds: Seeds = 3,
    workers: Workers = 2,
) -> None:
    """Measure what is missing, then print the table and draw the plot."""
    of, title = EVERY[model], f"sensitivity_{model}"
    store = Store(title, [str(of), SHARES, SAMPLES])
    store.fill({str(seed): partial(measured, seed, of) for seed in range(seeds)}, workers)
    runs = [store.values[str(seed)] for seed in range(seeds)]
    plot(runs, RESULTS / f"{title}.png")
    seconds = {way: mean([run["seconds"][way] for run in runs], 0) for way in runs[0]["seconds"]}
    intro = (
        f"{over(seeds)}; {len(runs[0]['cuts'])} cuts, each of one group alone. Rank correlation: Spearman's, of the "
        "linear estimate with the error that was tried. Tried over estimated: the median. Linear took "
        f"{seconds['linear']} s for all, to try them {seconds['tried']} s, one thread each."
    )
    publish(
        title,
        [intro, "", *table(["layers behind", "gone", "cuts", "rank correlation", "tried over estimated"], rows(runs))],
    )
