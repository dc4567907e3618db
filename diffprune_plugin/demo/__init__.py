"""The model that ships inside the package, and the demo that takes it the whole way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from rich.console import Console

from diffprune_plugin.calibration.plot import plot_curve
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.evaluation.sampling import sample_images
from diffprune_plugin.evaluation.settings import SamplingSettings
from diffprune_plugin.export.providers import check_distribution
from diffprune_plugin.planning.report import plan_markdown, size_change
from diffprune_plugin.pruning.loading import load_pipeline
from diffprune_plugin.pruning.saving import PRUNED
from diffprune_plugin.utils.files import new_directory, write_list, write_text
from diffprune_plugin.utils.html_report import write_report
from diffprune_plugin.utils.images import image_grid, save_image
from diffprune_plugin.utils.optional import need
from diffprune_plugin.workflow import Pruned, prune

HERE = Path(__file__).parent
MODEL = HERE / "model"
CALIBRATION_IMAGES = HERE / "calibration.npz"
HELD_OUT_IMAGES = HERE / "held_out.npz"
IMAGES = 8
BUDGET = 0.45  # of the dense MACs
NEEDED = ("markdown", "matplotlib", "onnxscript", "onnxruntime")  # for pictures and export


def run(output: Path, *, seed: int = 0, overwrite: bool = False, console: Console | None = None) -> Path:
    """Copy, prune, compensate, sample, export, report; returns the path of the report.

    Raises MissingExtra without the extras eval and cpu, BadInput if the folder exists, CheckFailed if the exported
    model does not compute what PyTorch does.
    """
    for module in NEEDED:  # before the minutes of work
        need(module)
    check_distribution()
    console = console or Console()
    with new_directory(output, overwrite, "demo") as work:
        shutil.copytree(MODEL, work / "dense")
        shutil.copyfile(CALIBRATION_IMAGES, work / "calibration.npz")
        (work / "config.yaml").write_text(yaml.safe_dump(config_for(output, seed), sort_keys=False))
        make(work, output, seed, console)
        name_(work, output)
    return output / "report.md"


def make(work: Path, output: Path, seed: int, console: Console) -> None:
    """Everything that the demo shows, in a folder that becomes the output."""
    config = PruningConfig(**config_for(work, seed))
    plain = config.model_copy(update={"allocation": "uniform", "output": str(work / "uniform")})
    console.print(f"[bold]1/4[/] prune {output / 'dense'} to macs_target: {BUDGET} by one ratio; compensate")
    uniform = prune(plain)
    console.print(f"[bold]2/4[/] {size_change('MACs', uniform.plan.macs)}; as many, where they cost least; compensate")
    result = prune(config)
    console.print("[bold]3/4[/] draw with all three, from the same noise (50 DDIM steps)")
    draw(work, seed)
    plot_calibration(result, uniform, work)
    result.plot(work / "widths.png")
    console.print("[bold]4/4[/] export to ONNX, verify against PyTorch, time against the dense model")
    verdict = export(work, lambda line: console.print(line.replace(str(work), str(output)), markup=False))
    report = report_text(work, uniform, result, verdict, seed)
    write_text(work / "report.md", report)
    write_report(work / "report.html", "Demo: a diffusion model of digits, pruned", report, work)


def name_(work: Path, output: Path) -> None:
    """Name the output where a text names the folder that was worked in."""
    for file in [path for path in work.rglob("*") if path.suffix in (".json", ".md", ".html", ".yaml")]:
        named = text = file.read_text()
        for before, after in ((os.path.relpath(work), os.path.relpath(output)), (str(work), str(output))):
            for form in (str, in_json, in_yaml):
                named = named.replace(form(before), form(after))
        if named != text:
            file.write_text(named)
    for folder in ("pruned", "uniform"):
        write_list(work / folder, PRUNED)


def in_json(text: str) -> str:
    """As JSON spells what is no ASCII."""
    return json.dumps(text)[1:-1]


def in_yaml(text: str) -> str:
    return str(yaml.safe_dump(text, default_style='"', width=10**6)).strip()[1:-1]


def config_for(output: Path, seed: int) -> dict[str, Any]:
    """The demo's config, as a user would write it."""
    return {
        "model": str(output / "dense"),
        "output": str(output / "pruned"),
        "data": str(output / "calibration.npz"),
        "calibration": str(output / "calibration"),
        "importance": "diff_taylor",
        "macs_target": BUDGET,
        "seed": seed,
    }


