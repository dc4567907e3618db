"""What an export in half precision needs beyond the file: which layers stay in fp32, and what error is allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffprune_plugin.errors import CheckFailed
from diffprune_plugin.export.convert import model_in
from diffprune_plugin.export.options import Options
from diffprune_plugin.export.precision import found_by_itself
from diffprune_plugin.export.providers import known_provider
from diffprune_plugin.export.verify import Tolerance, summary, verify_onnx
from diffprune_plugin.plugins import find_adapter

WORSE = 2  # times the dense file's error that a pruned file's may be


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


def judged_by_dense(options: Options) -> bool:
    """Whether the dense model's own error says what is allowed: it has weights of its own, in half precision."""
    return options.dtype != "fp32" and options.verify and options.baseline is not None


def allowed(dense: Path, options: Options, provider: str) -> tuple[Tolerance, dict[str, Any]]:
    """Twice the largest error of the dense model's file against its own PyTorch in fp32, and how that was found.

    Raises CheckFailed where the dense model's file gives nothing finite.
    """
    result = verify_onnx(
        dense, options.baseline or dense, provider=provider, threads=options.threads, tolerance=Tolerance(1e30, 0.0)
    )
    if not result.passed:
        told = f"--baseline {options.baseline}: its {options.dtype} file gives no numbers"
        raise CheckFailed(f"{told}: {summary(result)}")
    error = max(case.relative for case in result.cases)
    return Tolerance(WORSE * error, 0.0), {"relative": error, "allowed": WORSE * error}
