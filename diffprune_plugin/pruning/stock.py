"""Pruned models that a config of diffusers' own class describes: they load anywhere, and nothing is needed for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from diffprune_plugin.adapters.ports import config_of
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.directory import DENSE_CONFIG, LOADER_FILE, read_json, to_json
from diffprune_plugin.pruning.index import INDEX_FILE
from diffprune_plugin.pruning.pruned_class import base_of
from diffprune_plugin.utils.modes import evaluating


@torch.no_grad()
def stock_twin(model: Any) -> Any:
    """A model of diffusers' own class, with a smaller config, that holds a pruned model's tensors; None where no such
    config says the sizes of all of its layers, or it computes anything else, by a bit."""
    adapter, base = find_adapter(model), base_of(type(model))
    if adapter.narrower is None or model.pruning_plan.skipped or not base.__module__.startswith("diffusers."):
        return None
    config = {key: value for key, value in dict(config_of(model)).items() if not key.startswith("_")}
    inputs = adapter.trace_inputs(model)
    try:
        with init_empty_weights():
            twin = base.from_config({**config, **adapter.narrower(model)}).eval()
        if shapes(twin) != shapes(model):
            return None
        twin.load_state_dict(model.state_dict(), assign=True)
        with evaluating(model):
            outputs = [each(**inputs, return_dict=False)[0] for each in (twin, model)]
    except (ValueError, ZeroDivisionError, RuntimeError):  # widths that the class refuses; a dtype without kernels
        return None
    return twin if torch.equal(*outputs) else None


def shapes(model: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def as_stock(directory: Path, name: str, model: Any) -> None:
    """Give a saved pruned model, the component ``name`` of a pipeline or nothing for one alone, its stock config, if it
    has one; the dense one then lies beside it for `load`, and no loader is needed."""
    twin = stock_twin(model)
    if twin is None:
        return
    folder = directory / name
    (folder / "config.json").rename(folder / DENSE_CONFIG)
    twin.save_config(str(folder))
    (folder / LOADER_FILE).unlink(missing_ok=True)
    if name:
        index = read_json(directory / INDEX_FILE)
        index[name] = [find_adapter(model).module, type(twin).__name__]
        (directory / INDEX_FILE).write_text(to_json(index))
