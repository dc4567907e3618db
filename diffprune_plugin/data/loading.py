"""Training samples for calibration: images (with captions or classes) from a folder, an .npz, arrays or a sequence as
the datasets library gives, and precomputed latents and embeddings from a .safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffprune_plugin.data import samples as held
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput, first_line

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
IMAGE_KEYS = ("image", "img")
CAPTIONS = "metadata.jsonl"  # beside the images, a line each: {"file_name": ..., "text": ...}
FRAME = "frame"  # of resized images, a row each: height and width before, top and left of the crop (SDXL's time_ids)
LATENTS = ("latents", "sample")
NULL = "null_"  # before an input's name: the row that stands for no condition
BYTES = 2**31  # of pixels, likewise

Pixels = npt.NDArray[np.uint8]
Frame = tuple[int, int, int, int]


def load_samples(source: Any, resolution: int | None = None, whole: bool = False) -> Samples:
    """Samples from a folder of images, an .npz with ``images``, a .safetensors with ``latents``, an array, a float
    tensor, or a sequence of images.

    ``resolution``: files and sequences of images are resized and cropped around the centre to this height and width.
    ``whole``: all of them are held in memory, however many; else of too many every n-th, which standard error says.

    Raises BadInput for a source that is missing, empty, holds a damaged image, or images of different sizes.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.exists():
            raise BadInput(f"data: {path}: no such folder, .npz or .safetensors file")
        if path.is_dir():
            return load_folder(path, resolution, whole)
        samples = load_safetensors(path) if path.suffix == ".safetensors" else load_npz(path)
    elif isinstance(source, Samples):
        samples = source
    elif isinstance(source, Tensor):
        if source.ndim != 4 or not source.is_floating_point():
            raise BadInput(f"data: a tensor is {source.dtype} {tuple(source.shape)}, not float (count, channels, h, w)")
        samples = Samples(source.detach().cpu().float())
    elif isinstance(source, np.ndarray):
        samples = from_array(source, "data")
    else:
        return from_sequence(source, resolution, whole)
    if resolution is not None and samples.values.dtype is torch.uint8 and samples.shape[1:] != (resolution,) * 2:
        raise BadInput(
            f"resolution: {resolution} is for image files, not for an array of {samples.shape[1:]}; resize it"
        )
    return samples


def load_npz(path: Path) -> Samples:
    """``images``: uint8 (count, height, width, channels); other arrays of the same length are further inputs, and
    those named ``null_...`` what stands for no condition."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:
        kind = type(error).__name__  # numpy's own words advise to unpickle what cannot be read
        raise BadInput(
            f"data: {path}: not a readable .npz file ({kind}); give a folder, .npz or .safetensors"
        ) from None
    if "images" not in arrays:
        raise BadInput(f"data: {path}: has {sorted(arrays) or 'nothing'}, not an array 'images'")
    samples = from_array(arrays.pop("images"), str(path))
    numbers = {
        key: torch.from_numpy(value) for key, value in arrays.items() if value.dtype.kind in "iuf" and value.ndim
    }
    nulls = {key: numbers.pop(key) for key in list(numbers) if key.startswith(NULL)}
    extra = {key: value for key, value in numbers.items() if len(value) == len(samples)}
    return Samples(samples.values, extra, null_rows(nulls, extra, path))


def load_safetensors(path: Path) -> Samples:
    """Precomputed ``latents`` (or ``sample``), float (count, channels, height, width), and by the names of the UNet's
    inputs (``encoder_hidden_states``, ``text_embeds``, ``time_ids``, ``class_labels``) a row for each; one row named
    ``null_...`` stands for no condition.

    Raises BadInput for a file without latents or with a tensor of another length.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"data: {path}: not a readable .safetensors file: {first_line(error)}") from None
    name = next((name for name in LATENTS if name in tensors), None)
    if name is None:
        raise BadInput(f"data: {path}: has {sorted(tensors) or 'nothing'}, neither {' nor '.join(LATENTS)}")
    values = tensors.pop(name)
    if values.ndim != 4 or not values.is_floating_point() or not len(values):
        raise BadInput(
            f"data: {path}: {name} is {values.dtype} {tuple(values.shape)}, not float (count, channels, h, w)"
        )
    nulls = {key: tensors.pop(key) for key in list(tensors) if key.startswith(NULL)}
    for key, tensor in tensors.items():
        if len(tensor.shape[:1]) != 1 or len(tensor) != len(values):
            raise BadInput(f"data: {path}: {key} is {tuple(tensor.shape)}, not a row for each of {len(values)} {name}")
    return Samples(values.float(), tensors, null_rows(nulls, tensors, path))


