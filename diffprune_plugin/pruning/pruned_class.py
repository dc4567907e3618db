"""A pruned model's class: the diffusers class that carries its plan, and saves and loads with it."""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import json
import os
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import nn

from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.planning.plan import PLAN_FILE, PruningPlan, architecture_hash
from diffprune_plugin.plugins import adapters, class_names, find_adapter, plugin_manager
from diffprune_plugin.pruning.building import at_most, foreign_errors
from diffprune_plugin.pruning.directory import (
    LOADER_FILE,
    PREFIX,
    WEIGHTS,
    described_in,
    loader_bytes,
    read_json,
    to_json,
    without_paths,
)
from diffprune_plugin.pruning.skipped import skip_, skipped_in
from diffprune_plugin.utils.tensors import load_tensors, save_tensors

PLAN_KEY = "_pruning_plan"  # of a pruned model's config
TENSORS = 100  # of a block at most
PLAN_IN_WEIGHTS = "pruning_plan"  # of the weights' metadata: diffusers downloads no further files from a hub
LOADING_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")  # diffusers' names


class PrunedModelMixin:
    """What a pruned model's class adds to its diffusers class: it carries its plan, and saves and loads with it.

    Listed in ``model_index.json`` as ``["diffprune_plugin", "Pruned..."]``, so that after ``import diffprune_plugin``
    the ordinary ``DiffusionPipeline.from_pretrained`` loads it. The plan is in the config too, as ``_pruning_plan``, so
    that whatever rebuilds a model from its config (`EMAModel`, ``from_config``) gets the pruned sizes.
    """

    pruning_plan: PruningPlan

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write config.json (dense), pruning_plan.json, safetensors, and a loader for those without this package; other
        arguments of diffusers have no effect.

        Raises BadInput, before anything is written, for a model that could not be loaded again.
        """
        model: Any = self
        check_loadable(model)
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        model.save_config(str(directory))
        self.pruning_plan.write(directory / PLAN_FILE)
        facts = {"plan": self.pruning_plan.sha256, PLAN_IN_WEIGHTS: self.pruning_plan.as_json()}
        wrapped = {name: self.get_submodule(name).wrapped for name in self.pruning_plan.skipped}  # type: ignore[attr-defined]
        facts |= {"skipped": json.dumps(wrapped)} if wrapped else {}
        facts["heads"] = json.dumps({name: left for name, (_, left) in self.pruning_plan.heads.items()})
        if base_of(type(model)).__module__.startswith("diffusers."):  # what it builds without this package
            (directory / LOADER_FILE).write_bytes(loader_bytes())
            facts["loader"] = hashlib.sha256(loader_bytes()).hexdigest()
        save_tensors(model.state_dict(), directory / WEIGHTS, facts)

    def to_json_string(self) -> str:
        """What config.json holds: the plan lies beside it."""
        content: dict[str, Any] = json.loads(super().to_json_string())  # type: ignore[misc]
        return to_json(without_paths({key: value for key, value in content.items() if key != PLAN_KEY}))

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The pruned architecture with new weights, from a pruned model's config or directory.

        Raises BadInput for a config without its plan, or a plan of another architecture.
        """
        if isinstance(config, (str, os.PathLike)):
            folder = Path(config) / (kwargs.pop("subfolder", None) or "")
            where = str(folder)
            plan = plan_in(folder)
            config = read_json(described_in(folder))
        elif PLAN_KEY in (config or {}):
            plan, where = PruningPlan.model_validate(config[PLAN_KEY]), cls.__name__
        else:
            raise BadInput(
                f"{cls.__name__}.from_config: the config has no {PLAN_KEY}, so it does not say what was pruned; give a "
                "pruned model's config or its directory"
            )
        base = base_of(cls)
        model, unused = base.from_config(config, return_unused_kwargs=True, **kwargs)
        check_architecture(model, plan, where)
        adapter = find_adapter(model)
        skip_(model, plan.skipped, adapter)
        resize_(model, plan)
        adapter.set_heads_(model, plan.heads)
        adapter.mend_(model)
        with_plan_(model, plan)
        return (model, unused) if return_unused_kwargs else model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The pruned model of a local directory in eval mode; float32, as in diffusers, unless ``dtype`` (in older
        diffusers ``torch_dtype``) is given; "auto" is that of the file.

        ``device_map``: a device, to which it goes. Raises BadInput for a directory that is no pruned model or was
        damaged, a ``device_map`` of several devices, or a ``quantization_config``.
        """
        device = one_device(kwargs.get("device_map"))
        if kwargs.get("quantization_config") is not None:
            raise BadInput("quantization_config: is not applied to a pruned UNet; load it without and quantize it then")
        directory = Path(pretrained_model_name_or_path) / (subfolder or "")
        model = read_pruned(cls, directory, dtype or torch_dtype or torch.float32)
        model = model if device is None else model.to(device)
        return (model, {key: [] for key in LOADING_INFO}) if output_loading_info else model


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
    """Make a model whose channels are gone an instance of the pruned class, with its plan; its pipelines are told."""
    with_plan_(model, plan)
    pipelines: list[Any] = [each for each in gc.get_objects() if issubclass(type(each), DiffusionPipeline)]
    for pipeline in pipelines:  # each wrote down the class of the model when it was made
        for name in [key for key, part in vars(pipeline).items() if part is model and key in pipeline.config]:
            pipeline.register_modules(**{name: model})


def with_plan_(model: Any, plan: PruningPlan) -> None:
    """Give a model the pruned class and its plan."""
    if not isinstance(model, PrunedModelMixin):
        base: Any = type(model)
        twin: Any = pruned_class(base)
        model.__class__ = twin
    model.pruning_plan = plan
    model.register_to_config(**{PLAN_KEY: plan.model_dump(mode="json")})


def base_of(cls: Any) -> Any:
    """The diffusers class behind a pruned class."""
    return next(base for base in cls.__mro__ if not issubclass(base, PrunedModelMixin))


def check_loadable(model: Any) -> None:
    """Raises BadInput for a model that nothing could load again: its class is in no adapter, or its plan is missing."""
    base = base_of(type(model))
    known = base in (model_class_named(base.__name__), getattr(diffusers, base.__name__, None))
    if not known or type(model) not in (base, pruned_class(base)):
        own = type(model) if known else base
        raise BadInput(
            f"{own.__name__} is a class of your own, which could not be loaded again; register a ModelAdapter that "
            "names it (model_class, module)"
        )
    if isinstance(model, PrunedModelMixin) and not hasattr(model, "pruning_plan"):
        raise BadInput(f"a {type(model).__name__} without a plan has the dense sizes; use from_pretrained or remove_")
    stated = model.pruning_plan.skipped if isinstance(model, PrunedModelMixin) else ()
    if unknown := sorted(skipped_in(model) - set(stated)):
        raise BadInput(
            f"{', '.join(unknown)}: gone, but no plan says so, and it could not be loaded again; use remove_"
        )


def check_architecture(model: nn.Module, plan: PruningPlan, where: str) -> None:
    """Raises BadInput if the UNet was pruned before, or its config is not the one that the plan was made for."""
    if isinstance(model, PrunedModelMixin):
        raise BadInput(f"{where} is pruned already (plan {model.pruning_plan.sha256[:12]}); start from the dense model")
    if plan.model_class not in class_names(type(model)) or architecture_hash(model) != plan.architecture:
        raise BadInput(f"{where}: the plan was made for another architecture ({plan.model_class}); make it again")


def check_dense(dense: nn.Module, model: nn.Module, where: str) -> None:
    """Raises BadInput unless ``dense`` is what a model was pruned from; where that had lost whole blocks by then, or
    was not pruned at all, unless it is of the same class and takes and gives the same. Configs count, no weights."""
    plan: PruningPlan | None = getattr(model, "pruning_plan", None)
    if isinstance(dense, PrunedModelMixin):
        raise BadInput(f"{where} is pruned already; give the dense model's directory")
    if plan is None or set(plan.depth) - set(plan.skipped):
        adapter, other = find_adapter(dense), find_adapter(model)
        same = adapter.model_class == other.model_class and adapter.shapes(dense) == other.shapes(model)
        sizes = [(each.channels(of), each.sample_shape(of)) for each, of in ((adapter, dense), (other, model))]
        if not same or sizes[0] != sizes[1]:
            raise BadInput(f"{where} is not the dense model that this one came from; give its directory")
    else:
        check_architecture(dense, plan, where)


def read_pruned(cls: Any, directory: Path, dtype: torch.dtype | str) -> Any:
    """Rebuild the pruned architecture from the dense config and the plan's sizes, then fill in the weights."""
    plan = plan_in(directory)
    if plan.model_class not in class_names(cls):
        raise BadInput(f"{directory / PLAN_FILE}: a plan for {plan.model_class}, beside a {cls.__name__}")
    state = read_weights(directory / WEIGHTS, plan)
    dtype = next(iter(state.values())).dtype if dtype == "auto" else as_dtype(dtype)
    place = str(described_in(directory))
    expected = len(state) + TENSORS * len(plan.skipped)  # blocks are made before they are skipped
    with foreign_errors(f"{place}: no {plan.model_class}"), at_most(expected, place), init_empty_weights():
        model = cls.from_config(directory)
    try:
        # Copied: tensors as the file maps them may lie unaligned, and then some kernels round differently.
        model.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in state.items()}, assign=True)
    except RuntimeError as error:
        raise BadInput(f"{directory / WEIGHTS}: does not fit the plan beside it: {first_line(error)}") from None
    model.register_to_config(_name_or_path=str(directory))
    return model.eval()


