"""Loss right after removal, for each criterion, on the embedded model: no repair, no fine-tuning.

    python benchmarks/criteria.py [--quick]

Results are kept in benchmarks/results/criteria.json; interrupted, it goes on where it was.
"""

from __future__ import annotations

import copy
from typing import Annotated

import torch
import typer
from common import Store, calibration, dense, held_out_loss, mean_and_error, publish

import diffprune_plugin as dp

RATIOS = (0.3, 0.5)
# Name in the table: criterion, options of the score, options of the sweep (None: needs no gradients).
CRITERIA = {
    "random": ("random", {}, None),
    "magnitude": ("magnitude", {}, None),
    "taylor (all timesteps)": ("diff_taylor", {}, {"threshold": 0.0}),
    "diff_taylor (paper)": ("diff_taylor", {}, {"threshold": 0.05}),
    "diff_taylor, threshold 0.02": ("diff_taylor", {}, {"threshold": 0.02}),
    "diff_taylor, squared": ("diff_taylor", {"power": 2}, {"threshold": 0.05}),
    "ddpm_exp (authors' loop)": ("diff_taylor", {"preset": "ddpm_exp"}, {"sampling": "reference"}),
}


def loss_after(name: str, ratio: float, seed: int) -> float:
    """Held-out loss after removing ``ratio`` of the channels chosen with this seed."""
    criterion, options, sweep = CRITERIA[name]
    if sweep is not None:
        options = {**options, "calibration": calibration(seed, **sweep)}
    elif criterion == "random":
        options = {"seed": seed}
    unet = copy.deepcopy(dense().unet)
    dp.remove_(unet, dp.make_plan(unet, dp.importance(criterion, **options), pruning_ratio=ratio))
    return held_out_loss(unet)


def main(
    quick: Annotated[bool, typer.Option(help="2 seeds, without the authors' loops")] = False,
    seeds: int = 5,
    threads: int = 2,
) -> None:
    """Print the table and keep it in benchmarks/results/criteria.md."""
    torch.set_num_threads(threads)
    names = [name for name in CRITERIA if not (quick and "loop" in name)]
    store = Store("criteria")
    before = store.get("dense", lambda: held_out_loss(dense().unet))
    lines = [
        f"Held-out loss right after removal; dense {before:.4f}; mean and standard error over {2 if quick else seeds} "
        "seeds of the calibration (3 for the authors' loop; magnitude has no randomness).",
        "",
        f"| criterion | {' | '.join(f'ratio {ratio}' for ratio in RATIOS)} |",
        f"|---|{'---|' * len(RATIOS)}",
    ]
    for name in names:
        cells = []
        for ratio in RATIOS:
            count = 1 if name == "magnitude" else 2 if quick else min(seeds, 3) if "loop" in name else seeds
            losses = [
                store.get(f"{name} {ratio} {s}", lambda n=name, r=ratio, s=s: loss_after(n, r, s)) for s in range(count)
            ]
            mean, error = mean_and_error(losses)
            cells.append(f"{mean:.4f} ± {error:.4f}" if count > 1 else f"{mean:.4f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    publish("criteria" + ("_quick" if quick else ""), lines)


if __name__ == "__main__":
    typer.run(main)
