"""The authors' procedure beside this project's, on the embedded model at half its MACs and about the same budget.

    python benchmarks/bench.py reference            # after criteria, whose models it shares
    python benchmarks/bench.py reference --quick

Their loop and their selection are written here anew, from the paper and from what their diffusers script does, on
torch-pruning's dependency graph and Taylor score: one batch and one noise at every (here: every twentieth) timestep
from 0 on, until the loss falls below the threshold; then the channels are ranked inside each norm group or head. The
third row gives the same gradients to torch-pruning's stock selection, at the ratio that leaves it no fewer MACs.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch_pruning as tp
import typer
from shared.embedded import HALF, MODEL, Row, agreement, calibration, dense, measure, pruned
from shared.results import Seeds, Store, Workers, mean, over, p_text, paired_p, publish, table

import diffprune_plugin as dp
from diffprune_plugin import demo
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.pruning.loading import load_pipeline
from quality.criteria import FINE, FULL, PAPER, QUICK, Budget, plan_of, start_of, sweep_of, trained

THRESHOLD, BATCH = 0.05, 16
GRID = [step / 100 for step in range(60, 4, -1)]  # ratios tried for the stock selection
OURS, AUTHORS, STOCK = "this project", "authors' loop and selection", "authors' loop, stock torch-pruning selection"
PRESET = "diff_taylor, diffusers"  # the same script as a preset of this project


def loop_(unet: Any, scheduler: Any, seed: int, passes: int) -> int:
    """Sum the gradients of the losses over timesteps into ``.grad``; returns the samples that went through."""
    generator = torch.Generator().manual_seed(seed)
    images = load_samples(demo.CALIBRATION_IMAGES)
    sample = images.sample(torch.randperm(len(images), generator=generator)[:BATCH])
    noise, largest, done = torch.randn(sample.shape, generator=generator), 0.0, 0
    total = scheduler.config.num_train_timesteps
    for timestep in range(0, total, total // passes):
        timesteps = torch.full((BATCH,), timestep)
        predicted = unet(scheduler.add_noise(sample, noise, timesteps), timesteps).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        loss.backward()
        largest, done = max(largest, loss.item()), done + 1
        if loss.item() < THRESHOLD * largest:
            break
    return done * BATCH


def authors_(pruner: Any, ratio: float) -> None:
    """Of C channels floor((C - int(C (1 - ratio))) / groups) go from each norm group or head, the lowest in it."""
    graph = pruner.DG
    kept = {"ignored_layers": pruner.ignored_layers, "root_module_types": pruner.root_module_types}
    groups = list(graph.get_all_groups(**kept))
    scores = [pruner.estimate_importance(group) for group in groups]  # all, before any channel goes
    for group, score in zip(groups, scores, strict=True):
        parts, channels = pruner._get_channel_groups(group), len(score)
        each = (channels - int(channels * (1 - ratio))) // parts
        lowest = score.view(parts, -1).argsort(dim=1)[:, :each] + torch.arange(parts)[:, None] * (channels // parts)
        if each:
            root = group[0].dep
            graph.get_pruning_group(root.target.module, root.handler, sorted(lowest.flatten().tolist())).prune()


def stock_(pruner: Any, ratio: float) -> None:
    pruner.step()


def selected(select_: Callable[[Any, float], None], ratio: float, gradients: dict[str, torch.Tensor]) -> dp.PruningPlan:
    """What a selection removes of the dense UNet, read from torch-pruning's history."""
    unet = copy.deepcopy(dense().unet).requires_grad_(True)
    for name, parameter in unet.named_parameters():
        parameter.grad = gradients[name].clone()
    adapter = find_adapter(unet)
    told = adapter.torch_pruning_kwargs(unet)
    importance = tp.importance.GroupTaylorImportance()
    pruner = tp.pruner.BasePruner(unet, adapter.example_inputs(unet), importance, pruning_ratio=ratio, **told)
    select_(pruner, ratio)
    again = copy.deepcopy(dense().unet)
    replay = dp.Pruner(again, adapter.example_inputs(again), "magnitude", pruning_ratio=ratio)
    replay.load_pruning_history(pruner.pruning_history())
    return replay.plan


