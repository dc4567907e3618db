"""Commands that look at what a model draws: sample, evaluate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from diffprune_plugin.cli.console import console, say
from diffprune_plugin.cli.options import Device, Json, Pipeline, PromptsFile
from diffprune_plugin.evaluation.settings import LARGEST, Drawing, SamplingSettings
from diffprune_plugin.export.options import Overwrite, Report
from diffprune_plugin.utils.command_options import with_options
from diffprune_plugin.utils.written_paths import check_different

COLUMNS = 8  # of the picture


@with_options(SamplingSettings)
def sample(
    *,
    directory: Pipeline,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file with the images.")],
    options: SamplingSettings,
    prompts: PromptsFile = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Draw images; the same seed gives every model the same noise."""
    from diffprune_plugin.evaluation.prompts import read_prompts
    from diffprune_plugin.evaluation.sampling import sample_images
    from diffprune_plugin.pruning.loading import load_pipeline
    from diffprune_plugin.utils.device import check_device
    from diffprune_plugin.utils.files import check_picture
    from diffprune_plugin.utils.images import image_grid, save_image

    check_device(device)
    check_picture(output, overwrite)
    if prompts:
        options = replace(options, prompts=read_prompts(prompts))
    images = sample_images(load_pipeline(directory).to(device), options)
    rows = {" " * start: images[start : start + COLUMNS] for start in range(0, len(images), COLUMNS)}
    rows = {f"{directory}, seed {options.seed}": rows.pop(""), **rows}
    save_image(image_grid(rows, scale=2 if images[0].width < 128 else 1), output)
    say(f"wrote {output}")


@with_options(Drawing)
def evaluate(
    *,
    directory: Pipeline,
    against: Annotated[Path | None, typer.Option(help="Dense pipeline directory to compare with.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Real images: a folder (captions: metadata.jsonl) or .npz.")
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(help="Height and width to which real images are resized and cropped.", min=1, max=LARGEST),
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Feature network (.onnx), or Inception's weights (.safetensors).")
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="Directory of a CLIP: how well images fit their prompts.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the result.")] = Path("evaluation"),
    options: Drawing,
    prompts: PromptsFile = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    report: Report = None,
    json: Json = False,
) -> None:
    """Measure a model: size, loss per timestep, distance to real images, likeness to the dense model's images."""
    from diffprune_plugin.evaluation.evaluate import run
    from diffprune_plugin.utils.html_report import check_report, write_report

    if report:
        check_report(report, overwrite)
        check_different({"--report": report}, output)
    result = run(
        directory,
        output,
        against=against,
        reference=reference,
        features=features,
        clip=clip,
        prompts=prompts,
        resolution=resolution,
        drawing=options,
        device=device,
        overwrite=overwrite,
    )
    if report:
        write_report(report, f"Evaluation of {directory}", (output / "report.md").read_text(), output)
    if json:
        console.print_json(data=result.facts)
        return
    say(result.markdown())
    say(f"wrote {' and '.join(str(path) for path in (output, report) if path)}")
