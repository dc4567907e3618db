"""Models and pipelines, dense or pruned, from a directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError
from torch import nn

from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.plugins import adapter_for, denoiser_of
from diffprune_plugin.pruning.directory import component_in, model_folder, read_json
from diffprune_plugin.pruning.pruned_class import PREFIX, model_class_named, pruned_class_named
from diffprune_plugin.utils.device import check_device
from diffprune_plugin.utils.optional import check_installed


def load(directory: str | os.PathLike[str], torch_dtype: torch.dtype | None = None) -> Any:
    """The UNet of a pipeline or UNet directory, dense or pruned, in eval mode; float32 unless ``torch_dtype`` is given.

    Raises BadInput for a directory that is neither, or whose files are damaged.
    """
    folder = model_folder(Path(directory))
    name = str(read_json(folder / "config.json").get("_class_name"))
    if name.startswith(PREFIX):
        cls = getattr_or_bad(name, folder)
        return cls.from_pretrained(folder, torch_dtype=torch_dtype)
    found = getattr(diffusers, name, None) or model_class_named(name)
    if not isinstance(found, type) or not issubclass(found, ModelMixin):
        raise BadInput(f"{folder / 'config.json'}: _class_name {name!r} is no diffusers model, and no plugin has it")
    base: Any = found
    adapter_for(base)
    try:
        model = base.from_pretrained(folder, use_safetensors=True).eval()
        return model.to(torch_dtype) if torch_dtype not in (None, model.dtype) else model
    except (OSError, ValueError, SafetensorError, RuntimeError, TypeError, KeyError) as error:
        raise BadInput(f"{folder}: cannot be loaded as {name}: {first_line(error)}") from error


def getattr_or_bad(name: str, folder: Path) -> Any:
    try:
        return pruned_class_named(name)
    except AttributeError:
        raise BadInput(
            f"{folder}: no adapter for {name.removeprefix(PREFIX)}; install the plugin that brings it"
        ) from None


def load_pipeline(directory: Path, torch_dtype: torch.dtype | None = None) -> Any:
    """The whole pipeline of a directory, float32 unless told otherwise; raises BadInput if it is none or damaged."""
    if not (directory / "model_index.json").exists():
        raise BadInput(f"{directory}: no model_index.json; give a pipeline directory")
    libraries = [part[0] for part in read_json(directory / "model_index.json").values() if isinstance(part, list)]
    if "transformers" in libraries:
        check_installed("transformers")
    name = component_in(directory)
    given: dict[str, Any] = {name: load(directory, torch_dtype)} if (directory / name).is_dir() else {}
    if torch_dtype not in (None, torch.float32):
        given["torch_dtype"] = torch_dtype
    diffusers.utils.logging.disable_progress_bar()
    try:
        return DiffusionPipeline.from_pretrained(directory, use_safetensors=True, **given)
    except (OSError, ValueError, SafetensorError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise BadInput(f"{directory}: cannot be loaded as a pipeline: {first_line(error)}") from error
    finally:
        diffusers.utils.logging.enable_progress_bar()


def load_model(directory: str | Path, device: str, dtype: str) -> tuple[Any, nn.Module]:
    """The pipeline or UNet of a directory, its weights in ``dtype`` (float32 ...), and its UNet, that one on a device.

    Raises HardwareUnproved if the device is not there.
    """
    check_device(device)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if (Path(directory) / "model_index.json").exists():
        pipeline = load_pipeline(Path(directory), torch_dtype)
        return pipeline, model_of(pipeline).to(device)
    model = load(Path(directory), torch_dtype).to(device)
    return model, model


def model_of(pipeline: DiffusionPipeline) -> nn.Module:
    """The model that a pipeline denoises with; raises BadInput without one, or where its skips get something added."""
    model: nn.Module = denoiser_of(pipeline)[1]
    for name in ("controlnet", "adapter"):
        if getattr(pipeline, name, None) is not None:
            raise BadInput(
                f"{pipeline.name_or_path}: {type(pipeline).__name__} adds the outputs of its {name} to the UNet's skip "
                "connections, whose widths change; prune the pipeline without it"
            )
    return model
