"""Images, whatever their mode and rotation, as pixels of one kind: 8-bit grey or RGB, upright, of one size."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageOps

from diffprune_plugin.data import samples as held
from diffprune_plugin.data.arrays import Pixels, from_array
from diffprune_plugin.data.places import check_file, say, shown
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput, first_line

FRAME = "frame"  # of resized images, a row each: height and width before, top and left of the crop (SDXL's time_ids)
BYTES = 2**31  # of pixels that are held in memory
# What each of Pillow's modes becomes; training scripts have image.convert do the same, which drops what is transparent.
BECOMES = {
    **dict.fromkeys(("L", "1", "LA", "I;16", "I;16L", "I;16B", "I;16N"), "L"),
    **dict.fromkeys(("RGB", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"), "RGB"),
}

Frame = tuple[int, int, int, int]


class Picture(NamedTuple):
    """Pixels uint8 (height, width, channels), how they were cropped, and in a few words what else was done to them."""

    name: str
    pixels: Pixels
    frame: Frame
    changes: tuple[str, ...] = ()


def read_picture(path: Path, resolution: int | None) -> Picture:
    """The image in a file; raises BadInput for one that is damaged or no image at all."""
    check_file(path)
    with damage_told(shown(path)), Image.open(path) as image:
        return picture(image, shown(path), resolution)


@contextlib.contextmanager
def damage_told(name: str) -> Iterator[None]:
    """One line for whatever Pillow raises, which is what a broken file of some format leads to."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        reason = shown(first_line(error)) or type(error).__name__
        raise BadInput(f"data: {name}: damaged image: {reason}; remove or replace it") from None


def picture(image: Any, name: str, resolution: int | None) -> Picture:
    """A PIL image or uint8 array (height, width[, channels]), resized and cropped around the centre if asked."""
    changes: tuple[str, ...] = ()
    if isinstance(image, Image.Image):
        image, changes = upright(image, name)
    array = to_array(image, name)
    height, width = array.shape[:2]
    if resolution is None:
        return Picture(name, array, (height, width, 0, 0), changes)
    if array.shape[2] not in (1, 3, 4):
        raise BadInput(f"data: {name} has {array.shape[2]} channels, which 'resolution' does not resize; resize it")
    scale = resolution / min(width, height)
    left, top = (round((side * scale - resolution) / 2) for side in (width, height))
    flat = Image.fromarray(array if array.shape[2] > 1 else array[..., 0])
    fitted = ImageOps.fit(flat, (resolution, resolution), Image.Resampling.LANCZOS)
    return Picture(name, to_array(fitted, name), (height, width, top, left), changes)


def upright(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """The image in grey or RGB, turned as its EXIF says, and what was done; as the datasets library and diffusers' own
    training scripts do it."""
    mode, changes = image.mode, []
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        changes.append("turned as EXIF says")
    image = ImageOps.exif_transpose(image)
    becomes = BECOMES.get(mode)
    if becomes is None:
        raise BadInput(f"data: {name} is a {mode} image; convert it to 8-bit grey or RGB")
    if mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif mode != becomes:
        image = image.convert(becomes)
    return image, (*changes, *([f"converted from {mode} to {becomes}"] if mode != becomes else []))


def to_array(image: Any, name: str) -> Pixels:
    """uint8 (height, width, channels); 16-bit grey becomes 8-bit."""
    try:
        array: npt.NDArray[Any] = np.asarray(image)
    except Exception as error:
        raise BadInput(f"data: {name} is a {type(image).__name__}, no image: {first_line(error)}") from None
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = (array // 257).astype(np.uint8)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
        raise BadInput(f"data: {name}: an image is {array.dtype} {array.shape}, not uint8 (height, width, channels)")
    return array if array.ndim == 3 else array[..., None]


def every(count: int, first: Picture) -> int:
    """The n of "every n-th" that keeps so many images like the first within what is held in memory."""
    step = max(-(-count // held.LIMIT), -(-count * first.pixels.nbytes // BYTES))
    if step > 1:
        taken, most = -(-count // step), f"{held.LIMIT} images or {BYTES >> 30} GiB of pixels"
        say(f"{taken} of {count} images, evenly spaced: at most {most}")
    return step


def stack(pictures: Sequence[Picture], resolution: int | None) -> Samples:
    """Images of one size as samples, grey ones among RGB ones as RGB, and what was done to them on standard error.

    Raises BadInput naming the first that differs.
    """
    first, channels = pictures[0], {picture.pixels.shape[2] for picture in pictures}
    if channels == {1, 3}:
        pictures = [in_rgb(picture) for picture in pictures]
        first = pictures[0]
    for name, image, *_ in pictures:
        both = f"data: {name} is {image.shape} but {first.name} is {first.pixels.shape}"
        if image.shape[:2] != first.pixels.shape[:2]:
            raise BadInput(f"{both}; resize them to one size, or set 'resolution'")
        if image.shape != first.pixels.shape:
            raise BadInput(f"{both}; convert all to RGB")
    changes = collections.Counter(change for picture in pictures for change in picture.changes)
    if changes:
        said = ", ".join(f"{count} {change}" for change, count in changes.items())
        say(f"of {len(pictures)} images {said}")
    samples = from_array(np.stack([picture.pixels for picture in pictures]), first.name)
    frames = torch.tensor([picture.frame for picture in pictures])
    return replace(samples, extra={FRAME: frames} if resolution else {}, pictures=True)


def in_rgb(grey: Picture) -> Picture:
    if grey.pixels.shape[2] == 3:
        return grey
    return grey._replace(
        pixels=np.repeat(grey.pixels, 3, axis=2), changes=(*grey.changes, "converted from grey to RGB")
    )


def coloured(samples: Samples, channels: int) -> Samples:
    """Pictures as a model of so many channels takes them: grey as RGB or RGB as grey, which standard error says."""
    values = samples.values
    as_loaded = samples.pictures and values.dtype is torch.uint8 and samples.noised is None
    if not as_loaded or (values.shape[-1], channels) not in ((1, 3), (3, 1)):
        return samples
    say(f"{len(samples)} images converted {'from grey to RGB' if channels == 3 else 'from RGB to grey'} for the model")
    if channels == 3:
        return replace(samples, values=values.expand(*values.shape[:-1], 3))
    red, green, blue = values.to(torch.int32).unbind(-1)
    grey = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16  # ITU-R 601 in 16 bits, as Pillow's convert("L")
    return replace(samples, values=grey.to(torch.uint8)[..., None])
