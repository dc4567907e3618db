"""What the training-free repair brings on the embedded model: loss, SSIM, cost, and its worth in fine-tuning steps.

    python benchmarks/compensate.py            # everything; about 40 minutes on one core
    python benchmarks/compensate.py --quick    # one seed, diff_taylor, two ratios, 20 steps; about 2 minutes

Each finished row is in OUTPUT/compensate.json at once: killed and started again it goes on with the next. The table
and the plot (compensate.md, compensate.png) are made from the rows that are there.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torchmetrics.functional.image import structural_similarity_index_measure as ssim
from train_demo import digits, held_out_loss, noise_loss, to_sample

import diffprune_plugin as dp
from diffprune_plugin.checkpoint import load_pipeline
from diffprune_plugin.compensate import compensate_
from diffprune_plugin.data import load_npz
from diffprune_plugin.demo import CALIBRATION_IMAGES, HELD_OUT_IMAGES, MODEL
from diffprune_plugin.sample import sample_images
from diffprune_plugin.tensors import weights_hash

Row = dict[str, Any]
RUNS = Path("runs/compensate")  # calibrations
CRITERIA = ("random", "magnitude", "diff_taylor")
HELD_OUT, DRAWN, DRAW_STEPS = 200, 16, 25  # held-out images (5 noises each); images sampled, DDIM steps
STEPS = (0, 5, 10, 20, 40, 80, 120, 160, 200)  # where the fine-tuning curves are measured


class Bench:
    """The embedded model, its images, and the rows measured so far."""

    def __init__(self, output: Path) -> None:
        self.pipeline = load_pipeline(MODEL)
        self.dense, self.scheduler = self.pipeline.unet, self.pipeline.scheduler
        self.images = load_npz(CALIBRATION_IMAGES)
        self.held_out = to_sample(load_npz(HELD_OUT_IMAGES).values.numpy())[:HELD_OUT]
        self.training = to_sample(digits()[0])
        self.output = output
        self.file = output / "compensate.json"
        self.results: dict[str, Any] = {"model": weights_hash(self.dense), "rows": {}}
        if self.file.exists():
            stored = json.loads(self.file.read_text())
            self.results = stored if stored["model"] == self.results["model"] else self.results
        self.row("dense", lambda: {"loss": self.loss(self.dense)})

    @property
    def rows(self) -> dict[str, Row]:
        rows: dict[str, Row] = self.results["rows"]
        return rows

    def row(self, key: str, measure: Callable[[], Row]) -> Row:
        """The stored row of this key, or a new one, stored at once."""
        if key not in self.rows:
            self.rows[key] = measure()
            self.output.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.results, indent=1) + "\n")
            temporary.replace(self.file)
            print(key, json.dumps(self.rows[key]), flush=True)
        return self.rows[key]

    def loss(self, unet: Any) -> float:
        return held_out_loss(unet, self.scheduler, self.held_out)

    def calibration(self, seed: int) -> dp.Calibration:
        folder = RUNS / f"{self.results['model'][:12]}-{seed}"
        if not folder.exists():
            sweep = dp.importance("diff_taylor").sweep  # type: ignore[attr-defined]
            dp.calibrate(self.dense, self.scheduler, self.images, sweep, seed=seed, progress=False).save(folder)
        return dp.Calibration.load(folder)

    def pruned(self, criterion: str, ratio: float, seed: int) -> tuple[Any, dp.PruningPlan]:
        options: Row = {"seed": seed} if criterion == "random" else {}
        if criterion == "diff_taylor":
            options = {"calibration": self.calibration(seed)}
        unet = copy.deepcopy(self.dense)
        plan = dp.make_plan(unet, dp.importance(criterion, **options), pruning_ratio=ratio)
        dp.remove_(unet, plan)
        return unet, plan

    def drawn(self, unet: Any) -> torch.Tensor:
        """Images from fixed noise, float (count, 1, height, width) in [0, 1]."""
        pipeline = type(self.pipeline)(unet=unet, scheduler=self.scheduler)
        images = sample_images(pipeline, DRAWN, seed=0, steps=DRAW_STEPS, progress=False)
        return torch.stack([torch.from_numpy(np.array(image.convert("L"))) for image in images])[:, None] / 255.0

    @functools.cached_property
    def dense_images(self) -> torch.Tensor:
        return self.drawn(self.dense)

    def repair(self, criterion: str, ratio: float, seed: int) -> Row:
        """Loss and SSIM right after removal and after the repair, and what the repair cost."""
        unet, plan = self.pruned(criterion, ratio, seed)
        row: Row = {"pruned": self.loss(unet), "ssim_pruned": similarity(self.drawn(unet), self.dense_images)}
        reset_peak()
        before = memory("VmRSS")
        report = compensate_(unet, self.dense, plan, self.scheduler, self.images, seed=seed, progress=False)
        row |= {"seconds": report.seconds, "peak_mb": memory("VmHWM"), "before_mb": before}
        row |= {"repairs": len(report.repairs), "refitted": sum(repair.refitted for repair in report.repairs)}
        row |= {"repaired": self.loss(unet), "ssim_repaired": similarity(self.drawn(unet), self.dense_images)}
        return row | {"params": plan.params[1] / plan.params[0], "gone": self.gone(row["pruned"], row["repaired"])}

    def gone(self, pruned: float, repaired: float) -> float:
        """The share of the excess loss over the dense model's that the repair took away."""
        return float((pruned - repaired) / (pruned - self.rows["dense"]["loss"]))

    def variant(self, ratio: float, seed: int, **options: Any) -> Row:
        """The repair of a diff_taylor plan with other options."""
        unet, plan = self.pruned("diff_taylor", ratio, seed)
        report = compensate_(unet, self.dense, plan, self.scheduler, self.images, seed=seed, progress=False, **options)
        return {"repaired": self.loss(unet), "seconds": report.seconds}

    def tune(self, ratio: float, seed: int, repaired: bool, steps: tuple[int, ...]) -> Row:
        """Held-out loss along a fine-tune (AdamW, lr 2e-4, batch 64), from the pruned or the repaired UNet."""
        unet, plan = self.pruned("diff_taylor", ratio, seed)
        if repaired:
            compensate_(unet, self.dense, plan, self.scheduler, self.images, seed=seed, progress=False)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-4)
        losses = []
        for step in range(steps[-1] + 1):
            if step in steps:
                losses.append(self.loss(unet.eval()))
            generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
            batch = self.training[torch.randint(0, len(self.training), (64,), generator=generator)]
            loss = noise_loss(unet.train(), self.scheduler, batch, 1_000_003 * (seed + 1) + step)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        return {"steps": steps, "losses": losses}