def null_rows(nulls: Mapping[str, Tensor], extra: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """By input name, what stands for no condition, shape (1, ...) as a row of that input."""
    found = {}
    for key, tensor in nulls.items():
        name = key.removeprefix(NULL)
        if name not in extra:
            raise BadInput(f"data: {path}: {key} is there but {name} is not; have {', '.join(sorted(extra))}")
        row = tuple(extra[name].shape[1:])
        if tuple(tensor.shape) not in (row, (1, *row)):
            raise BadInput(f"data: {path}: {key} is {tuple(tensor.shape)}, not a row of {name}, {row}")
        found[name] = tensor.reshape(1, *row)
    return found


def from_array(images: npt.NDArray[Any], where: str) -> Samples:
    """uint8 (count, height, width, channels) as samples."""
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise BadInput(
            f"data: {where}: images are {images.dtype} {images.shape}, not uint8 (count, height, width, channels)"
        )
    return Samples(torch.from_numpy(np.ascontiguousarray(images)))


def load_folder(path: Path, resolution: int | None = None, whole: bool = False) -> Samples:
    """The images that metadata.jsonl lists, with their captions; else every image below a folder, in the order of
    their names, labelled by class where each lies in a folder of its class."""
    captions = read_captions(path / CAPTIONS) if (path / CAPTIONS).exists() else []
    files = [file for file, _ in captions]
    files = files or sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise BadInput(f"data: {path}: no image in this folder ({', '.join(sorted(SUFFIXES))})")
    step = 1 if whole else every(len(files), read_image(files[0], resolution)[0])
    samples = stack([(str(file), *read_image(file, resolution)) for file in files[::step]], resolution)
    if captions:
        return replace(samples, captions=tuple(text for _, text in captions[::step]))
    if any(file.parent == path for file in files):
        return samples
    labels, classes = class_labels([file.relative_to(path).parts[0] for file in files])
    return replace(samples, extra=samples.extra | {"class_labels": labels[::step]}, classes=classes)


def every(count: int, first: Pixels) -> int:
    """The n of "every n-th" that keeps so many images like the first within what is held in memory."""
    step = max(-(-count // held.LIMIT), -(-count * first.nbytes // BYTES))
    if step > 1:
        taken, most = -(-count // step), f"{held.LIMIT} images or {BYTES >> 30} GiB of pixels"
        Console(stderr=True).print(f"data: {taken} of {count} images, evenly spaced: at most {most}", soft_wrap=True)
    return step


def read_captions(path: Path) -> list[tuple[Path, str]]:
    """Image file and text of each line of a metadata.jsonl, as the datasets library's image folders have it."""
    captions = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would cut captions at U+2028 too
    except UnicodeDecodeError as error:
        raise BadInput(f"data: {path}: not UTF-8: {first_line(error)}; convert it") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise BadInput(f"data: {path}: line {number} is no JSON: {first_line(error)}") from None
        if row is None:
            continue
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file_name", "text")):
            keys = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise BadInput(f"data: {path}: line {number} has {keys}, not a 'file_name' and a 'text'")
        captions.append((path.parent / row["file_name"], row["text"]))
    if not captions:
        raise BadInput(f"data: {path}: no line in it; add one for each image, or remove the file")
    return captions


def class_labels(folders: Sequence[str]) -> tuple[Tensor, int | None]:
    """The class of each image by the folder it lies in: the folder's name if all are numbers; else the place of the
    name among all of them, and of how many."""
    names = sorted(set(folders))
    if all(name.isdecimal() for name in names):
        return torch.tensor([int(folder) for folder in folders]), None
    return torch.tensor([names.index(folder) for folder in folders]), len(names)


def read_image(path: Path, resolution: int | None) -> tuple[Pixels, Frame]:
    try:
        with Image.open(path) as image:
            return framed(image, resolution)
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"data: {path}: no such image; mend {CAPTIONS}") from None
    except Exception as error:  # Pillow raises whatever a broken file of some format leads to
        raise BadInput(f"data: {path}: damaged image: {error}; remove or replace it") from None


def from_sequence(rows: Sequence[Any], resolution: int | None = None, whole: bool = False) -> Samples:
    """Rows as the datasets library gives them: a PIL image or array, alone or under the key ``image``; beside it there
    may be a caption, ``text``."""
    try:
        count = len(rows)
        rows[0] if count else None
    except (TypeError, KeyError):
        raise BadInput(f"data: a {type(rows).__name__} is no folder, .npz, array or sequence of images") from None
    if not count:
        raise BadInput("data: the sequence of images is empty")
    step = 1 if whole else every(count, framed(image_of(rows[0], 0), resolution)[0])
    taken = {i: rows[i] for i in range(0, count, step)}
    samples = stack([(f"row {i}", *framed(image_of(row, i), resolution)) for i, row in taken.items()], resolution)
    texts = (row.get("text") for row in taken.values() if isinstance(row, Mapping))
    captions = tuple(text for text in texts if isinstance(text, str))
    return replace(samples, captions=captions) if len(captions) == len(samples) else samples


def image_of(row: Any, number: int) -> Any:
    if not isinstance(row, Mapping):
        return row
    key = next((key for key in IMAGE_KEYS if key in row), None)
    if key is None:
        raise BadInput(f"data: row {number} has {sorted(row)}, none of {', '.join(IMAGE_KEYS)}")
    return row[key]


def framed(image: Any, resolution: int | None) -> tuple[Pixels, Frame]:
    """The image, resized and cropped around the centre if asked, and what was done to it."""
    if resolution is None:
        array = to_array(image)
        return array, (array.shape[0], array.shape[1], 0, 0)
    if not isinstance(image, Image.Image):
        array = to_array(image)
        image = Image.fromarray(array if array.shape[2] > 1 else array[..., 0])
    image = plain(image)
    scale = resolution / min(image.size)
    left, top = (round((side * scale - resolution) / 2) for side in image.size)
    fitted = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return to_array(fitted), (image.height, image.width, top, left)


def plain(image: Image.Image) -> Image.Image:
    """Palettes become RGB, black and white grey."""
    return image.convert("L" if image.mode == "1" else "RGB") if image.mode in ("P", "CMYK", "1") else image


def to_array(image: Any) -> Pixels:
    """uint8 (height, width, channels); palettes become RGB, 16-bit grey 8-bit."""
    array = np.asarray(plain(image) if isinstance(image, Image.Image) else image)
    if array.dtype == np.uint16:
        array = (array // 257).astype(np.uint8)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise BadInput(f"data: an image is {array.dtype} {array.shape}, not uint8 (height, width, channels)")
    return array if array.ndim == 3 else array[..., None]


def stack(images: list[tuple[str, Pixels, Frame]], resolution: int | None) -> Samples:
    """Images of one size as samples; raises BadInput naming the first that differs."""
    first_name, first, _ = images[0]
    for name, image, _ in images:
        if image.shape[:2] != first.shape[:2]:
            remedy = "resize them to one size, or set 'resolution'"
            raise BadInput(f"data: {name} is {image.shape} but {first_name} is {first.shape}; {remedy}")
        if image.shape != first.shape:
            raise BadInput(f"data: {name} is {image.shape} but {first_name} is {first.shape}; convert all to RGB")
    samples = from_array(np.stack([image for _, image, _ in images]), first_name)
    return replace(samples, extra={FRAME: torch.tensor([frame for *_, frame in images])}) if resolution else samples
