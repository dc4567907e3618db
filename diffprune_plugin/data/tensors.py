"""Precomputed latents and embeddings: a tensor in memory, and a .safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffprune_plugin.data.places import check_file, shown
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput, first_line

LATENTS = ("latents", "sample")
NULL = "null_"  # before an input's name: the row that stands for no condition
WIDE = (torch.uint16, torch.uint32, torch.uint64)  # which torch holds, and hardly computes with


def load_safetensors(path: Path) -> Samples:
    """Precomputed ``latents`` (or ``sample``), float (count, channels, height, width), and by the names of the UNet's
    inputs (``encoder_hidden_states``, ``text_embeds``, ``time_ids``, ``class_labels``) a row for each; one row named
    ``null_...`` stands for no condition.

    Raises BadInput for a file without latents or with a tensor of another length.
    """
    check_file(path)
    try:
        tensors = load_file(path)
    except Exception as error:  # a dtype that torch does not have is a KeyError
        reason = shown(first_line(error))
        raise BadInput(f"data: {shown(path)}: not a readable .safetensors file: {reason}") from None
    name = next((name for name in LATENTS if name in tensors), None)
    if name is None:
        raise BadInput(f"data: {shown(path)}: has {sorted(tensors) or 'nothing'}, neither {' nor '.join(LATENTS)}")
    values = from_tensor(tensors.pop(name), f"{shown(path)}: {name}").values
    tensors = {key: numbers(tensor, f"{shown(path)}: {shown(key)}") for key, tensor in tensors.items()}
    nulls = {key: tensors.pop(key) for key in list(tensors) if key.startswith(NULL)}
    for key, tensor in tensors.items():
        if len(tensor.shape[:1]) != 1 or len(tensor) != len(values):
            shape, each = tuple(tensor.shape), f"{len(values)} {name}"
            raise BadInput(f"data: {shown(path)}: {shown(key)} is {shape}, not a row for each of {each}")
    return Samples(values, tensors, null_rows(nulls, tensors, path))


def from_tensor(values: Tensor, where: str) -> Samples:
    """Float (count, channels, height, width) as samples, on the CPU and in single precision."""
    if values.ndim != 4 or not values.is_floating_point() or not values.numel():
        raise BadInput(f"data: {where} is {values.dtype} {tuple(values.shape)}, not float (count, channels, h, w)")
    return Samples(numbers(values.detach().cpu().float(), where))


def numbers(tensor: Tensor, where: str) -> Tensor:
    """A tensor that models can take; raises BadInput for one that is not of finite real numbers."""
    if tensor.is_complex() or tensor.dtype is torch.bool:
        raise BadInput(f"data: {where} is {tensor.dtype}, not numbers; convert it, or leave it out")
    if tensor.dtype in WIDE:
        tensor = tensor.to(torch.int64)
    if tensor.is_floating_point() and tensor.itemsize == 1:  # torch 2.6 takes no rows of these
        tensor = tensor.float()
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        raise BadInput(f"data: {where} holds NaN or infinity; mend it")
    return tensor


def null_rows(nulls: Mapping[str, Tensor], extra: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """By input name, what stands for no condition, shape (1, ...) as a row of that input."""
    found = {}
    for key, tensor in nulls.items():
        name, where = key.removeprefix(NULL), f"data: {shown(path)}: {shown(key)}"
        if name not in extra:
            have = ", ".join(map(shown, sorted(extra))) or "none"
            raise BadInput(f"{where} is there but {shown(name)} is not; have {have}")
        row = tuple(extra[name].shape[1:])
        if tuple(tensor.shape) not in (row, (1, *row)):
            raise BadInput(f"{where} is {tuple(tensor.shape)}, not a row of {shown(name)}, {row}")
        found[name] = tensor.reshape(1, *row)
    return found
