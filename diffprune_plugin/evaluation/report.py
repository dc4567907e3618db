"""What `diffprune evaluate` measured, and what it did not and why: as JSON, as tables, and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from diffprune_plugin.planning.report import quantity
from diffprune_plugin.utils.files import new_directory
from diffprune_plugin.utils.images import image_grid, save_image

SCORE = "CLIP score"
# Measures, and the options that each of them takes.
OPTIONS = {
    "loss per timestep": ("--reference IMAGES",),
    "SSIM and PSNR to the dense model's images": ("--against DENSE", "--count 1 or more"),
    "loss difference to the dense model": ("--against DENSE", "--reference IMAGES"),
    SCORE: ("--clip DIRECTORY", "--count 1 or more"),
    "distance to real images": ("--reference IMAGES", "--features NETWORK"),
}
EVALUATION = "evaluation"  # what its directory is
# Facts of a model that are not in its table.
UNLISTED = ("name", "weights", "loss_stderr", f"{SCORE}_stderr", "loss_per_timestep", "blacked_out")


@dataclass(frozen=True)
class Evaluation:
    """``facts`` is evaluation.json; ``rows`` the images of the grid."""

    facts: dict[str, Any]
    rows: Mapping[str, Sequence[Image.Image]] = field(repr=False)

    def markdown(self) -> str:
        """The facts as tables."""
        return "\n".join(report_lines(self.facts)) + "\n"

    def write(self, output: Path, overwrite: bool = False) -> None:
        """evaluation.json, report.md and samples.png, all or nothing."""
        with new_directory(output, overwrite, EVALUATION) as directory:
            (directory / "evaluation.json").write_text(json.dumps(self.facts, indent=1, allow_nan=False) + "\n")
            (directory / "report.md").write_text(self.markdown())
            if self.rows:
                width = next(iter(self.rows.values()))[0].width
                save_image(image_grid(self.rows, scale=max(1, 96 // width)), directory / "samples.png")


def not_measured(facts: Mapping[str, Any]) -> dict[str, str]:
    """By measure, what it takes that was not there: options that were not given, or more images."""
    given = {
        "--reference IMAGES": "reference" in facts,
        "--against DENSE": "against" in facts["models"],
        "--features NETWORK": "features" in facts,
        "--clip DIRECTORY": "clip" in facts,
        "--count 1 or more": facts["drawing"]["count"] > 0,
    }
    wanted = {what: options for what, options in OPTIONS.items() if what != SCORE or "prompts" in facts["drawing"]}
    missing = {what: [option for option in options if not given[option]] for what, options in wanted.items()}
    found = {what: f"give {' and '.join(options)}" for what, options in missing.items() if options}
    for name, least in facts.get("features", {}).get("least_images", {}).items():
        drawn, real = facts["drawing"]["count"], facts["reference"]["images"]
        if min(drawn, real) < least:
            found[name] = f"needs at least {least} drawn and as many reference images, not {drawn} and {real}"
    return found


def report_lines(facts: dict[str, Any]) -> list[str]:
    """report.md, from evaluation.json alone."""
    models = list(facts["models"].values())
    drawing, compared = facts["drawing"], facts.get("compared", {})
    keys = [key for key in models[0] if key not in UNLISTED]
    lines = [
        "# Evaluation",
        "",
        *table(["", *(model["name"] for model in models)], [[k, *(cell(m, k) for m in models)] for k in keys]),
    ]
    if "SSIM" in compared:
        psnr = "the same pixels" if compared["PSNR"] is None else f"PSNR {compared['PSNR']:.2f} dB"
        lines += ["", f"From the same noise: SSIM {with_error(compared, 'SSIM')}, {psnr}."]
    if "loss_difference" in compared:
        lines += ["", f"Loss, {models[1]['name']} less {models[0]['name']}: {with_error(compared, 'loss_difference')}."]
    if drawing["count"]:
        lines += ["", "![Images from the same noise](samples.png)"]
    if "timesteps" in facts:
        curves = zip(facts["timesteps"], *(model["loss_per_timestep"] for model in models), strict=True)
        rows = [[str(t), *(f"{loss:.5f}" for loss in losses)] for t, *losses in curves]
        lines += ["", "## Loss per timestep", "", *table(["timestep", *(model["name"] for model in models)], rows)]
    lines += ["", "Drawn with: " + ", ".join(f"{key} {value}" for key, value in drawing.items()) + "."]
    if "reference" in facts:
        lines += ["Reference: {images} images, SHA-256 {sha256:.12}.".format(**facts["reference"])]
    if "features" in facts:
        name, size, digest = (facts["features"][key] for key in ("name", "size", "sha256"))
        lines += [f"{name}: {size} features, SHA-256 {digest[:12]}."]
    if "clip" in facts:
        lines += ["CLIP: {name}, weights {weights:.12}.".format(**facts["clip"])]
    for model in models:
        if "blacked_out" in model:
            black = f"{model['blacked_out']} of {drawing['count']} images"
            lines += [
                f"{model['name']}: its safety checker blacked out {black}; they were measured as they are, black."
            ]
    if facts["not_measured"]:
        lines += ["", "## Not measured", "", *(f"- {what}: {why}." for what, why in facts["not_measured"].items())]
    return lines


def cell(model: dict[str, Any], key: str) -> str:
    value = model[key]
    if isinstance(value, dict):
        return f"{value['mean']:.5g} (subsets: ± {value['subsets_std']:.2g})"
    if isinstance(value, float):
        return with_error(model, key)
    return "-" if value is None else quantity(value)


def with_error(facts: dict[str, Any], key: str) -> str:
    """The value, with its standard error where there is one, whose first two digits are shown however small it is."""
    error = facts.get(f"{key}_stderr")
    digits = max(4, 1 - math.floor(math.log10(error))) if error else 4
    return f"{facts[key]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
