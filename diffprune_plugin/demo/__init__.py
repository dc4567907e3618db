"""The model that ships inside the package, and the demo that takes it the whole way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from diffprune_plugin.checkpoint import load_pipeline
from diffprune_plugin.config import read_config
from diffprune_plugin.files import new_directory, write_text
from diffprune_plugin.report import image_grid, plan_markdown, plot_curve, save_image, size_change
from diffprune_plugin.sample import sample_images
from diffprune_plugin.workflow import Pruned, prune

HERE = Path(__file__).parent
MODEL = HERE / "model"
CALIBRATION_IMAGES = HERE / "calibration.npz"
HELD_OUT_IMAGES = HERE / "held_out.npz"
IMAGES = 8


def run(output: Path, *, seed: int = 0, overwrite: bool = False, console: Console | None = None) -> Path:
    """Copy, prune, sample, report; returns the path of the report. Raises BadInput if the folder exists."""
    console = console or Console()
    with new_directory(output, overwrite) as work:
        shutil.copytree(MODEL, work / "dense")
        shutil.copyfile(CALIBRATION_IMAGES, work / "calibration.npz")
        config_text = yaml.safe_dump(config_for(output, seed), sort_keys=False)
        (work / "config.yaml").write_text(config_text)
    console.print(f"[bold]1/3[/] prune {output / 'dense'} with importance: diff_taylor, pruning_ratio: 0.3")
    result = prune(read_config(output / "config.yaml"))
    console.print(f"[bold]2/3[/] {size_change('params', result.plan.params)}, {size_change('MACs', result.plan.macs)}")
    console.print("[bold]3/3[/] draw with both, from the same noise (50 DDIM steps)")
    rows = {}
    for name in ("dense", "pruned"):
        rows[name] = sample_images(load_pipeline(output / name), IMAGES, seed=seed)
    save_image(image_grid(rows, scale=3), output / "samples.png")
    assert result.calibration is not None
    plot_curve(result.calibration, output / "loss_curve.png")
    write_text(output / "report.md", report_text(output, result, seed))
    return output / "report.md"


def config_for(output: Path, seed: int) -> dict[str, Any]:
    """The demo's config, as a user would write it."""
    return {
        "model": str(output / "dense"),
        "output": str(output / "pruned"),
        "data": str(output / "calibration.npz"),
        "importance": "diff_taylor",
        "pruning_ratio": 0.3,
        "seed": seed,
    }


def report_text(output: Path, result: Pruned, seed: int) -> str:
    """report.md: what was done, pictures, the layer table, and the commands to repeat each step."""
    plan, calibration = result.plan, result.calibration
    assert calibration is not None
    return f"""# Demo: a diffusion model of digits, pruned

{size_change("Parameters", plan.params)}; {size_change("MACs", plan.macs)} for one 32x32 sample.

## Dense and pruned from the same noise

![samples](samples.png)

The pruned row is straight after removal, without any fine-tuning.

## Which timesteps count

![loss curve](loss_curve.png)

{int(calibration.counts.sum())} of {len(calibration.counts)} points of the loss curve are above
{calibration.sweep.threshold} of the largest loss; the gradients of {calibration.backward} samples were summed over them
({calibration.forward} samples went forward).

## Layers

{plan_markdown(plan)}

Plan {plan.sha256[:12]}, criterion {plan.criterion["name"]}, seed {seed}.

## The commands

```
diffprune prune {output / "config.yaml"} --overwrite
diffprune inspect {output / "pruned"}
diffprune sample {output / "dense"} -o dense.png --seed {seed}
diffprune sample {output / "pruned"} -o pruned.png --seed {seed}
```

In Python: `import diffprune_plugin` and then `DiffusionPipeline.from_pretrained("{output / "pruned"}")`.
"""
