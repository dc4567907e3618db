"""Which criterion: the embedded model right after removal, and after 10 % of the dense model's training steps.

    python benchmarks/bench.py criteria            # a part of make bench
    python benchmarks/bench.py criteria --quick    # one ratio, two seeds, 30 steps

Nothing is repaired before the fine-tune, which is the paper's protocol. Every criterion that needs gradients gets about
as many passes; the presets of the authors run their loop on every twentieth timestep for that. Results are kept in
benchmarks/results/criteria.json; interrupted, it goes on where it was.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from shared.embedded import (
    DENSE_STEPS,
    HALF,
    Row,
    agreement,
    calibrated,
    calibration,
    dense,
    from_scratch,
    measure,
    measure_dense,
    pruned,
    sensitivity,
    tuned,
)
from shared.results import (
    RESULTS,
    Seeds,
    Store,
    Workers,
    holm,
    mean,
    over,
    p_text,
    paired_p,
    publish,
    standard_error,
    table,
)
from shared.subject import DIGITS, Look, Subject

import diffprune_plugin as dp
from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.pruning.loading import load_pipeline
from diffprune_plugin.sensitivity.linear import PROBES
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.optional import need_pyplot

RATIOS = (HALF, 0.5)
LOOPS = ("reference", "fresh")  # samplings of the authors
ALL = {"threshold": 0.0}  # every timestep counts
# Criterion, options of the score, what its calibration sums (None: needs no gradients).
Entry = tuple[str, dict[str, Any], dict[str, Any] | None]
# By the name in the table.
CRITERIA: dict[str, Entry] = {
    "random": ("random", {}, None),
    "magnitude": ("magnitude", {}, None),
    "taylor": ("diff_taylor", {}, ALL),
    "diff_taylor, paper": ("diff_taylor", {}, {"threshold": 0.05}),
    "diff_taylor, ddpm_exp": ("diff_taylor", {"preset": "ddpm_exp"}, {"sampling": "reference"}),
    "diff_taylor, diffusers": ("diff_taylor", {"preset": "diffusers"}, {"sampling": "reference", "include_last": True}),
    "diff_taylor, ldm": ("diff_taylor", {"preset": "ldm"}, {"sampling": "fresh", "threshold": 0.1}),
}
# The further rows of policies: other sums over timesteps, and other weights of theirs.
FURTHER: dict[str, Entry] = {
    "taylor_absolute": ("taylor_absolute", {}, {**ALL, "accumulate": "absolute"}),
    "fisher": ("fisher", {}, {**ALL, "accumulate": "square"}),
    "fisher, single samples": ("fisher", {}, {**ALL, "accumulate": "square", "micro_batch": 1}),
    "fisher, threshold 0.05": ("fisher", {"threshold": 0.05}, {"threshold": 0.05, "accumulate": "square"}),
    "taylor, log_decrease": ("diff_taylor", {}, {**ALL, "timestep_weights": "log_decrease"}),
    "output_error": ("output_error", {}, None),
    "taylor, min_snr": ("diff_taylor", {}, {**ALL, "timestep_weights": "min_snr"}),
}
# Rows of thresholds, beside "taylor", which is 0, and "diff_taylor, paper", which is 0.05.
THRESHOLDS: dict[str, Entry] = {
    f"diff_taylor, {threshold}": ("diff_taylor", {}, {"threshold": threshold}) for threshold in (0.01, 0.02, 0.1, 0.2)
}
EVERY = CRITERIA | FURTHER | THRESHOLDS
PAPER, SCRATCH = "diff_taylor, paper", "from scratch"
FINE = {"learning_rate": 5e-4, "ema_decay": 0.99}

SHORT = Look(held_out=250, repeats=1, count=66, steps=8)


@dataclass(frozen=True)
class Budget:
    """Gradient samples of the default sampling, those of its loss curve at each of 100 timesteps; timesteps of the
    authors' loops; optimizer steps of the fine-tune, images in each."""

    samples: int = 512
    curve_samples: int = 4
    timesteps: int = 50
    steps: int = DENSE_STEPS // 10
    batch_size: int = 1
    look: Look = SHORT
    of: Subject = DIGITS

    def place(self, *parts: Any) -> str:
        """Name of a directory of this budget."""
        return "-".join(map(str, (*parts, self.samples))).replace(", ", "-").replace(" ", "-")


