"""Models and pipelines, dense or pruned, from a directory."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from diffprune_plugin.adapters.ports import config_of
from diffprune_plugin.errors import BadInput
from diffprune_plugin.plugins import adapter_for, denoiser_of, find_adapter
from diffprune_plugin.pruning.building import at_most, foreign_errors
from diffprune_plugin.pruning.directory import PREFIX, class_in, component_in, described_in, model_folder, read_json
from diffprune_plugin.pruning.index import INDEX_FILE, read_index
from diffprune_plugin.pruning.pruned_class import PrunedModelMixin, model_class_named, pruned_class_named
from diffprune_plugin.pruning.weights import UnusedTensors, check_used, tensors_in, variant_of, weight_files
from diffprune_plugin.utils.device import check_device
from diffprune_plugin.utils.optional import check_installed

LONGEST_SIDE = 16_384  # of a sample


def load(
    directory: str | os.PathLike[str],
    torch_dtype: torch.dtype | None = None,
    *,
    variant: str | None = None,
    unused_tensors: UnusedTensors = "refuse",
) -> Any:
    """The UNet of a pipeline or UNet directory, dense or pruned, in eval mode; float32 unless ``torch_dtype`` is given.

    ``variant``: of the weights, as in ``diffusion_pytorch_model.fp16.safetensors``; not needed where there is one only.
    ``unused_tensors``: "ignore" goes on where the weights hold more than the model takes, as with copies for EMA.

    Raises BadInput for a directory that is neither, or whose files are damaged or do not fit each other.
    """
    folder = model_folder(Path(directory))
    cls = model_class_in(folder)
    if issubclass(cls, PrunedModelMixin):
        return cls.from_pretrained(folder, torch_dtype=torch_dtype)
    return load_dense(cls, folder, torch_dtype, variant, unused_tensors)


def bare(directory: str | os.PathLike[str]) -> Any:
    """The same model by its config, and a pruned one's plan, alone: without weights (meta device). Raises as `load`."""
    folder = model_folder(Path(directory))
    cls, config = model_class_in(folder), described_in(folder)
    given = folder if issubclass(cls, PrunedModelMixin) else read_json(config)
    limit = at_most(len(tensors_in(weight_files(folder)[variant_of(folder, None)])), str(config))
    with quiet(), foreign_errors(f"{config}: no {cls.__name__}"), limit, init_empty_weights():
        return cls.from_config(given)


def model_class_in(folder: Path) -> Any:
    """The class of the model in a folder, a pruned one's by its name; raises BadInput for one that nobody knows."""
    config = described_in(folder)
    name = class_in(config)
    if name.startswith(PREFIX):
        return getattr_or_bad(name, folder)
    found = getattr(diffusers, name, None) or model_class_named(name)
    if not isinstance(found, type) or not issubclass(found, ModelMixin):
        raise BadInput(f"{config}: _class_name {name!r} is no diffusers model, and no plugin has it")
    adapter_for(found)
    return found


def load_dense(
    cls: Any, folder: Path, torch_dtype: torch.dtype | None, variant: str | None, unused_tensors: UnusedTensors
) -> Any:
    """A model of a diffusers class from its folder; raises BadInput unless weights and config match."""
    variant = variant_of(folder, variant)
    tensors = tensors_in(weight_files(folder)[variant])
    place = f"{folder}: cannot be loaded as {cls.__name__}"
    with quiet(), foreign_errors(place), at_most(len(tensors), str(folder / "config.json")):
        model, info = cls.from_pretrained(folder, use_safetensors=True, variant=variant, output_loading_info=True)
    check_used(model, tensors, info, folder, unused_tensors)
    check_computes(model.eval(), folder / "config.json")
    return model if torch_dtype in (None, model.dtype) else cast_(model, torch_dtype)


def cast_(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What is saved of a model in another dtype; what it computes itself, as DiT's positions, stays as in diffusers."""
    saved = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in saved and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)  # one after another: memory holds no second model
    return model


