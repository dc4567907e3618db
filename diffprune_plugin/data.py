"""Images for calibration: from a folder, an .npz, arrays, or a sequence as the datasets library gives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from diffprune_plugin.errors import BadInput

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
IMAGE_KEYS = ("image", "img")
LIMIT = 4096  # images held in memory; of more, every n-th is taken


@dataclass(frozen=True)
class Samples:
    """Training samples in memory: uint8 images (count, height, width, channels), or float (count, channels, height,
    width) as the UNet takes them (latents, or pixels in [-1, 1]); ``extra`` holds further inputs by name, a row each.
    """

    values: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)

    def sample(self, rows: Tensor) -> Tensor:
        """Float samples (len(rows), channels, height, width); images scaled to [-1, 1]."""
        values = self.values[rows]
        if values.dtype is torch.uint8:
            return values.permute(0, 3, 1, 2).float() / 127.5 - 1
        return values

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one sample."""
        channels, height, width = self.sample(torch.tensor([0])).shape[1:]
        return channels, height, width

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for tensor in (self.values, *(self.extra[key] for key in sorted(self.extra))):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_samples(source: Any) -> Samples:
    """Samples from a folder of images, an .npz with ``images``, an array, a float tensor, or a sequence of images.

    Raises BadInput for a source that is missing, empty, holds a damaged image, or images of different sizes.
    """
    if isinstance(source, Samples):
        return source
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.exists():
            raise BadInput(f"data: {path}: no such folder or .npz file")
        return load_folder(path) if path.is_dir() else load_npz(path)
    if isinstance(source, Tensor):
        if source.ndim != 4 or not source.is_floating_point():
            raise BadInput(f"data: a tensor is {source.dtype} {tuple(source.shape)}, not float (count, channels, h, w)")
        return Samples(source.detach().cpu().float())
    if isinstance(source, np.ndarray):
        return from_array(source, "data")
    return from_sequence(source)


def load_npz(path: Path) -> Samples:
    """``images``: uint8 (count, height, width, channels); other arrays of the same length are further inputs."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:
        raise BadInput(f"data: {path}: not a readable .npz file: {error}") from None
    if "images" not in arrays:
        raise BadInput(f"data: {path}: has {sorted(arrays) or 'nothing'}, not an array 'images'")
    samples = from_array(arrays.pop("images"), str(path))
    numbers = {key: value for key, value in arrays.items() if value.dtype.kind in "iuf" and value.ndim}
    extra = {key: torch.from_numpy(value) for key, value in numbers.items() if len(value) == len(samples)}
    return Samples(samples.values, extra)


def from_array(images: npt.NDArray[Any], where: str) -> Samples:
    """uint8 (count, height, width, channels) as samples."""
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise BadInput(
            f"data: {where}: images are {images.dtype} {images.shape}, not uint8 (count, height, width, channels)"
        )
    return Samples(torch.from_numpy(np.ascontiguousarray(images)))


def load_folder(path: Path) -> Samples:
    """Every image below a folder, in the order of their names."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise BadInput(f"data: {path}: no image in this folder ({', '.join(sorted(SUFFIXES))})")
    files = files[:: -(-len(files) // LIMIT)]
    return stack([(str(file), read_image(file)) for file in files])


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return to_array(image)
    except BadInput:
        raise
    except Exception as error:  # Pillow raises whatever a broken file of some format leads to
        raise BadInput(f"data: {path}: damaged image: {error}; remove or replace it") from None


def from_sequence(rows: Sequence[Any]) -> Samples:
    """Rows as the datasets library gives them: a PIL image or array, alone or under the key ``image``."""
    try:
        count = len(rows)
        rows[0] if count else None
    except (TypeError, KeyError):
        raise BadInput(f"data: a {type(rows).__name__} is no folder, .npz, array or sequence of images") from None
    if not count:
        raise BadInput("data: the sequence of images is empty")
    picked = range(0, count, -(-count // LIMIT))
    return stack([(f"row {i}", to_array(image_of(rows[i], i))) for i in picked])


def image_of(row: Any, number: int) -> Any:
    if not isinstance(row, Mapping):
        return row
    key = next((key for key in IMAGE_KEYS if key in row), None)
    if key is None:
        raise BadInput(f"data: row {number} has {sorted(row)}, none of {', '.join(IMAGE_KEYS)}")
    return row[key]


def to_array(image: Any) -> npt.NDArray[np.uint8]:
    """uint8 (height, width, channels); palettes become RGB, 16-bit grey 8-bit."""
    if isinstance(image, Image.Image) and image.mode in ("P", "CMYK", "1"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    array = np.asarray(image)
    if array.dtype == np.uint16:
        array = (array // 257).astype(np.uint8)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise BadInput(f"data: an image is {array.dtype} {array.shape}, not uint8 (height, width, channels)")
    return array if array.ndim == 3 else array[..., None]


def stack(images: list[tuple[str, npt.NDArray[np.uint8]]]) -> Samples:
    """Images of one size as samples; raises BadInput naming the first that differs."""
    first_name, first = images[0]
    for name, image in images:
        if image.shape != first.shape:
            raise BadInput(f"data: {name} is {image.shape} but {first_name} is {first.shape}; resize them to one size")
    return from_array(np.stack([image for _, image in images]), first_name)
