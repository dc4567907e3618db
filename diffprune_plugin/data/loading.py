"""Training samples for calibration, from wherever people have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffprune_plugin.data.arrays import from_array, load_npz
from diffprune_plugin.data.folders import load_folder
from diffprune_plugin.data.places import is_folder
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.data.sequences import from_sequence
from diffprune_plugin.data.tensors import from_tensor, load_safetensors
from diffprune_plugin.errors import BadInput


def load_samples(source: Any, resolution: int | None = None, whole: bool = False) -> Samples:
    """Samples from a folder of images, an .npz with ``images``, a .safetensors with ``latents``, an array, a float
    tensor, or a sequence of images.

    ``resolution``: files and sequences of images are resized and cropped around the centre to this height and width.
    ``whole``: all of them are held in memory, however many; else of too many every n-th, which standard error says.

    Raises BadInput for a source that is missing, empty, holds a damaged image, or images of different sizes.
    """
    if resolution is not None and (type(resolution) is not int or resolution < 1):
        raise BadInput(f"resolution: {resolution!r} is no whole number of pixels of at least 1")
    if isinstance(source, (str, Path)):
        path = Path(source)
        if is_folder(path):
            return load_folder(path, resolution, whole)
        samples = load_safetensors(path) if path.suffix == ".safetensors" else load_npz(path)
    elif isinstance(source, Samples):
        samples = source.in_memory()
    elif isinstance(source, Tensor):
        samples = from_tensor(source, "a tensor")
    elif isinstance(source, np.ndarray):
        samples = from_array(source, "data")
    else:
        return from_sequence(source, resolution, whole)
    if resolution is not None and samples.shape[1:] != (resolution,) * 2:
        pixels = samples.values.dtype is torch.uint8
        what, remedy = ("an array", "resize it") if pixels else ("a float tensor", "leave it out")
        raise BadInput(f"resolution: {resolution} is for image files, not for {what} of {samples.shape[1:]}; {remedy}")
    return samples
