"""Which criterion: the embedded model right after removal, and after 10 % of the dense model's training steps.

    python benchmarks/criteria.py            # about an hour on two cores
    python benchmarks/criteria.py --quick    # one ratio, two seeds, 30 steps

Nothing is repaired before the fine-tune, which is the paper's protocol. Every criterion that needs gradients gets about
as many passes; the presets of the authors run their loop on every twentieth timestep for that. Results are kept in
benchmarks/results/criteria.json; interrupted, it goes on where it was.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import RESULTS, Store, mean, over, p_text, paired_p, publish, standard_error, table
from embedded import (
    DENSE_STEPS,
    HALF,
    MODEL,
    Look,
    Row,
    agreement,
    calibrated,
    calibration,
    dense,
    from_scratch,
    measure,
    measure_dense,
    pruned,
    tuned,
)

import diffprune_plugin as dp
from diffprune_plugin.checkpoint import load_pipeline, read_plan
from diffprune_plugin.files import new_file
from diffprune_plugin.report import pyplot_or_missing

RATIOS = (HALF, 0.5)
LOOPS = ("reference", "fresh")  # samplings of the authors
# Name in the table: criterion, options of the score, what its calibration sums (None: needs no gradients).
CRITERIA: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "random": ("random", {}, None),
    "magnitude": ("magnitude", {}, None),
    "taylor": ("diff_taylor", {}, {"threshold": 0.0}),
    "diff_taylor, paper": ("diff_taylor", {}, {"threshold": 0.05}),
    "diff_taylor, ddpm_exp": ("diff_taylor", {"preset": "ddpm_exp"}, {"sampling": "reference"}),
    "diff_taylor, diffusers": ("diff_taylor", {"preset": "diffusers"}, {"sampling": "reference", "include_last": True}),
    "diff_taylor, ldm": ("diff_taylor", {"preset": "ldm"}, {"sampling": "fresh", "threshold": 0.1}),
}
PAPER, SCRATCH = "diff_taylor, paper", "from scratch"
FINE = {"batch_size": 2, "learning_rate": 5e-4, "ema_decay": 0.99}

SHORT = Look(repeats=1, count=80, steps=10)


@dataclass(frozen=True)
class Budget:
    """Gradient samples of the default sampling, those of its loss curve at each of 100 timesteps; timesteps of the
    authors' loops; optimizer steps of the fine-tune."""

    samples: int = 512
    curve_samples: int = 4
    timesteps: int = 50
    steps: int = DENSE_STEPS // 10
    look: Look = SHORT

    def place(self, *parts: Any) -> str:
        """Name of a directory of this budget."""
        return "-".join(map(str, (*parts, self.samples))).replace(", ", "-").replace(" ", "-")


