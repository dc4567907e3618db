"""A PyTorch model as something to be timed beside ONNX Runtime's sessions: on their inputs, as exact as they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from diffprune_plugin.export.feeds import example_feeds
from diffprune_plugin.export.provider_table import NO_TF32
from diffprune_plugin.plugins import find_adapter


def eager_run(model: Any, path: Path, dims: Mapping[str, int], threads: int) -> Callable[[], None]:
    """One PyTorch forward on the same inputs; sets PyTorch's threads for the process."""
    torch.set_num_threads(threads)
    adapter = find_adapter(model)
    parameter = next(model.parameters())
    inputs = {name: torch.from_numpy(value).to(parameter.device) for name, value in example_feeds(path, dims).items()}
    inputs = {name: v.to(parameter.dtype) if v.is_floating_point() else v for name, v in inputs.items()}
    # One for all samples in a file; PixArt wants one for each.
    inputs[adapter.timestep] = inputs[adapter.timestep].expand(len(inputs[adapter.sample]))

    cudnn = torch.backends.cudnn
    tf32 = cudnn.allow_tf32 and os.environ.get(NO_TF32) != "0"  # which cuDNN reads once, maybe before

    def run() -> None:
        with torch.inference_mode(), cudnn.flags(True, cudnn.benchmark, allow_tf32=tf32):
            adapter.denoise(model, inputs)
            if parameter.device.type == "cuda":
                torch.cuda.synchronize()

    return run
