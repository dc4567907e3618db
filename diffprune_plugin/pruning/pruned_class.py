"""A pruned model's class: the diffusers class that carries its plan, and saves and loads with it."""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.planning.plan import PLAN_FILE, PruningPlan, architecture_hash
from diffprune_plugin.plugins import adapters, class_names, find_adapter, plugin_manager
from diffprune_plugin.pruning.directory import WEIGHTS, read_json
from diffprune_plugin.utils.tensors import load_tensors, save_tensors

PREFIX = "Pruned"


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