def similarity(images: torch.Tensor, reference: torch.Tensor) -> float:
    return torch.as_tensor(ssim(images, reference, data_range=1.0)).item()


def reset_peak() -> None:
    """Let the kernel count this process's peak memory anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(key: str) -> float:
    """A line of /proc/self/status in MB: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1000


def mean(values: list[float], digits: int = 4) -> str:
    """Mean and, of more than one value, its standard error."""
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{error}"


def standard_error(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0


def cells(rows: dict[str, Row], kind: str) -> list[tuple[str, list[Row]]]:
    """Rows of one kind by what stands between the kind and the seed in their keys."""
    groups: dict[str, list[Row]] = {}
    for key, row in rows.items():
        if key.startswith(kind + " "):
            groups.setdefault(key.removeprefix(kind + " ").rsplit(" seed ", 1)[0], []).append(row)
    return sorted(groups.items())


def worth(pruned: Row, repaired_loss: float) -> str:
    """After how many fine-tuning steps the pruned UNet is as good as the repaired one before any."""
    losses, steps = pruned["losses"], pruned["steps"]
    if losses[-1] > repaired_loss:
        return f"> {steps[-1]}"
    place = next(i for i, loss in enumerate(losses) if loss <= repaired_loss)
    share = (losses[place - 1] - repaired_loss) / (losses[place - 1] - losses[place])
    return f"{steps[place - 1] + share * (steps[place] - steps[place - 1]):.0f}"


def table(bench: Bench) -> str:
    """Everything measured as Markdown."""
    rows = bench.rows
    lines = [f"Dense held-out loss {rows['dense']['loss']:.4f}. Mean ± standard error over seeds.", ""]
    names = ("ratio, criterion", "seeds", "pruned", "repaired", "excess gone", "SSIM pruned", "SSIM repaired")
    lines += [header(*names, "seconds", "peak MB", "of them before")]
    for name, group in cells(rows, "repair"):
        of = {key: [row[key] for row in group] for key in group[0]}
        values = [mean(of["pruned"]), mean(of["repaired"]), mean(of["gone"], 3)]
        values += [mean(of["ssim_pruned"], 3), mean(of["ssim_repaired"], 3), mean(of["seconds"], 1)]
        memories = [f"{max(of['peak_mb']):.0f}", f"{max(of['before_mb']):.0f}"]
        lines.append(line(name, str(len(group)), *values, *memories))
    lines += ["", header("variant of diff_taylor", "seeds", "repaired", "seconds")]
    for name, group in cells(rows, "variant"):
        losses, seconds = [row["repaired"] for row in group], [row["seconds"] for row in group]
        lines.append(line(name, str(len(group)), mean(losses), mean(seconds, 1)))
    lines += ["", header("fine-tuned", "repair alone", "steps alone", "repair and steps", "the repair is worth")]
    for key, row in rows.items():
        other = rows.get(key.replace(" pruned ", " repaired "))
        if key.startswith("tune") and " pruned " in key and other is not None:
            figures = (other["losses"][0], row["losses"][-1], other["losses"][-1])
            name = key.removeprefix("tune ").replace(" pruned ", " ")
            lines.append(line(name, *(f"{loss:.4f}" for loss in figures), worth(row, figures[0]) + " steps"))
    return "\n".join(lines) + "\n"


def line(*values: str) -> str:
    return "| " + " | ".join(values) + " |"


def header(*names: str) -> str:
    return line(*names) + "\n" + line(*["---"] * len(names))


def plot(bench: Bench, path: Path) -> None:
    """Loss before and after the repair for each ratio and criterion, and the fine-tuning curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    groups = dict(cells(bench.rows, "repair"))
    for key, colour, state in (("pruned", "tab:red", "after removal"), ("repaired", "tab:blue", "repaired")):
        values = [[row[key] for row in group] for group in groups.values()]
        means, errors = [np.mean(v) for v in values], [standard_error(v) for v in values]
        left.errorbar(range(len(values)), means, errors, fmt="o", color=colour, label=state)
    left.set_xticks(range(len(groups)), [name.replace(" ", "\n") for name in groups], fontsize=6)
    for key, row in bench.rows.items():
        if key.startswith("tune"):
            colour = "tab:blue" if " repaired " in key else "tab:red"
            style = "-" if " 0.3 " in key else "--"
            label = key.split(" steps ")[1].removesuffix(" seed 0") if key.endswith("seed 0") else None
            right.plot(row["steps"], row["losses"], style, color=colour, label=label)
    for axes in (left, right):
        axes.axhline(bench.rows["dense"]["loss"], color="grey", linestyle=":", label="dense")
        axes.set_yscale("log")
        axes.set_ylabel("held-out loss")
        axes.legend(fontsize=8)
    right.set_xlabel("fine-tuning steps (AdamW, batch 64)")
    figure.savefig(path, dpi=110)


def measure_repairs(bench: Bench, ratio: float, seed: int, criteria: tuple[str, ...] = CRITERIA) -> None:
    for name in criteria:
        bench.row(f"repair {ratio} {name} seed {seed}", functools.partial(bench.repair, name, ratio, seed))


def measure_tuning(bench: Bench, ratio: float, seed: int, steps: tuple[int, ...]) -> None:
    for start, repaired in (("pruned", False), ("repaired", True)):
        tune = functools.partial(bench.tune, ratio, seed, repaired, steps)
        bench.row(f"tune {steps[-1]} steps {start} {ratio} diff_taylor seed {seed}", tune)


def measure_variants(bench: Bench, ratio: float, seed: int) -> None:
    kept = functools.partial(bench.variant, ratio, seed, calibration=bench.calibration(seed))
    bench.row(f"variant {ratio} timesteps that calibration kept seed {seed}", kept)
    each = functools.partial(bench.variant, ratio, seed, passes="layer")
    bench.row(f"variant {ratio} a pass for each layer seed {seed}", each)


def main(
    output: Annotated[Path, typer.Option(help="where compensate.json, .md and .png go")] = Path("benchmarks/results"),
    quick: Annotated[bool, typer.Option("--quick", help="one seed, diff_taylor, two ratios, 20 steps")] = False,
    threads: int = 1,
) -> None:
    """Measure what is missing, then print the table and draw the plot."""
    torch.set_num_threads(threads)
    bench = Bench(output)
    seeds = range(1 if quick else 5)
    steps = STEPS[:4] if quick else STEPS
    for ratio in (0.3, 0.5):
        for seed in seeds:
            measure_repairs(bench, ratio, seed, CRITERIA[-1:] if quick else CRITERIA)
    for seed in seeds[:2]:
        measure_tuning(bench, 0.5, seed, steps)
    for seed in () if quick else seeds:
        measure_repairs(bench, 0.7, seed)
    for seed in () if quick else seeds[:3]:
        measure_variants(bench, 0.5, seed)
    for seed in () if quick else seeds[:1]:
        measure_tuning(bench, 0.3, seed, steps)
    (output / "compensate.md").write_text(table(bench))
    plot(bench, output / "compensate.png")
    sys.stdout.write(table(bench))


if __name__ == "__main__":
    typer.run(main)
