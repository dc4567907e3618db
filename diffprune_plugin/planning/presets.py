"""Published recipes by name: what a plan loses, where, and how it is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.options import PlanOptions

Options = TypeVar("Options", bound=PlanOptions)
PARTS = ("attn", "attn1", "attn2", "ff", "ff_context")  # of a block: heads and feed-forward


def obs_diff(model: nn.Module, adapter: ModelAdapter) -> dict[str, Any]:
    """OBS-Diff (arXiv 2510.06751): heads and feed-forward neurons of both streams in all blocks but the first and the
    last, the ratio of each rounded to the nearest count.

    Raises BadInput for a class without blocks of attention and feed-forward.
    """
    blocks = (
        block for row in adapter.blocks for _, block in list(model.get_submodule(row.path).named_children())[1:-1]
    )
    inside = {id(part) for block in blocks for name, part in block.named_children() if name in PARTS}
    parts = tuple(name for name, module in model.named_modules() if id(module) in inside)
    if not parts:
        raise BadInput(
            f"preset: obs-diff is for blocks of attention and feed-forward, a {adapter.model_class} has none"
        )
    return {"target_layers": parts, "rounding": "nearest"}


PRESETS: dict[str, Callable[[nn.Module, ModelAdapter], dict[str, Any]]] = {"obs-diff": obs_diff}


def filled_in(options: Options, model: nn.Module, adapter: ModelAdapter) -> Options:
    """The options with what their preset says of this model."""
    if options.preset is None:
        return options
    return options.model_copy(update={**PRESETS[options.preset](model, adapter), "preset": None})
