"""What the training-free repair brings on the embedded model: loss, SSIM, cost, and its worth in fine-tuning steps.

    python benchmarks/bench.py compensate            # everything
    python benchmarks/bench.py compensate --quick    # one seed, diff_taylor, two ratios, 20 steps

Each finished row is in benchmarks/results/compensate.json at once: killed and started again it goes on with the next.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from making.train_demo import digits, noise_loss, to_sample
from shared.embedded import MODEL, calibrated, calibration, dense, dense_images, drawn, held_out_loss, similarity
from shared.results import RESULTS, Seeds, Store, Workers, mean, publish, standard_error, table
from shared.subject import Look

import diffprune_plugin as dp
from diffprune_plugin import demo
from diffprune_plugin.recovery.compensate import compensate_
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.optional import need_pyplot

Row = dict[str, Any]
CRITERIA = ("random", "magnitude", "diff_taylor")
LOOK = Look(repeats=2, count=16, steps=25)
STEPS = (0, 5, 10, 20, 40, 80, 120, 160, 200)  # where the fine-tuning curves are measured
VARIANTS = ("timesteps that calibration kept", "a pass for each layer")


def pruned(criterion: str, ratio: float, seed: int) -> tuple[Any, dp.PruningPlan]:
    options: Row = {"seed": seed} if criterion == "random" else {}
    if criterion == "diff_taylor":
        options = {"calibration": calibration(seed)}
    unet = copy.deepcopy(dense().unet)
    plan = dp.make_plan(unet, dp.importance(criterion, **options), pruning_ratio=ratio)
    dp.remove_(unet, plan)
    return unet, plan


def repaired_(unet: Any, plan: dp.PruningPlan, seed: int, **options: Any) -> Any:
    settings = {"seed": seed, "progress": False, **options}
    return compensate_(unet, dense().unet, plan, dense().scheduler, demo.CALIBRATION_IMAGES, **settings)


def resemblance(unet: Any) -> float:
    """SSIM to the dense model's images from the same noise."""
    return similarity(drawn(type(dense())(unet=unet, scheduler=dense().scheduler), LOOK), dense_images(LOOK))


def dense_loss() -> Row:
    return {"loss": held_out_loss(dense().unet, LOOK.repeats)}


def repair(criterion: str, ratio: float, seed: int) -> Row:
    """Loss and SSIM right after removal and after the repair, and what the repair cost."""
    unet, plan = pruned(criterion, ratio, seed)
    row: Row = {"pruned": held_out_loss(unet, LOOK.repeats), "ssim_pruned": resemblance(unet)}
    report = repaired_(unet, plan, seed)
    row["seconds"] = report.seconds
    return row | {"repaired": held_out_loss(unet, LOOK.repeats), "ssim_repaired": resemblance(unet)}


def variant(name: str, ratio: float, seed: int) -> Row:
    """The repair of a diff_taylor plan with other options."""
    unet, plan = pruned("diff_taylor", ratio, seed)
    options: Row = {"calibration": calibration(seed)} if name == VARIANTS[0] else {"passes": "layer"}
    report = repaired_(unet, plan, seed, **options)
    return {"repaired": held_out_loss(unet, LOOK.repeats), "seconds": report.seconds}


def tune(ratio: float, seed: int, repaired: bool, steps: tuple[int, ...]) -> Row:
    """Held-out loss along a fine-tune (AdamW, lr 2e-4, batch 64), from the pruned or the repaired UNet."""
    unet, plan = pruned("diff_taylor", ratio, seed)
    if repaired:
        repaired_(unet, plan, seed)
    optimizer, losses, training = torch.optim.AdamW(unet.parameters(), lr=2e-4), [], to_sample(digits()[0])
    for step in range(steps[-1] + 1):
        if step in steps:
            losses.append(held_out_loss(unet.eval(), LOOK.repeats))
        number = 1_000_003 * (seed + 1) + step
        rows = torch.randint(0, len(training), (64,), generator=torch.Generator().manual_seed(number))
        loss = noise_loss(unet.train(), dense().scheduler, training[rows], number)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return {"steps": steps, "losses": losses}


def cells(rows: dict[str, Row], kind: str) -> dict[str, list[Row]]:
    """Rows of one kind by what stands between the kind and the seed in their keys."""
    groups: dict[str, list[Row]] = {}
    for key in sorted(rows):
        if key.startswith(kind + " "):
            groups.setdefault(key.removeprefix(kind + " ").rsplit(" seed ", 1)[0], []).append(rows[key])
    return groups


def worth(losses: list[float], steps: list[int], repaired_loss: float) -> str:
    """After how many fine-tuning steps the pruned UNet is as good as the repaired one before any."""
    if losses[-1] > repaired_loss:
        return f"> {steps[-1]}"
    place = next(i for i, loss in enumerate(losses) if loss <= repaired_loss)
    share = (losses[place - 1] - repaired_loss) / (losses[place - 1] - losses[place])
    return f"{steps[place - 1] + share * (steps[place] - steps[place - 1]):.0f}"