@torch.no_grad()
def check_computes(model: nn.Module, where: Path) -> None:
    """Raises BadInput unless a model's smallest forward works: some damage to a config shows only there."""
    adapter = find_adapter(model)
    with foreign_errors(f"{where}: the model does not compute"):
        try:
            adapter.check(model)
        except BadInput:  # nothing that it knows; it says so, by name, when the model is to be pruned
            return
        size = adapter.size(config_of(model))
        output = model(**adapter.trace_inputs(model), return_dict=False)[0]
    if not all(type(length) is int and 1 <= length <= LONGEST_SIDE for length in size):
        raise BadInput(f"{where}: sample_size {size[0]!r} is not between 1 and {LONGEST_SIDE}; restore it")
    # A model that has diverged is no damaged directory: who draws from it or measures it is told.
    if not output.isfinite().all() and all(bool(p.isfinite().all()) for p in model.parameters()):
        raise BadInput(f"{where}: the model's output is not finite; restore the config")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What diffusers warns of while it loads a model is checked here."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before)


@contextlib.contextmanager
def without_a_doubt() -> Iterator[None]:
    """diffusers prints a pruned model whole, as it cannot tell that its class is right for the pipeline; we can."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_loading_utils")

    def other(record: logging.LogRecord) -> bool:
        return "non-standard module" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def getattr_or_bad(name: str, folder: Path) -> Any:
    try:
        return pruned_class_named(name)
    except AttributeError:
        raise BadInput(
            f"{folder}: no adapter for {name.removeprefix(PREFIX)}; install the plugin that brings it"
        ) from None


def load_pipeline(
    directory: Path,
    torch_dtype: torch.dtype | None = None,
    *,
    variant: str | None = None,
    unused_tensors: UnusedTensors = "refuse",
) -> Any:
    """The whole pipeline of a directory, float32 unless told otherwise; the options are those of `load`.

    Raises BadInput if it is none, is damaged, or asks for code that is neither diffusers' nor a plugin's.
    """
    if not (directory / INDEX_FILE).exists():
        raise BadInput(f"{directory}: no {INDEX_FILE}; give a pipeline directory")
    parts = read_index(directory)
    if any(library == "transformers" for library, _ in parts.values()):
        check_installed("transformers")
    name = component_in(directory)
    # Not left open: transformers would take what a text encoder's config says.
    given: dict[str, Any] = {**absent(directory), "torch_dtype": torch_dtype or torch.float32}
    if (directory / name).is_dir():
        given[name] = load(directory, torch_dtype, variant=variant, unused_tensors=unused_tensors)
    variants = {
        variant_of(directory / part, variant if variant in weight_files(directory / part) else None)
        for part in parts.keys() - {name}
        if weight_files(directory / part)
    }
    named = sorted(each for each in variants if each)
    if len(named) > 1:
        raise BadInput(f"{directory}: its parts have weights of {' and '.join(named)} alone; save it with one of them")
    shown = diffusers.utils.logging.is_progress_bar_enabled()
    diffusers.utils.logging.disable_progress_bar()
    try:
        with foreign_errors(f"{directory}: cannot be loaded as a pipeline"), without_a_doubt():
            return DiffusionPipeline.from_pretrained(
                directory, use_safetensors=True, variant=next(iter(named), None), **given
            )
    finally:
        if shown:
            diffusers.utils.logging.enable_progress_bar()


def absent(directory: Path) -> dict[str, None]:
    """The components that a pipeline was saved without, which diffusers wants to be told (SD 3 without its T5)."""
    return {name: None for name, part in read_json(directory / INDEX_FILE).items() if part == [None, None]}


def load_model(directory: str | Path, device: str, dtype: str, **options: Any) -> tuple[Any, nn.Module]:
    """The pipeline or UNet of a directory, its weights in ``dtype`` (float32 ...), and its UNet, that one on a device.

    ``options``: further ones of `load`.
    Raises HardwareUnproved if the device is not there.
    """
    check_device(device)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if (Path(directory) / "model_index.json").exists():
        pipeline = load_pipeline(Path(directory), torch_dtype, **options)
        return pipeline, model_of(pipeline).to(device)
    model = load(Path(directory), torch_dtype, **options).to(device)
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


def with_model(loaded: Any, model: nn.Module, other: nn.Module) -> tuple[Any, nn.Module]:
    """What was loaded, and its model, with another one in its place."""
    if loaded is model:
        return other, other
    loaded.register_modules(**{denoiser_of(loaded)[0]: other})
    return loaded, other
