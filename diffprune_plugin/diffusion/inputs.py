"""Samples that fit what the model takes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from diffprune_plugin.adapters.ports import Port, config_of
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput


def fitting(samples: Samples, model: nn.Module, adapter: ModelAdapter) -> Samples:
    """The samples with just the further inputs that the UNet takes.

    Raises BadInput for samples of another size than the UNet takes, or without an input that it needs.
    """
    expected = adapter.sample_shape(model)
    if samples.shape != expected:
        raise BadInput(
            f"data: samples are {samples.shape} (channels, height, width), the UNet takes {expected}; convert them"
        )
    ports = adapter.further_ports(model)
    missing = [port.name for port in ports if port.name not in samples.extra]
    if missing:
        remedy = (
            "add metadata.jsonl with captions to the folder, or give" if "encoder_hidden_states" in missing else "give"
        )
        raise BadInput(
            f"data: the UNet needs {', '.join(missing)}, the data has {', '.join(sorted(samples.extra)) or 'none'}; "
            f"{remedy} {'them' if len(missing) > 1 else 'it'} by name in an .npz or .safetensors"
        )
    for port in ports:
        check_input(port, samples, model, adapter)
    extra, null = (
        {port.name: typed(part[port.name], port) for port in ports if port.name in part}
        for part in (samples.extra, samples.null)
    )
    return replace(samples, extra=extra, null=null)


def typed(values: Tensor, port: Port) -> Tensor:
    """Indices as the embeddings take them; numbers as they are."""
    return values.to(port.dtype) if port.dtype is torch.int64 else values


def check_input(port: Port, samples: Samples, model: nn.Module, adapter: ModelAdapter) -> None:
    """Raises BadInput unless a further input has the shape, and where it is an index the range, that the UNet takes."""
    values, shape = samples.extra[port.name], adapter.shapes(model)[port.name]
    stated = " ".join(map(str, shape))
    fits = len(shape) == values.ndim and all(
        isinstance(size, str) or size == found for size, found in zip(shape, values.shape, strict=True)
    )
    if not fits or (port.dtype is torch.int64 and values.is_floating_point()):
        raise BadInput(
            f"data: {port.name} is {values.dtype} {tuple(values.shape)}, the UNet takes {port.dtype} ({stated}); "
            "convert it"
        )
    if port.integers_below:
        count = port.classes(config_of(model))
        known = torch.cat([values, *([samples.null[port.name].to(values)] if port.name in samples.null else [])])
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= count:
            raise BadInput(f"data: {port.name} goes from {low} to {high}, the UNet knows 0 to {count - 1}; mend it")
        if samples.classes not in (None, count):
            raise BadInput(
                f"data: {samples.classes} class folders, but the UNet knows {count} classes; name the folders by class "
                "number (0, 1, ...)"
            )
