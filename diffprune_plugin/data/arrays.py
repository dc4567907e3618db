"""Images in arrays: in memory, and in an .npz file."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy

from diffprune_plugin.data.places import check_file, say, shown
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.data.tensors import NULL, null_rows, numbers
from diffprune_plugin.errors import BadInput
from diffprune_plugin.utils.memory import free_memory

HARMLESS = 2**30  # bytes that may come out of however small a file
MOST_RATIO = 200  # of unpacked to packed bytes; images of small bars on black come to 90
Pixels = npt.NDArray[np.uint8]


def load_npz(path: Path) -> Samples:
    """``images``: uint8 (count, height, width, channels); other arrays of the same length are further inputs, and
    those named ``null_...`` what stands for no condition."""
    check_file(path)
    try:
        check_archive(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: array for key in file.files if isinstance(array := file[key], np.ndarray)}
    except BadInput:
        raise
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
    for key in found.keys() - extra.keys():
        shape = tuple(found[key].shape)
        say(f"{shown(path)}: {shown(key)} is {shape}, not a row for each of {len(samples)} images, and is left out")
    return Samples(samples.values, extra, null_rows(nulls, extra, path))


def check_archive(path: Path) -> None:
    """Raises BadInput, before anything is unpacked, for more than memory holds, for a small file that blows itself up,
    and for an array that is not as large as its header says."""
    with zipfile.ZipFile(path) as archive:
        unpacked, packed = sum(member.file_size for member in archive.infolist()), path.stat().st_size
        if unpacked > free_memory(torch.device("cpu")) or unpacked > max(HARMLESS, MOST_RATIO * packed):
            raise BadInput(
                f"data: {shown(path)}: its {packed:,} bytes unpack to {unpacked:,}, which is more than memory holds or "
                "images do; is it the right file?"
            )
        for member in archive.infolist():
            with archive.open(member) as file:
                holds = member.file_size - header_size(file, member.file_size)
            if holds != 0:
                raise BadInput(
                    f"data: {shown(path)}: {shown(member.filename)} holds {member.file_size:,} bytes, not what its "
                    "header says; make it again"
                )


def header_size(file: IO[bytes], size: int) -> int:
    """Bytes of a member of an .npz by its header, of what is no array those that it has; raises ValueError for a
    damaged header."""
    if file.read(len(npy.MAGIC_PREFIX)) != npy.MAGIC_PREFIX:
        return size
    version = file.read(2)
    read = {b"\1\0": npy.read_array_header_1_0, b"\2\0": npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version!r}")  # of records with strange names
    shape, _, dtype = read(file)
    return size if dtype.hasobject else file.tell() + math.prod(shape) * dtype.itemsize


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