def repair_rows(rows: dict[str, Row]) -> list[list[str]]:
    lines = []
    for name, group in cells(rows, "repair").items():
        of = {key: [row[key] for row in group] for key in group[0]}
        gone = [(r["pruned"] - r["repaired"]) / (r["pruned"] - rows["dense"]["loss"]) for r in group]
        values = [mean(of["pruned"]), mean(of["repaired"]), mean(gone, 3)]
        values += [mean(of["ssim_pruned"], 3), mean(of["ssim_repaired"], 3), mean(of["seconds"], 1)]
        lines.append([name, str(len(group)), *values])
    return lines


def tuning_rows(rows: dict[str, Row]) -> list[list[str]]:
    lines = []
    for key, row in rows.items():
        if key.startswith("tune") and " pruned " in key:
            other = rows[key.replace(" pruned ", " repaired ")]
            figures = [other["losses"][0], row["losses"][-1], other["losses"][-1]]
            name = key.removeprefix("tune ").replace(" pruned ", " ")
            steps = worth(row["losses"], row["steps"], figures[0])
            lines.append([name, *(f"{loss:.4f}" for loss in figures), f"{steps} steps"])
    return lines


def report(rows: dict[str, Row]) -> list[str]:
    """Everything measured as Markdown."""
    head = ["ratio, criterion", "seeds", "pruned", "repaired", "excess gone", "SSIM pruned", "SSIM repaired"]
    variants = [
        [name, str(len(group)), mean([row["repaired"] for row in group]), mean([row["seconds"] for row in group], 1)]
        for name, group in cells(rows, "variant").items()
    ]
    return [
        f"Dense held-out loss {rows['dense']['loss']:.4f}. Mean ± standard error over seeds. Seconds: two repairs at "
        "once, one thread each.",
        "",
        *table([*head, "seconds"], repair_rows(rows)),
        "",
        *table(["variant of diff_taylor", "seeds", "repaired", "seconds"], variants),
        "",
        *table(["fine-tuned", "repair alone", "steps alone", "repair and steps", "repair's worth"], tuning_rows(rows)),
    ]


def plot(rows: dict[str, Row], path: Path) -> None:
    """Loss before and after the repair for each ratio and criterion, and the fine-tuning curves."""
    pyplot = need_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    groups = cells(rows, "repair")
    for key, colour, state in (("pruned", "tab:red", "after removal"), ("repaired", "tab:blue", "repaired")):
        values = [[row[key] for row in group] for group in groups.values()]
        means, errors = [np.mean(v) for v in values], [standard_error(v) for v in values]
        left.errorbar(range(len(values)), means, errors, fmt="o", color=colour, label=state)
    left.set_xticks(range(len(groups)), [name.replace(" ", "\n") for name in groups], fontsize=6)
    for key, row in rows.items():
        if key.startswith("tune"):
            colour = "tab:blue" if " repaired " in key else "tab:red"
            style = "-" if " 0.3 " in key else "--"
            label = key.split(" steps ")[1].removesuffix(" seed 0") if key.endswith("seed 0") else None
            right.plot(row["steps"], row["losses"], style, color=colour, label=label)
    for axes in (left, right):
        axes.axhline(rows["dense"]["loss"], color="grey", linestyle=":", label="dense")
        axes.set_yscale("log")
        axes.set_ylabel("held-out loss")
        axes.legend(fontsize=8)
    right.set_xlabel("fine-tuning steps (AdamW, batch 64)")
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="one seed, diff_taylor, two ratios, 20 steps")] = False,
    seeds: Seeds = 5,
    workers: Workers = 2,
) -> None:
    """Measure what is missing, then print the tables and draw the plot."""
    seeds, steps, criteria = (1, STEPS[:4], CRITERIA[-1:]) if quick else (seeds, STEPS, CRITERIA)
    repairs = [(r, c, s) for r in ((0.3, 0.5) if quick else (0.3, 0.5, 0.7)) for c in criteria for s in range(seeds)]
    tunings = [(r, s, way) for r, s in [(0.5, 0), (0.5, 1), (0.3, 0)][: 1 if quick else 3] for way in (False, True)]
    variants = [] if quick else [(n, s) for n in VARIANTS for s in range(3)]
    name = "compensate" + ("_quick" if quick else "")
    store = Store(name, [MODEL, str(LOOK), steps])
    store.fill({"dense": dense_loss} | {f"calibration {s}": partial(calibrated, s, {}) for s in range(seeds)}, workers)
    ways = {False: "pruned", True: "repaired"}
    store.fill(
        {f"repair {r} {c} seed {s}": partial(repair, c, r, s) for r, c, s in repairs}
        | {f"variant 0.5 {n} seed {s}": partial(variant, n, 0.5, s) for n, s in variants}
        | {
            f"tune {steps[-1]} steps {ways[way]} {r} diff_taylor seed {s}": partial(tune, r, s, way, steps)
            for r, s, way in tunings
        },
        workers,
    )
    plot(store.values, RESULTS / f"{name}.png")
    publish(name, report(store.values))