@cache
def gradients_of(seed: int, passes: int) -> tuple[dict[str, torch.Tensor], int]:
    """By parameter name, and the samples that they took."""
    unet = copy.deepcopy(dense().unet).requires_grad_(True)
    samples = loop_(unet, dense().scheduler, seed, passes)
    return {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}, samples


def stock_ratio(macs: int, gradients: dict[str, torch.Tensor]) -> float:
    """The largest ratio at which the stock selection leaves no fewer MACs."""
    return GRID[bisect.bisect_left(GRID, macs, key=lambda ratio: selected(stock_, ratio, gradients).macs[1])]


def start(name: str, seed: int, budget: Budget) -> Path:
    """Directory of the pruned model of a row."""
    if name == OURS:
        return start_of(PAPER, HALF, seed, budget)
    gradients, _ = gradients_of(seed, budget.timesteps)
    if name == AUTHORS:
        return pruned(budget.place("authors", HALF, seed), selected(authors_, HALF, gradients))
    ratio = stock_ratio(plan_of("magnitude", HALF, 0, budget).macs[1], gradients)
    return pruned(budget.place("stock", HALF, seed), selected(stock_, ratio, gradients))


def after(name: str, seed: int, budget: Budget) -> Row:
    """Before any training and after it, the size, and the samples that the gradients took."""
    begin = start(name, seed, budget)
    end = trained(begin, seed, budget)
    macs = read_plan(begin).macs
    before, later = (measure(load_pipeline(path), budget.look) for path in (begin, end))
    samples = 0 if name == OURS else gradients_of(seed, budget.timesteps)[1]
    return {"macs": macs[1] / macs[0], "before": before["loss"], "samples": samples, **later}


def same_selection(seed: int, budget: Budget) -> float:
    """Share of the channels that both selections remove, given the same gradients: those of our preset."""
    result = calibration(seed, **(sweep_of(PRESET, budget) or {}))
    return agreement(plan_of(PRESET, HALF, seed, budget), selected(authors_, HALF, result.gradients))


def main(
    quick: Annotated[bool, typer.Option("--quick", help="one seed, 30 steps")] = False,
    seeds: Seeds = 3,
    workers: Workers = 2,
) -> None:
    """Measure what is missing, then print the table."""
    seeds, budget = (1, QUICK) if quick else (seeds, FULL)
    name, steps = "reference" + ("_quick" if quick else ""), budget.steps
    store = Store(name, [MODEL, FINE, str(budget), THRESHOLD, BATCH])
    store.fill({f"same {s}": partial(same_selection, s, budget) for s in range(seeds)}, workers)
    rows = (OURS, AUTHORS, STOCK)
    store.fill({f"{n} {s}": partial(after, n, s, budget) for n in rows for s in range(seeds)}, workers)
    of = {n: [store.values[f"{n} {s}"] for s in range(seeds)] for n in rows}
    same = [store.values[f"same {s}"] for s in range(seeds)]
    ours = calibration(0, **(sweep_of(PAPER, budget) or {}))
    lines = []
    for label, runs in of.items():
        samples = (ours.forward, ours.backward) if label == OURS else (runs[0]["samples"],) * 2
        p = paired_p([run["loss"] for run in runs], [run["loss"] for run in of[OURS]])
        digits = {"before": 4, "loss": 4, "ssim": 3, "distance": 0}
        columns = [mean([run[key] for run in runs], count) for key, count in digits.items()]
        share = f"{runs[0]['macs']:.0%}"
        lines.append([label, f"{samples[0]:.0f} / {samples[1]:.0f}", share, *columns, p_text(p)])
    head = [
        "procedure",
        "samples forward / backward",
        "MACs left",
        "loss, 0 steps",
        f"{steps} steps",
        "SSIM",
        "FD",
        "p",
    ]
    publish(
        name,
        [
            f"{over(seeds)}; {steps} steps of batch {budget.batch_size}; SSIM and FD "
            "(digits_classifier) after them; p: paired t-test of the loss after the steps against this project. Given "
            f"the same gradients, their selection as written here removes {min(same):.1%} of the channels that this "
            "project's does.",
            "",
            *table(head, lines),
        ],
    )
