"""What the threshold of the paper brings: six of them, on digits and on pictures in colour, and where in the timesteps.

    python benchmarks/bench.py thresholds                    # digits: an hour on two cores
    python benchmarks/bench.py thresholds --model emoji      # after: make models
    python benchmarks/bench.py thresholds --thresholds 0,0.05 --ratios 0.36 --seeds 3
    python benchmarks/bench.py thresholds --share 0.2        # a fine-tune of a fifth of the dense model's steps

As criteria.py compares, nothing repaired before the fine-tune. Results are kept by model and share; interrupted, it
goes on where it was, and further thresholds, ratios and seeds add to it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from shared.embedded import HALF, REGIONS
from shared.results import (
    RESULTS,
    Seeds,
    Workers,
    holm,
    mean,
    one_of,
    p_text,
    paired_p,
    publish,
    some_of,
    some_shares,
    table,
)
from shared.subject import SUBJECTS, Look

from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.optional import need_pyplot
from quality.criteria import FULL, PAPER, THRESHOLDS, Budget, Cells, opened

NAMES = {"0": "taylor", "0.05": PAPER} | {name.partition(", ")[2]: name for name in THRESHOLDS}  # by threshold
RATIOS = (0.2, HALF, 0.5)
SAMPLES = 256
TENTH = 0.1
ALL = ",".join(sorted(NAMES, key=float))


def budget_of(model: str, batch_size: int, share: float = TENTH) -> Budget:
    """A share of the dense model's steps."""
    subject = SUBJECTS[model]
    look, steps = Look(held_out=250, repeats=2, count=66, steps=10), round(share * subject.steps)
    return replace(FULL, samples=SAMPLES, steps=steps, batch_size=batch_size, look=look, of=subject)


def regions(cells: Cells) -> list[str]:
    """The loss, and that of each part of the timesteps, as a share of that without a threshold; p by Holm for all."""
    lines = [(r, s, n) for r in cells.ratios for s in (0, cells.steps) for n in cells.names[1:]]
    keys = ["loss", *region_keys()]
    places = [(*line, key) for line in lines for key in keys]
    pairs = [(cells.of(n, r, s, key), cells.of(cells.names[0], r, s, key)) for r, s, n, key in places]
    shares = [[a / b for a, b in zip(*pair, strict=True)] for pair in pairs]
    texts = [cell(*one) for one in zip(shares, holm([paired_p(*pair) for pair in pairs]), strict=True)]
    width = len(keys)
    rows = [[*map(str, line), *texts[width * i : width * (i + 1)]] for i, line in enumerate(lines)]
    ends = (*(first - 1 for first in REGIONS[1:]), 999)
    spans = [f"t {first}-{end}" for first, end in zip(REGIONS, ends, strict=True)]
    head = ["ratio", "steps", "criterion", "all", *spans]
    return [
        "Loss by timestep as a share of that of taylor (threshold 0), below 1 is better; p of a paired test, by Holm "
        "for all of this table:",
        "",
        *table(head, rows),
    ]


def region_keys() -> list[str]:
    return [f"loss {first}" for first in REGIONS]


def cell(shares: list[float], p: float) -> str:
    return f"{mean(shares, 3)}{f' (p {text})' if (text := p_text(p)) else ''}"


def plot(cells: Cells, path: Path) -> None:
    """By threshold the loss of each part of the timesteps over that without one, a column a ratio."""
    pyplot = need_pyplot()
    figure, axes = pyplot.subplots(
        2, len(cells.ratios), figsize=(4 * len(cells.ratios), 6), layout="constrained", squeeze=False
    )
    for column, ratio in enumerate(cells.ratios):
        for line, steps in enumerate((0, cells.steps)):
            panel = axes[line][column]
            for key in region_keys():
                base = np.array(cells.of(cells.names[0], ratio, steps, key))
                shares = np.array([np.array(cells.of(name, ratio, steps, key)) / base for name in cells.names])
                error = shares.std(1, ddof=1) / np.sqrt(shares.shape[1]) if shares.shape[1] > 1 else None
                label = f"t from {key.removeprefix('loss ')}"
                panel.errorbar(range(len(cells.names)), shares.mean(1), error, marker="o", capsize=2, label=label)
            panel.axhline(1, color="grey", ls=":")
            panel.set_xticks(
                range(len(cells.names)),
                [threshold for threshold in sorted(NAMES, key=float) if NAMES[threshold] in cells.names],
            )
            panel.set(title=f"ratio {ratio}, {steps} steps", xlabel="threshold", ylabel="loss over that of threshold 0")
    axes[0][0].legend(fontsize=7)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def main(
    model: Annotated[str, typer.Option(**one_of(SUBJECTS))] = "digits",
    seeds: Seeds = 5,
    thresholds: Annotated[str, typer.Option(**some_of(NAMES, needed=("0", "0.05")))] = ALL,
    ratios: Annotated[str, typer.Option(**some_shares("pruning ratios"))] = ",".join(map(str, RATIOS)),
    batch_size: Annotated[int, typer.Option(help="images in a step of the fine-tune")] = 1,
    share: Annotated[float, typer.Option(min=0.001, max=1.0, help="of the dense model's steps")] = TENTH,
    workers: Workers = 2,
) -> None:
    """Measure what is missing, then print the tables and draw the plots."""
    chosen, budget = [float(r) for r in ratios.split(",")], budget_of(model, batch_size, share)
    title = f"thresholds_{model}" if share == TENTH else f"thresholds_{model}_{budget.steps}_steps"
    names = [NAMES[threshold] for threshold in sorted(thresholds.split(","), key=float)]
    cells = Cells(opened(title, list(NAMES.values()), budget), names, chosen, seeds, budget)
    cells.publish(title, workers)
    plot(cells, RESULTS / f"{title}_regions.png")
    publish(f"{title}_regions", regions(cells))
