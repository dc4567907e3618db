"""What lies where in a model directory, read without the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.planning.plan import PLAN_FILE, PruningPlan
from diffprune_plugin.plugins import components

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG_FILE = "diffprune.yaml"
COMPENSATION_FILE = "compensation.json"


def progress_directory(output: str | Path) -> Path:
    """Where an interrupted run keeps what it needs to go on: beside the output."""
    return Path(output).parent / f".{Path(output).name}.progress"


def model_folder(directory: Path) -> Path:
    """Where the UNet of a pipeline or UNet directory lies; raises BadInput if it is neither."""
    if not directory.is_dir():
        raise BadInput(f"{directory}: no such directory; give a pipeline directory or a UNet directory")
    name = component_in(directory) if (directory / "model_index.json").exists() else ""
    folder = directory / name
    if not (folder / "config.json").exists():
        raise BadInput(f"{directory}: neither a pipeline (model_index.json, unet/) nor a UNet (config.json) directory")
    return folder


def component_in(directory: Path) -> str:
    """The component of a pipeline directory that denoises; the first there could be if it has none."""
    names = components()
    return next((name for name in names if (directory / name).is_dir()), names[0])


def read_plan(directory: Path) -> PruningPlan:
    """The plan of a pruned pipeline or UNet directory; raises BadInput if it has none."""
    folder = model_folder(directory)
    if not (folder / PLAN_FILE).exists():
        raise BadInput(
            f"{directory}: not pruned (no {PLAN_FILE}); prune it with: diffprune prune CONFIG --model {directory}"
        )
    return PruningPlan.read(folder / PLAN_FILE)


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file; raises BadInput if there is none."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: not readable as JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds a {type(content).__name__}, not an object")
    return content
