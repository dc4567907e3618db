"""What an export in half precision needs beyond the file: which layers stay in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from diffprune_plugin.export.convert import model_in
from diffprune_plugin.export.options import Options
from diffprune_plugin.export.precision import found_by_itself
from diffprune_plugin.export.providers import known_provider
from diffprune_plugin.plugins import find_adapter


def with_kept_layers(model: Path, options: Options, say: Callable[[str], None]) -> Options:
    """The options with the names of all layers that stay in fp32: those of the patterns, and those found by themselves.

    Raises BadInput for a pattern that matches nothing, CheckFailed where nothing but the whole model would do.
    """
    if options.dtype == "fp32" or not options.verify:
        return options
    live = model_in(model)
    on_gpu = known_provider(options.asked_provider or "cpu").is_gpu and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    kept = found_by_itself(live, find_adapter(live), options.dtype, options.keep_fp32, device)
    told = f"kept in fp32: {', '.join(kept)}" if kept else "no layer is kept in fp32"
    say(f"{options.dtype}: {told}; finite at timesteps from both ends (PyTorch, {device})")
    return replace(options, keep_fp32=tuple(kept))
