"""A seeded mutator of data sets: images of every suffix, .npz and .safetensors headers, dtypes, metadata lines."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import _SIZE, save_file

from diffprune_plugin.data.places import SUFFIXES

Random = random.Random
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F")
DTYPES = (
    ">u1", ">f4", ">f8", ">i8", ">u2", "<f2", "u2", "u4", "u8", "g", ">g", "c16", "?", "U3", "S3", "M8[s]", "O", "i1",
)  # fmt: skip
PLACES = ("fifo", "device", "loop", "folder", "newline", "surrogate", "long", "up", "deep", "numbers", "none")
SHAPES = ((), (0,), (2, 0, 8, 1), (2, 8, 8), (3,), (2, 8, 8, 7), (1, 1), (0, 8, 8, 1))
LIES = (b"(-1", b"(0", b"(2.", b"([]", b"(" + b"9" * 13, b"(" + b"9" * 30, b"2", b"((2")  # for "(2" in a header
KINDS_OF_TENSORS = [
    kind
    for kind in (
        torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64,
        torch.uint16, torch.float8_e5m2,
    )
    if kind in _SIZE  # that this version of safetensors writes
]  # fmt: skip
ENTRIES: dict[str, list[Any]] = {
    "dtype": ["F4", "U32", "F8_E8M0", "X", 1],
    "shape": [[-1], [10**18], "x", []],
    "data_offsets": [[4, 0], [0, 10**18], []],
}
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x", "../..", "\0", "a\nb", "\ud800", "é" * 300, "/dev/zero",
    "9" * 5000, "0.png", "0.bmp", [], {}, [[1]], ["a", "b"], {"a": 1}, "٣",
)  # fmt: skip
LINES = (
    "{", "[]", "null", '{"a": ' * 5000, "[" * 100000, "\ufeff", "9" * 5000, "\0", '"', "a,b,c,d", "\r", "\x85",
    '{"file_name": "0.png"}', "0.png",
)  # fmt: skip
CODECS = ("utf-8-sig", "utf-16", "utf-16-le", "latin-1", "utf-32")


def changed(rng: Random, data: bytes, head: int = 400) -> bytes:
    """Cut, lengthened, emptied, or with some bytes of its head changed."""
    content = bytearray(data)
    how = rng.choice(["cut", "lengthen", "change", "change", "change", "empty", "repeat"])
    if how == "cut":
        del content[rng.randrange(len(content)) :]
    elif how == "lengthen":
        content += rng.randbytes(rng.randrange(1, 100))
    elif how == "change":
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(min(len(content), head))] = rng.randrange(256)
    elif how == "empty":
        content.clear()
    else:
        content *= 2
    return bytes(content)


def picture(rng: Random, suffix: str) -> bytes:
    """An image file of any mode that the format has, often with a rotation in its EXIF."""
    image, file = Image.new("RGB", (rng.choice([8, 8, 8, 5]), 8), (10, 200, 30)), io.BytesIO()
    kind = {".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper())
    exif = Image.Exif()
    exif[0x0112] = rng.choice([1, 2, 3, 5, 6, 8, 0, 99])
    try:
        Image.new(rng.choice(MODES), image.size).save(file, kind, exif=exif)
    except (OSError, ValueError, KeyError):  # a mode that this format does not have
        file = io.BytesIO()
        image.save(file, kind)
    return file.getvalue()


def mutate_images(rng: Random, folder: Path) -> str:
    suffix = rng.choice([*sorted(SUFFIXES), ".PNG"])
    data = picture(rng, suffix.lower())
    damage = rng.random() < 0.8
    (folder / f"0{suffix}").write_bytes(changed(rng, data) if damage else data)
    (folder / f"1{suffix}").write_bytes(picture(rng, suffix.lower()))
    return f"images {suffix} damaged={damage}"


def mutate_places(rng: Random, folder: Path) -> str:
    """What is no file, or has a strange name."""
    how = rng.choice(PLACES)
    path = folder / "0.png"
    if how == "fifo":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/random"]))
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "folder":
        path.mkdir()
    elif how in ("newline", "surrogate", "long"):
        name = {"newline": b"a\nb\x1b[31m", "surrogate": b"\xff\xfe", "long": b"n" * 240}[how]
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name + b".png"))).write_bytes(b"no image")
    elif how == "up":
        (folder / "up").symlink_to(folder, target_is_directory=True)
    elif how == "deep":
        (folder / "/".join("d" * 300)).mkdir(parents=True)
    elif how == "numbers":
        for name in ("1", "9" * 100):
            (folder / name).mkdir()
            Image.new("L", (8, 8)).save(folder / name / "a.png")
    return f"place {how}"


def mutate_npz(rng: Random, folder: Path) -> str:
    """Other dtypes and shapes, headers that lie, zip files that are damaged or hold no arrays."""
    arrays = {"images": np.zeros((2, 8, 8, 1), "u1"), "class_labels": np.arange(2), "null_class_labels": np.array([3])}
    key, how = rng.choice(list(arrays)), rng.choice(["dtype", "shape", "bytes", "header", "raw", "name", "nan"])
    if how == "dtype":
        arrays[key] = arrays[key].astype(rng.choice(DTYPES))
    elif how == "shape":
        arrays[key] = np.zeros(rng.choice(SHAPES), arrays[key].dtype)
    elif how == "nan":
        arrays[key] = np.full(len(arrays[key]), rng.choice([np.nan, np.inf]))
    elif how == "name":
        arrays[rng.choice(["null_", "a\nb", "x" * 300, "images.npy"])] = arrays.pop(key)
    np.savez(folder / "a.npz", **arrays)
    data = (folder / "a.npz").read_bytes()
    if how == "bytes":
        (folder / "a.npz").write_bytes(changed(rng, data, len(data)))
    elif how in ("header", "raw"):
        with zipfile.ZipFile(folder / "a.npz") as read, zipfile.ZipFile(folder / "b.npz", "w") as written:
            for name in read.namelist():
                member = read.read(name)
                if name == f"{key}.npy" and how == "header":
                    lie = member.replace(b"'shape': (2", b"'shape': " + rng.choice(LIES), 1)
                    member = rng.choice([lie, changed(rng, member, 128)])
                written.writestr(name.removesuffix(".npy") if how == "raw" else name, member)
        (folder / "b.npz").replace(folder / "a.npz")
    return f"npz {how} {key}"


def mutate_safetensors(rng: Random, folder: Path) -> str:
    """Other dtypes and shapes, a header that lies, bytes."""
    tensors = {"latents": torch.zeros(2, 4, 8, 8), "text_embeds": torch.zeros(2, 5), "null_text_embeds": torch.zeros(5)}
    key, how = rng.choice(list(tensors)), rng.choice(["dtype", "shape", "name", "nan", "header", "bytes"])
    if how == "dtype":
        tensors[key] = tensors[key].to(rng.choice(KINDS_OF_TENSORS))
    elif how == "shape":
        tensors[key] = torch.zeros(rng.choice(SHAPES))
    elif how == "name":
        tensors[rng.choice(["null_", "a\nb", "sample", "x" * 300])] = tensors.pop(key)
    elif how == "nan":
        tensors[key] = torch.full(tensors[key].shape, rng.choice([float("nan"), float("inf")]))
    file = folder / "a.safetensors"
    save_file(tensors, file)
    data = file.read_bytes()
    if how == "header":
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        part = rng.choice(list(ENTRIES))
        header[key][part] = rng.choice(ENTRIES[part])
        written = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(written)) + written + data[8 + size :])
    elif how == "bytes":
        file.write_bytes(changed(rng, data, 200))
    return f"safetensors {how} {key}"


def mutate_metadata(rng: Random, folder: Path) -> str:
    """One value, line, byte or the encoding of metadata.jsonl or metadata.csv; or two such files."""
    for number in range(3):
        Image.new("L", (8, 8)).save(folder / f"{number}.png")
    rows: list[dict[str, Any]] = [{"file_name": f"{i}.png", "text": "a, b", "label": i} for i in range(3)]
    how = rng.choice(["value", "value", "value", "key", "line", "bytes", "codec", "both", "none"])
    kind = rng.choice(["jsonl", "csv"])
    row, key = rng.choice(rows), rng.choice(["file_name", "text", "label"])
    if how == "value":
        row[key] = rng.choice(VALUES)
    elif how == "key":
        row[rng.choice(["caption", "labels", "x"])] = row.pop(key)
    elif how == "none":
        for each in rows:
            del each[key]
    if kind == "jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    if how == "line":
        lines[rng.randrange(len(lines))] = rng.choice(LINES)
    data = "\n".join(lines).encode(rng.choice(CODECS) if how == "codec" else "utf-8", errors="replace")
    (folder / f"metadata.{kind}").write_bytes(changed(rng, data) if how == "bytes" else data)
    if how == "both":
        (folder / "metadata.parquet").write_bytes(b"PAR1")
    return f"metadata.{kind} {how} {key}"


KINDS: tuple[Callable[[Random, Path], str], ...] = (
    mutate_images, mutate_images, mutate_places, mutate_npz, mutate_safetensors, mutate_metadata,
)  # fmt: skip


def damaged(seed: int, folder: Path) -> tuple[str, Path]:
    """Make a damaged data set in an empty folder; what it is, and its path."""
    rng = Random(seed)
    how = KINDS[seed % len(KINDS)](rng, folder)
    alone = next((path for path in folder.iterdir() if path.suffix in (".npz", ".safetensors")), None)
    return how, alone or folder