FULL = Budget()
QUICK = Budget(64, 1, 10, DENSE_STEPS // 300, look=Look(held_out=100, repeats=1, count=66, steps=5))


def sweep_of(name: str, budget: Budget) -> dict[str, Any] | None:
    """Settings of a criterion's calibration; None if it needs none."""
    sweep = EVERY[name][2]
    if sweep is None:
        return None
    if sweep.get("sampling") in LOOPS:
        return {**sweep, "batch_size": 16, "timesteps": budget.timesteps}
    return {**sweep, "samples": budget.samples, "curve_samples": budget.curve_samples}


def plan_of(name: str, ratio: float, seed: int, budget: Budget) -> dp.PruningPlan:
    """The channels that a criterion chooses with this seed."""
    criterion, options, _ = EVERY[name]
    sweep = sweep_of(name, budget)
    if sweep is not None:
        options = {**options, "calibration": calibration(seed, of=budget.of, **sweep)}
    elif criterion == "output_error":
        options = {"sensitivity": sensitivity(seed, budget.samples // PROBES, budget.of)}
    elif criterion == "random":
        options = {"seed": seed}
    return dp.make_plan(dense(budget.of).unet, dp.importance(criterion, **options), pruning_ratio=ratio)


def start_of(name: str, ratio: float, seed: int, budget: Budget) -> Path:
    """The model before its training."""
    if name == SCRATCH:
        return from_scratch(f"scratch-{ratio}-{seed}", start_of("magnitude", ratio, 0, budget), seed, budget.of)
    seed = 0 if name == "magnitude" else seed
    return pruned(budget.place(name, ratio, seed), plan_of(name, ratio, seed, budget), budget.of)


def after_removal(name: str, ratio: float, seed: int, budget: Budget) -> Row:
    return measure(load_pipeline(start_of(name, ratio, seed, budget)), budget.look, budget.of)


def trained(start: Path, seed: int, budget: Budget) -> Path:
    """The model of a directory after its training; a seed gives all of them the same images, timesteps and noise."""
    place = f"{start.name}-tuned-{seed}-{budget.steps}-of-{budget.batch_size}"
    return tuned(place, start, seed, budget.of, steps=budget.steps, batch_size=budget.batch_size, **FINE)


def after_tuning(name: str, ratio: float, seed: int, budget: Budget) -> Row:
    return measure(load_pipeline(trained(start_of(name, ratio, seed, budget), seed, budget)), budget.look, budget.of)


def agreements(name: str, ratio: float, seeds: int, budget: Budget) -> list[float]:
    """Of every pair of seeds."""
    plans = [plan_of(name, ratio, seed, budget) for seed in range(seeds)]
    return [agreement(first, second) for first, second in itertools.combinations(plans, 2)]


class Cells:
    """The results by criterion, ratio and state, one value a seed."""

    def __init__(self, store: Store, names: Sequence[str], ratios: Sequence[float], seeds: int, budget: Budget) -> None:
        self.store, self.names, self.ratios, self.seeds = store, names, ratios, seeds
        self.budget, self.steps = budget, budget.steps

    def fill(self, workers: int) -> None:
        """Measure what is missing: calibrations first, since the criteria and the ratios share them."""
        chosen = [name for name in self.names if name != SCRATCH]
        sweeps = {name: sweep for name in chosen if (sweep := sweep_of(name, self.budget)) is not None}
        seeds, budget = range(self.seeds), self.budget
        made = {
            f"{n} calibration {s}": partial(calibrated, s, sweep, budget.of)
            for n, sweep in sweeps.items()
            for s in seeds
        }
        self.store.fill({"dense": partial(measure_dense, budget.look, budget.of)} | made, workers)
        cells = list(itertools.product(chosen, self.ratios, seeds))
        first = {
            f"{n} {r} 0 {s}": partial(after_removal, n, r, s, budget) for n, r, s in cells if n != "magnitude" or s == 0
        }
        pairs = {
            f"{n} {r} agreement": partial(agreements, n, r, self.seeds, budget) for n in sweeps for r in self.ratios
        }
        self.store.fill(first | pairs, workers)
        cells = itertools.product(self.names, self.ratios, seeds)
        last = {f"{n} {r} {self.steps} {s}": partial(after_tuning, n, r, s, budget) for n, r, s in cells}
        self.store.fill(last, workers)

    def of(self, name: str, ratio: float, steps: int, key: str) -> list[float]:
        seeds = range(1 if name == "magnitude" and not steps else self.seeds)
        return [self.store.values[f"{name} {ratio} {steps} {seed}"][key] for seed in seeds]

    def tests(self) -> dict[tuple[str, float], float]:
        """By criterion and ratio the p of a paired test of the loss after the steps, by Holm for all of them."""
        places = [(name, ratio) for ratio in self.ratios for name in self.names if name != PAPER]
        values = [paired_p(*(self.of(n, ratio, self.steps, "loss") for n in (name, PAPER))) for name, ratio in places]
        return defaultdict(lambda: math.nan, zip(places, holm(values), strict=True))

    def row(self, name: str, ratio: float) -> list[str]:
        """A line of the table of one ratio."""
        cells = [name]
        for key, digits in (("loss", 4), ("ssim", 3), ("distance", 0)):
            before = "" if name == SCRATCH else mean(self.of(name, ratio, 0, key), digits)
            cells += [before, mean(self.of(name, ratio, self.steps, key), digits)]
        cells.append(p_text(self.tests()[name, ratio]))
        pairs = self.store.values.get(f"{name} {ratio} agreement", [])
        return [*cells, f"{np.mean(pairs):.0%}" if pairs else ""]

    def lines(self) -> list[str]:
        """The tables as Markdown, one a ratio."""
        before, steps, look = self.store.values["dense"], self.steps, self.budget.look
        of = self.budget.of
        lines = [
            f"{over(self.seeds)} of calibration and training. {steps} steps of batch {self.budget.batch_size} "
            f"({steps / of.steps:.1%} of the dense model's steps, which had batches of {of.training['batch_size']}), "
            f"nothing repaired before. SSIM and FD ({of.features.stem}): {look.count} images, {look.steps} DDIM steps. "
            f"p: paired t-test of the loss after the steps against {PAPER}, by Holm for all rows together. Agreement: "
            f"share of the removed channels that two seeds have in common. Dense: loss {before['loss']:.4f}, FD "
            f"{before['distance']:.0f}.",
        ]
        head = [f"{what}, {count} steps" for what in ("loss", "SSIM", "FD") for count in (0, steps)]
        for ratio in self.ratios:
            macs = read_plan(start_of("magnitude", ratio, 0, self.budget)).macs
            lines += ["", f"Ratio {ratio}, {macs[1] / macs[0]:.0%} of the MACs:", ""]
            rows = [self.row(name, ratio) for name in self.names]
            lines += table(["criterion", *head, "p", "agreement"], rows)
        return lines

    def plot(self, path: Path) -> None:
        """Loss and SSIM before and after the steps, each with its standard error, one column a ratio."""
        pyplot = need_pyplot()
        figure, axes = pyplot.subplots(
            2, len(self.ratios), figsize=(5.5 * len(self.ratios), 7), sharex=True, layout="constrained", squeeze=False
        )
        for column, ratio in enumerate(self.ratios):
            for line, (key, label) in enumerate((("loss", "held-out loss"), ("ssim", "SSIM to the dense images"))):
                panel = axes[line][column]
                for steps, colour in ((0, "tab:red"), (self.steps, "tab:blue")):
                    places = [i for i, name in enumerate(self.names) if steps or name != SCRATCH]
                    values = [self.of(self.names[i], ratio, steps, key) for i in places]
                    means, errors = [np.mean(v) for v in values], [standard_error(v) for v in values]
                    panel.errorbar(places, means, errors, fmt="o", color=colour, capsize=3, label=f"{steps} steps")
                if key == "loss":
                    panel.axhline(self.store.values["dense"]["loss"], color="grey", ls=":", label="dense")
                    panel.set(yscale="log", title=f"pruning_ratio {ratio}")
                panel.set_ylabel(label)
                panel.set_xticks(range(len(self.names)), self.names, rotation=40, ha="right", fontsize=8)
                panel.legend(fontsize=8)
        with new_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=100)

    def publish(self, title: str, workers: int) -> None:
        """Measure what is missing, then print the tables and draw the plot."""
        self.fill(workers)
        self.plot(RESULTS / f"{title}.png")
        publish(title, self.lines())


def opened(title: str, names: Sequence[str], budget: Budget) -> Store:
    """What was measured of these criteria with this budget."""
    entries = [(name, EVERY[name]) for name in names if name in EVERY]
    return Store(title, [budget.of.training["sha256"], entries, FINE, str(budget)])


def compare(
    title: str, names: Sequence[str], ratios: Sequence[float], seeds: int, budget: Budget, workers: int
) -> None:
    """Measure what is missing, then print the tables and draw the plot; all is kept under this title."""
    Cells(opened(title, names, budget), names, ratios, seeds, budget).publish(title, workers)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="one ratio, two seeds, 30 steps")] = False,
    seeds: Seeds = 5,
    workers: Workers = 2,
) -> None:
    """Measure what is missing, then print the tables and draw the plot."""
    names = (*CRITERIA, SCRATCH)
    if quick:
        compare("criteria_quick", names, RATIOS[1:], 2, QUICK, workers)
    else:
        compare("criteria", names, RATIOS, seeds, FULL, workers)