def plan_in(directory: Path) -> PruningPlan:
    """The plan of a pruned model's folder; the copy in its weights where diffusers downloaded nothing else."""
    weights = directory / WEIGHTS
    if (directory / PLAN_FILE).exists() or not weights.is_file():
        return PruningPlan.read(directory / PLAN_FILE)
    with foreign_errors(f"{weights}: truncated or damaged"), safe_open(weights, "pt") as file:
        text = (file.metadata() or {}).get(PLAN_IN_WEIGHTS)
    return PruningPlan.read(directory / PLAN_FILE) if text is None else PruningPlan.parse(text, str(weights))


def as_dtype(dtype: Any) -> torch.dtype:
    """Raises BadInput for what is no dtype."""
    if not isinstance(dtype, torch.dtype):
        raise BadInput(f"torch_dtype: {dtype!r} is neither a torch.dtype nor 'auto'")
    return dtype


def resize_(model: nn.Module, plan: PruningPlan) -> None:
    """Give every layer that the plan changed its new shape; its parameters are cut to it."""
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
            setattr(layer, key, nn.Parameter(parameter.detach()[tuple(slice(size) for size in shape)].clone()))


def read_weights(path: Path, plan: PruningPlan) -> dict[str, torch.Tensor]:
    """The tensors of a weights file; raises BadInput if it is missing, damaged, altered or belongs to another plan."""
    state, metadata = load_tensors(path)
    if metadata.get("plan") != plan.sha256:
        raise BadInput(f"{path}: belongs to another plan than {path.parent / PLAN_FILE}; restore both files")
    return state