FULL = Budget()
QUICK = Budget(64, 1, 10, DENSE_STEPS // 300, Look(held_out=100, repeats=1, count=66, steps=5))


def sweep_of(name: str, budget: Budget) -> dict[str, Any] | None:
    """Settings of a criterion's calibration; None if it needs none."""
    sweep = CRITERIA[name][2]
    if sweep is None:
        return None
    if sweep.get("sampling") in LOOPS:
        return {**sweep, "batch_size": 16, "timesteps": budget.timesteps}
    return {**sweep, "samples": budget.samples, "curve_samples": budget.curve_samples}


def plan_of(name: str, ratio: float, seed: int, budget: Budget) -> dp.PruningPlan:
    """The channels that a criterion chooses with this seed."""
    criterion, options, _ = CRITERIA[name]
    sweep = sweep_of(name, budget)
    if sweep is not None:
        options = {**options, "calibration": calibration(seed, **sweep)}
    elif criterion == "random":
        options = {"seed": seed}
    return dp.make_plan(dense().unet, dp.importance(criterion, **options), pruning_ratio=ratio)


def start_of(name: str, ratio: float, seed: int, budget: Budget) -> Path:
    """The model before its training."""
    if name == SCRATCH:
        return from_scratch(f"scratch-{ratio}-{seed}", start_of("magnitude", ratio, 0, budget), seed)
    seed = 0 if name == "magnitude" else seed
    return pruned(budget.place(name, ratio, seed), plan_of(name, ratio, seed, budget))


def after_removal(name: str, ratio: float, seed: int, budget: Budget) -> Row:
    return measure(load_pipeline(start_of(name, ratio, seed, budget)), budget.look)


def end_of(name: str, ratio: float, seed: int, budget: Budget) -> Path:
    """The model after its training, which sees the same images, timesteps and noise whatever the criterion."""
    start = start_of(name, ratio, seed, budget)
    return tuned(budget.place(name, ratio, seed, "tuned", budget.steps), start, seed, steps=budget.steps, **FINE)


def after_tuning(name: str, ratio: float, seed: int, budget: Budget) -> Row:
    return measure(load_pipeline(end_of(name, ratio, seed, budget)), budget.look)


def agreements(name: str, ratio: float, seeds: int, budget: Budget) -> list[float]:
    """Of every pair of seeds."""
    plans = [plan_of(name, ratio, seed, budget) for seed in range(seeds)]
    return [agreement(first, second) for first, second in itertools.combinations(plans, 2)]


class Cells:
    """The results by criterion, ratio and state, one value a seed."""

    def __init__(self, store: Store, seeds: int, budget: Budget) -> None:
        self.store, self.seeds, self.budget, self.steps = store, seeds, budget, budget.steps

    def of(self, name: str, ratio: float, steps: int, key: str) -> list[float]:
        seeds = range(1 if name == "magnitude" and not steps else self.seeds)
        return [self.store.values[f"{name} {ratio} {steps} {seed}"][key] for seed in seeds]

    def row(self, name: str, ratio: float) -> list[str]:
        """A line of the table of one ratio."""
        tuned_loss = self.of(name, ratio, self.steps, "loss")
        cells = [name]
        for key, digits in (("loss", 4), ("ssim", 3), ("distance", 0)):
            before = "" if name == SCRATCH else mean(self.of(name, ratio, 0, key), digits)
            cells += [before, mean(self.of(name, ratio, self.steps, key), digits)]
        p = paired_p(tuned_loss, self.of(PAPER, ratio, self.steps, "loss"))
        cells.append(p_text(p))
        pairs = self.store.values.get(f"{name} {ratio} agreement", [])
        return [*cells, f"{np.mean(pairs):.0%}" if pairs else ""]

    def lines(self, ratios: tuple[float, ...]) -> list[str]:
        before, steps, look = self.store.values["dense"], self.steps, self.budget.look
        lines = [
            f"{over(self.seeds)} of calibration and training. {steps} steps of batch "
            f"{FINE['batch_size']} ({steps / DENSE_STEPS:.1%} of the dense model's steps, which had batches of 32), "
            f"nothing repaired before. SSIM and FD (digits_classifier): {look.count} images, {look.steps} DDIM steps. "
            "p: paired t-test of the loss after the steps against diff_taylor, paper. Agreement: share of the removed "
            f"channels that two seeds have in common. Dense: loss {before['loss']:.4f}, FD {before['distance']:.0f}.",
        ]
        head = ["loss, 0 steps", f"{steps} steps", "SSIM, 0 steps", f"{steps} steps", "FD, 0 steps", f"{steps} steps"]
        for ratio in ratios:
            macs = read_plan(start_of("magnitude", ratio, 0, self.budget)).macs
            lines += ["", f"Ratio {ratio}, {macs[1] / macs[0]:.0%} of the MACs:", ""]
            rows = [self.row(name, ratio) for name in (*CRITERIA, SCRATCH)]
            lines += table(["criterion", *head, "p", "agreement"], rows)
        return lines

    def plot(self, ratios: tuple[float, ...], path: Path) -> None:
        """Loss and SSIM before and after the steps, each with its standard error, one column a ratio."""
        pyplot = pyplot_or_missing()
        names = [*CRITERIA, SCRATCH]
        figure, axes = pyplot.subplots(
            2, len(ratios), figsize=(5.5 * len(ratios), 7), sharex=True, layout="constrained", squeeze=False
        )
        for column, ratio in enumerate(ratios):
            for line, (key, label) in enumerate((("loss", "held-out loss"), ("ssim", "SSIM to the dense images"))):
                panel = axes[line][column]
                for steps, colour in ((0, "tab:red"), (self.steps, "tab:blue")):
                    places = [i for i, name in enumerate(names) if steps or name != SCRATCH]
                    values = [self.of(names[i], ratio, steps, key) for i in places]
                    means, errors = [np.mean(v) for v in values], [standard_error(v) for v in values]
                    panel.errorbar(places, means, errors, fmt="o", color=colour, capsize=3, label=f"{steps} steps")
                if key == "loss":
                    panel.axhline(self.store.values["dense"]["loss"], color="grey", ls=":", label="dense")
                    panel.set(yscale="log", title=f"pruning_ratio {ratio}")
                panel.set_ylabel(label)
                panel.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
                panel.legend(fontsize=8)
        with new_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=100)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="one ratio, two seeds, 30 steps")] = False,
    seeds: int = 5,
    workers: Annotated[int, typer.Option(help="processes, of one thread each")] = 2,
) -> None:
    """Measure what is missing, then print the tables and draw the plot."""
    seeds, budget, ratios = (2, QUICK, RATIOS[1:]) if quick else (seeds, FULL, RATIOS)
    name, steps = "criteria" + ("_quick" if quick else ""), budget.steps
    store = Store(name, [MODEL, list(CRITERIA.items()), FINE, str(budget)])
    sweeps = {label: sweep for label in CRITERIA if (sweep := sweep_of(label, budget)) is not None}
    store.fill(
        {"dense": partial(measure_dense, budget.look)}
        | {f"{label} calibration {s}": partial(calibrated, s, w) for label, w in sweeps.items() for s in range(seeds)},
        workers,
    )
    cells = list(itertools.product(CRITERIA, ratios, range(seeds)))
    first = {
        f"{n} {r} 0 {s}": partial(after_removal, n, r, s, budget) for n, r, s in cells if n != "magnitude" or s == 0
    }
    first |= {f"{n} {r} agreement": partial(agreements, n, r, seeds, budget) for n in sweeps for r in ratios}
    store.fill(first, workers)
    cells += itertools.product([SCRATCH], ratios, range(seeds))
    store.fill({f"{n} {r} {steps} {s}": partial(after_tuning, n, r, s, budget) for n, r, s in cells}, workers)
    results = Cells(store, seeds, budget)
    results.plot(ratios, RESULTS / f"{name}.png")
    publish(name, results.lines(ratios))


if __name__ == "__main__":
    typer.run(main)
