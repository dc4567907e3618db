"""Samples that fit what the model takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffprune_plugin.adapters.ports import Port, config_of
from diffprune_plugin.adapters.state import check_loaded, check_unhooked
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.data.pictures import coloured
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.schedulers import check_objective
from diffprune_plugin.errors import BadInput

CONDITION = "condition"  # in the data: what the model takes in the channels behind the noised ones, a row a sample


def fitting(samples: Samples, model: nn.Module, adapter: ModelAdapter, scheduler: Any) -> Samples:
    """The samples with just the further inputs that the UNet takes, and how many of their channels are noised.

    Raises BadInput for samples of another size than the UNet takes, or without an input that it needs, and for a model
    whose weights are not there or that is hooked.
    """
    check_unhooked(model)
    check_loaded(model)
    check_objective(scheduler, adapter)
    check_timesteps(model, adapter, scheduler)
    expected, noised = adapter.sample_shape(model), noised_channels(model, adapter, scheduler)
    if adapter.any_size:
        expected = (expected[0], *whole_squares(samples, model, adapter))
    samples = with_condition(coloured(samples, noised), expected, noised)
    if samples.shape != expected:
        raise BadInput(
            f"data: samples are {samples.shape} (channels, height, width), the UNet takes {expected}; convert them"
        )
    ports = adapter.further_ports(model)
    missing = [port.name for port in ports if port.name not in samples.extra and not port.optional]
    if missing:
        remedy = (
            "add metadata.jsonl with captions to the folder, or give" if "encoder_hidden_states" in missing else "give"
        )
        raise BadInput(
            f"data: the UNet needs {', '.join(missing)}, the data has {', '.join(sorted(samples.extra)) or 'none'}; "
            f"{remedy} {'them' if len(missing) > 1 else 'it'} by name in an .npz or .safetensors"
        )
    ports = tuple(port for port in ports if port.name in samples.extra)
    for port in ports:
        check_input(port, samples, model, adapter)
    samples = replace(samples, null=samples.null | no_index(ports, samples, model))
    extra, null = (
        {port.name: typed(part[port.name], port) for port in ports if port.name in part}
        for part in (samples.extra, samples.null)
    )
    return replace(samples, extra=extra, null=null, noised=noised)


def whole_squares(samples: Samples, model: nn.Module, adapter: ModelAdapter) -> tuple[int, int]:
    """The (height, width) of samples for a model that takes any; raises BadInput for half a patch, or too many."""
    _, height, width = samples.shape
    step = adapter.trace_size(model)[0] // 2
    if height % step or width % step:
        raise BadInput(f"data: samples are {height} x {width}, the sides have to divide by {step}; convert them")
    most = adapter.largest(config_of(model)) if adapter.largest else max(height, width)
    if max(height, width) > most:
        raise BadInput(f"data: samples are {height} x {width}, the model takes {most} a side; make them smaller")
    return height, width


def check_timesteps(model: nn.Module, adapter: ModelAdapter, scheduler: Any) -> None:
    """Raises BadInput for a scheduler with timesteps that the model does not take."""
    check_time_table(model, adapter, scheduler)
    taken, total = adapter.timesteps(config_of(model)), int(scheduler.config.num_train_timesteps)
    if taken.start > 0:
        raise BadInput(
            f"scheduler: its timesteps go from 0 to {total - 1}, this {type(model).__name__} takes those from "
            f"{taken.start} on; use an importance without data (magnitude), or the scheduler it was trained with"
        )


def check_time_table(model: nn.Module, adapter: ModelAdapter, scheduler: Any) -> None:
    """Raises BadInput for a scheduler with more timesteps than the model has learned embeddings of."""
    taken, total = adapter.timesteps(config_of(model)), int(scheduler.config.get("num_train_timesteps", 0))
    if total > taken.stop:
        raise BadInput(
            f"scheduler: its timesteps go from 0 to {total - 1}, this {type(model).__name__} has learned those to "
            f"{taken[-1]}; give it the scheduler it was trained with (num_train_timesteps: {taken.stop})"
        )


def with_condition(samples: Samples, expected: tuple[int, ...], noised: int) -> Samples:
    """The samples with the clean channels, which the UNet takes behind the noised ones, from the data's `CONDITION`.

    Latents may have them already. Raises BadInput for images without, or where the sizes do not add up.
    """
    clean, condition, values = expected[0] - noised, samples.extra.get(CONDITION), samples.values
    whole = samples.noised is not None or (condition is None and values.is_floating_point())
    if not clean or (whole and samples.shape == expected):
        return samples
    height, width = expected[1:]
    like = "uint8 (count, height, width, channels) or float (count, channels, height, width)"
    if condition is None or samples.shape[0] != noised:
        raise BadInput(
            f"data: samples are {samples.shape} (channels, height, width), the UNet takes {noised} noised channels and "
            f"behind them {clean} clean ones, a condition; give it by the name {CONDITION!r} in the .npz or "
            f".safetensors, {like}, or latents of all {expected[0]} channels"
        )
    if values.dtype is torch.uint8 is condition.dtype and condition.shape[1:] == (height, width, clean):
        return replace(samples, values=torch.cat([values, condition], 3))
    rows = torch.arange(len(samples))
    behind = Samples(condition).sample(rows) if condition.dtype is torch.uint8 and condition.ndim == 4 else condition
    if behind.shape[1:] != (clean, height, width):
        raise BadInput(
            f"data: {CONDITION} is {condition.dtype} {tuple(condition.shape)}, the UNet takes {clean} channels of "
            f"{height} x {width} behind the noised ones; give {like}"
        )
    return replace(samples, values=torch.cat([samples.sample(rows), behind.float()], 1))


def noised_channels(model: nn.Module, adapter: ModelAdapter, scheduler: Any) -> int:
    """How many channels of a sample are noised: the first ones, as many as are predicted; a condition is behind them.

    A scheduler of learned variances says that the second half of the prediction are these.
    """
    taken, predicted = adapter.channels(model)
    learned = str(scheduler.config.get("variance_type")).startswith("learned") and predicted % 2 == 0
    return min(taken, predicted // 2 if learned else predicted)


def no_index(ports: Iterable[Port], samples: Samples, model: nn.Module) -> dict[str, Tensor]:
    """By port the index that stands for none, where the model has one and the data say nothing."""
    config = config_of(model)
    return {p.name: torch.tensor([p.classes(config)]) for p in ports if p.none and p.name not in samples.null}


def typed(values: Tensor, port: Port) -> Tensor:
    """Indices as the embeddings take them; numbers as floats."""
    index = port.torch_dtype is torch.int64
    return values.to(port.torch_dtype) if index or not values.is_floating_point() else values


def check_input(port: Port, samples: Samples, model: nn.Module, adapter: ModelAdapter) -> None:
    """Raises BadInput unless a further input has the shape, and where it is an index the range, that the UNet takes."""
    values, shape = samples.extra[port.name], adapter.shapes(model)[port.name]
    stated = " ".join(map(str, shape))
    fits = len(shape) == values.ndim and all(
        isinstance(size, str) or size == found for size, found in zip(shape, values.shape, strict=True)
    )
    if not fits or (port.torch_dtype is torch.int64 and values.is_floating_point()):
        raise BadInput(
            f"data: {port.name} is {values.dtype} {tuple(values.shape)}, the UNet takes {port.dtype} ({stated}); "
            "convert it"
        )
    if port.integers_below:
        count = port.classes(config_of(model))
        known = torch.cat([values, *([samples.null[port.name].to(values)] if port.name in samples.null else [])])
        low, high, last = int(known.min()), int(known.max()), count - 1 + port.none
        if low < 0 or high > last:
            raise BadInput(f"data: {port.name} goes from {low} to {high}, the UNet knows 0 to {last}; mend it")
        if samples.classes not in (None, count):
            raise BadInput(
                f"data: {samples.classes} class folders, but the UNet knows {count} classes; name the folders by class "
                "number (0, 1, ...)"
            )
