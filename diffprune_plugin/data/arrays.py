"""Images in arrays: in memory, and in an .npz file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diffprune_plugin.data.places import check_file, shown
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.data.tensors import NULL, null_rows, numbers
from diffprune_plugin.errors import BadInput

Pixels = npt.NDArray[np.uint8]


def load_npz(path: Path) -> Samples:
    """``images``: uint8 (count, height, width, channels); other arrays of the same length are further inputs, and
    those named ``null_...`` what stands for no condition."""
    check_file(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: array for key in file.files if isinstance(array := file[key], np.ndarray)}
    except Exception as error:
        kind = type(error).__name__  # numpy's own words advise to unpickle what cannot be read
        raise BadInput(
            f"data: {shown(path)}: not a readable .npz file ({kind}); give a folder, .npz or .safetensors"
        ) from None
    if "images" not in arrays:
        raise BadInput(f"data: {shown(path)}: has {sorted(arrays) or 'nothing'}, not an array 'images'")
    samples = from_array(arrays.pop("images"), shown(path))
    found = {
        key: numbers(torch.from_numpy(native(value)), f"{shown(path)}: {shown(key)}")
        for key, value in arrays.items()
        if value.dtype.kind in "iuf" and value.ndim
    }
    nulls = {key: found.pop(key) for key in list(found) if key.startswith(NULL)}
    extra = {key: value for key, value in found.items() if len(value) == len(samples)}
    return Samples(samples.values, extra, null_rows(nulls, extra, path))


def native(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Numbers as torch has them: in the machine's byte order, a long double as a double."""
    wide = array.dtype.kind == "f" and array.dtype.itemsize > 8
    return array.astype(np.float64 if wide else array.dtype.newbyteorder("="), copy=False)


def from_array(images: npt.NDArray[Any], where: str) -> Samples:
    """uint8 (count, height, width, channels) as samples."""
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise BadInput(
            f"data: {where}: images are {images.dtype} {images.shape}, not uint8 (count, height, width, channels)"
        )
    return Samples(torch.from_numpy(np.ascontiguousarray(images)))
