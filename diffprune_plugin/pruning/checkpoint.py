"""Pruned UNets on disk: a diffusers directory with the dense config, the plan and safetensors."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError
from torch import nn

from diffprune_plugin.adapters.state import check_stock
from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.planning.plan import PLAN_FILE, PruningPlan, architecture_hash
from diffprune_plugin.plugins import (
    adapter_for,
    adapters,
    class_names,
    components,
    denoiser_of,
    find_adapter,
    plugin_manager,
)
from diffprune_plugin.utils.device import check_device
from diffprune_plugin.utils.files import new_directory
from diffprune_plugin.utils.optional import check_installed
from diffprune_plugin.utils.tensors import load_tensors, save_tensors

PREFIX = "Pruned"
WEIGHTS = "diffusion_pytorch_model.safetensors"


class PrunedModelMixin:
    """What a pruned UNet class adds to its diffusers class: it carries its plan, and saves and loads with it.

    Listed in ``model_index.json`` as ``["diffprune_plugin", "Pruned..."]``, so that after ``import diffprune_plugin``
    the ordinary ``DiffusionPipeline.from_pretrained`` loads it.
    """

    pruning_plan: PruningPlan

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write config.json (dense), pruning_plan.json and safetensors; other arguments of diffusers have no effect."""
        write_model(self, Path(save_directory))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Any:
        """The pruned UNet of a local directory in eval mode; float32, as in diffusers, unless ``dtype`` (in older
        diffusers ``torch_dtype``) is given.

        ``device_map``: a device, to which it goes. Raises BadInput for a directory that is no pruned UNet or was
        damaged, a ``device_map`` of several devices, or a ``quantization_config``.
        """
        device = one_device(kwargs.get("device_map"))
        if kwargs.get("quantization_config") is not None:
            raise BadInput("quantization_config: is not applied to a pruned UNet; load it without and quantize it then")
        directory = Path(pretrained_model_name_or_path) / (subfolder or "")
        model = read_pruned(cls, directory, dtype or torch_dtype or torch.float32)
        return model if device is None else model.to(device)


def one_device(device_map: Any) -> torch.device | None:
    """The device of a map that names one for the whole model; raises BadInput for any other map."""
    if isinstance(device_map, dict) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map is None or isinstance(device_map, torch.device):
        return device_map
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise BadInput(f"device_map: {device_map!r}: a pruned UNet goes to one device; give its name") from None


@functools.cache
def pruned_class(base: Any) -> type:
    """The pruned twin of a diffusers UNet class: PrunedUNet2DModel for UNet2DModel."""
    name = PREFIX + base.__name__
    module = __name__.split(".")[0]
    return type(name, (PrunedModelMixin, base), {"__module__": module, "__doc__": f"{base.__name__} after pruning."})