def draw(output: Path, seed: int) -> None:
    """Images of the dense model, pruned by one ratio, and where it costs least, from the same noise."""
    rows: dict[str, list[Image.Image]] = {}
    settings = SamplingSettings(count=IMAGES, seed=seed)
    for name, folder in (("dense", "dense"), ("one ratio", "uniform"), ("allocated", "pruned")):
        rows[name] = sample_images(load_pipeline(output / folder), settings, progress=False)
    save_image(image_grid(rows, scale=3), output / "samples.png")


def plot_calibration(result: Pruned, uniform: Pruned, output: Path) -> None:
    calibration = result.calibration or uniform.calibration
    assert calibration is not None
    plot_curve(calibration, output / "loss_curve.png")


def export(output: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """model.onnx of the pruned model with its verdict, latency tables and plot."""
    from diffprune_plugin.export import tables
    from diffprune_plugin.export.benchmark import Latency
    from diffprune_plugin.export.options import Options
    from diffprune_plugin.export.workflow import run

    def keep(latency: Latency) -> None:
        write_text(output / "latency.md", tables.markdown(latency))
        tables.plot(latency, output / "latency.png")

    options = Options(baseline=output / "dense", torch=True, budget=20, provider="cpu")
    return run(output / "pruned", output / "model.onnx", options, say, keep).content


def report_text(output: Path, uniform: Pruned, result: Pruned, verdict: dict[str, Any], seed: int) -> str:
    """report.md: what was done, pictures, the layer table, the verdict, and the commands to repeat each step."""
    plan, calibration, compensation = result.plan, uniform.calibration, result.compensation
    assert calibration is not None
    assert compensation is not None
    refitted = sum(repair.refitted for repair in compensation.repairs)
    return f"""# Demo: a diffusion model of digits, pruned

{size_change("Parameters", plan.params)}; {size_change("MACs", plan.macs)} for one 32x32 sample.

## Dense, pruned by one ratio, and pruned where it costs least, from the same noise

![samples](samples.png)

Both pruned models have {BUDGET:.0%} of the dense MACs. By one ratio: {size_change("parameters", uniform.plan.params)};
allocated by what each cut does to the output: {size_change("parameters", plan.params)}.

No row was fine-tuned. Compensation refitted {refitted} of {len(compensation.repairs)} layer sums to the dense model's
outputs by ridge regression, with {compensation.samples} noisy images.

## Where the channels went

![widths](widths.png)

A row a coupled group, in the order of execution: its channels before and after, and what each width would do to the
output by itself; the chosen ones are marked.

## Which timesteps count

![loss curve](loss_curve.png)

{int(calibration.counts.sum())} of {len(calibration.counts)} points of the loss curve are above
{calibration.sweep.threshold} of the largest loss; the gradients of {calibration.backward} samples were summed over them
({calibration.forward} samples went forward).

## ONNX: {"verified" if verdict["passed"] else "rejected"}

![latency](latency.png)

{(output / "latency.md").read_text()}
## Layers

{plan_markdown(plan)}

Plan {plan.sha256[:12]}, criterion {plan.criterion["name"]}, seed {seed}.

## The commands

```
diffprune prune {output / "config.yaml"} --overwrite
diffprune prune {output / "config.yaml"} --set allocation=uniform --output {output / "uniform"} --overwrite
diffprune frontier {output / "config.yaml"}
diffprune inspect {output / "pruned"}
diffprune sample {output / "dense"} -o dense.png --seed {seed}
diffprune sample {output / "pruned"} -o pruned.png --seed {seed}
diffprune-export {output / "model.onnx"} --model {output / "pruned"} --baseline {output / "dense"} --torch --overwrite
```

In Python: `import diffprune_plugin` and then `DiffusionPipeline.from_pretrained("{output / "pruned"}")`.

<details><summary>The verdict as JSON</summary>

```json
{json.dumps(verdict, indent=1)}
```
</details>
"""
