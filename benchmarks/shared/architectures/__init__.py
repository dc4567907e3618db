"""Published UNet architectures as diffusers configs, built with random weights: no hub access needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch

HERE = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.json")))


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A UNet of a published architecture with random weights, in eval mode; made in ``dtype``, never wider."""
    config = json.loads((HERE / f"{name}.json").read_text())
    torch.manual_seed(seed)
    with default_dtype(dtype):
        return getattr(diffusers, config["_class_name"]).from_config(config).eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