def pruned_class_named(name: str) -> type:
    """The pruned class of this name; raises AttributeError if no adapter knows the UNet class behind it."""
    base = model_class_named(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if base is None:
        raise AttributeError(f"module 'diffprune_plugin' has no attribute {name!r}")
    return pruned_class(base)


def model_class_named(name: str) -> Any:
    """The UNet class that an adapter describes; None if none does, or its module has no such class."""
    known = adapters(plugin_manager())
    return getattr(importlib.import_module(known[name].value.module), name, None) if name in known else None


def as_pruned_(model: nn.Module, plan: PruningPlan) -> None:
    """Make a UNet whose channels are gone an instance of the pruned class, with its plan."""
    base: Any = type(model)
    if not isinstance(model, PrunedModelMixin):
        model.__class__ = pruned_class(base)
    model.pruning_plan = plan  # type: ignore[assignment]


def check_architecture(model: nn.Module, plan: PruningPlan, where: str) -> None:
    """Raises BadInput if the UNet was pruned before, or its config is not the one that the plan was made for."""
    if isinstance(model, PrunedModelMixin):
        raise BadInput(f"{where} is pruned already (plan {model.pruning_plan.sha256[:12]}); start from the dense model")
    if plan.model_class not in class_names(type(model)) or architecture_hash(model) != plan.architecture:
        raise BadInput(f"{where}: the plan was made for another architecture ({plan.model_class}); make it again")


def write_model(model: Any, directory: Path) -> None:
    """config.json, the weights and, for a pruned UNet, its plan."""
    directory.mkdir(parents=True, exist_ok=True)
    model.save_config(str(directory))
    metadata = {}
    if isinstance(model, PrunedModelMixin):
        model.pruning_plan.write(directory / PLAN_FILE)
        metadata["plan"] = model.pruning_plan.sha256
    save_tensors(model.state_dict(), directory / WEIGHTS, metadata)


def read_pruned(cls: type, directory: Path, dtype: torch.dtype) -> Any:
    """Rebuild the pruned architecture from the dense config and the plan's sizes, then fill in the weights."""
    plan = PruningPlan.read(directory / PLAN_FILE)
    # Copied: tensors as the file maps them may lie unaligned, and then some kernels round differently.
    state = {k: v.to(dtype, copy=True) for k, v in read_weights(directory / WEIGHTS, plan).items()}
    base = next((c for c in cls.__mro__ if c.__name__ == plan.model_class), None)
    if base is None:
        raise BadInput(f"{directory / PLAN_FILE}: a plan for {plan.model_class}, beside a {cls.__name__}")
    config = {key: value for key, value in read_json(directory / "config.json").items() if not key.startswith("_")}
    try:
        with init_empty_weights():
            model: Any = base(**config)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise BadInput(f"{directory / 'config.json'}: no {plan.model_class}: {first_line(error)}") from None
    check_architecture(model, plan, str(directory))
    resize_(model, plan)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise BadInput(f"{directory / WEIGHTS}: does not fit the plan beside it: {first_line(error)}") from None
    adapter = find_adapter(model)
    adapter.set_heads_(model, plan.heads)
    adapter.mend_(model)
    as_pruned_(model, plan)
    model.register_to_config(_name_or_path=str(directory))
    return model.eval()


def resize_(model: nn.Module, plan: PruningPlan) -> None:
    """Give every layer that the plan changed its new shape, with empty parameters."""
    for name, size in plan.layers.items():
        layer: Any = model.get_submodule(name)
        into, out = size.after
        if isinstance(layer, nn.Conv2d):
            layer.in_channels, layer.out_channels = into, out
        elif isinstance(layer, nn.Linear):
            layer.in_features, layer.out_features = into, out
        elif isinstance(layer, nn.GroupNorm):
            layer.num_channels = out
        elif isinstance(layer, nn.LayerNorm):
            layer.normalized_shape = (out,)
        elif isinstance(layer, nn.Embedding):
            layer.embedding_dim = out
        else:
            raise BadInput(f"{name}: a {type(layer).__name__} in the plan, which cannot be rebuilt")
        for key, parameter in layer.named_parameters(recurse=False):
            shape = list(parameter.shape)
            if isinstance(layer, nn.Embedding):
                shape[1] = out
            else:
                shape[0] = out
                if len(shape) > 1:
                    shape[1] = into
            setattr(layer, key, nn.Parameter(torch.empty(shape, device="meta")))


def read_weights(path: Path, plan: PruningPlan) -> dict[str, torch.Tensor]:
    """The tensors of a weights file; raises BadInput if it is missing, damaged, altered or belongs to another plan."""
    state, metadata = load_tensors(path)
    if metadata.get("plan") != plan.sha256:
        raise BadInput(f"{path}: belongs to another plan than {path.parent / PLAN_FILE}; restore both files")
    return state


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


def save(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    extra: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a pipeline or a UNet, dense or pruned, as a diffusers directory, all of it or nothing; returns the path.

    ``extra``: further files by name. Raises BadInput if the directory exists and ``overwrite`` is not set, or for
    a masked UNet, which `save_masked` writes.
    """
    path = Path(directory)
    name, denoiser = denoiser_of(model) if isinstance(model, DiffusionPipeline) else ("", model)
    check_stock(denoiser)
    with new_directory(path, overwrite) as temporary:
        if isinstance(model, DiffusionPipeline):
            # A pipeline remembers the class that its UNet had when it was made: before remove_ gave it its own.
            model.register_modules(**{name: denoiser})
            model.save_pretrained(str(temporary), safe_serialization=True)
        else:
            write_model(model, temporary)
        for name, content in (extra or {}).items():
            (temporary / name).write_bytes(content.encode() if isinstance(content, str) else content)
        for file in files_below(temporary):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    return path


def files_below(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file())


CONFIG_FILE = "diffprune.yaml"


COMPENSATION_FILE = "compensation.json"


def progress_directory(output: str | Path) -> Path:
    """Where an interrupted run keeps what it needs to go on: beside the output."""
    return Path(output).parent / f".{Path(output).name}.progress"


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
