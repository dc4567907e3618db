"""A seeded mutator of model directories: JSON values, safetensors headers, files that are missing, renamed or cut."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 7, 10**9, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../..", "\0", "é" * 300,
    [], [1], [[]], ["diffusers", "DDPMScheduler"], ["os", "system"], {}, {"a": 1}, "UNet2DConditionModel", "nan",
)  # fmt: skip
TEXTS = ("", "{", "[]", "null", '{"a": ' * 5000, "\ufeff{}", "{}", '{"_class_name": 1}', "9" * 5000, '{"a": NaN}', "\0")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON tree."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in inner for found in ((*path, key), *places(item, (*path, key)))]


def mutate_value(rng: random.Random, file: Path) -> str:
    """Replace, remove, repeat or rename one value of a JSON file."""
    content = json.loads(file.read_text())
    path = rng.choice(places(content))
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    how = rng.choice(["replace", "replace", "replace", "remove", "rename"])
    if how == "remove":
        del holder[path[-1]]
    elif how == "rename" and isinstance(holder, dict):
        holder[f"{path[-1]}x"] = holder.pop(path[-1])
    else:
        old, number = holder[path[-1]], isinstance(holder[path[-1]], int)
        holder[path[-1]] = rng.choice([old * 2, old + 1, -old]) if number and rng.random() < 0.3 else rng.choice(VALUES)
    file.write_text(json.dumps(content))
    return f"{file.name}: {how} {'.'.join(map(str, path))}"


def mutate_text(rng: random.Random, file: Path) -> str:
    text = rng.choice(TEXTS)
    file.write_text(text)
    return f"{file.name}: text {text[:20]!r}"


def mutate_bytes(rng: random.Random, file: Path) -> str:
    """Cut, lengthen or change some bytes."""
    content = bytearray(file.read_bytes())
    how = rng.choice(["cut", "lengthen", "change", "empty"])
    if how == "cut":
        del content[rng.randrange(len(content)) :]
    elif how == "lengthen":
        content += bytes(rng.randrange(1, 100))
    elif how == "change":
        content[rng.randrange(min(len(content), 2000))] ^= 1 << rng.randrange(8)
    else:
        content.clear()
    file.write_bytes(content)
    return f"{file.name}: {how}"


def mutate_header(rng: random.Random, file: Path) -> str:
    """Change one entry of a safetensors header: the name, the dtype, the shape or the offsets."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    name = rng.choice([key for key in header if key != "__metadata__"])
    how = rng.choice(["name", "remove", "dtype", "shape", "offsets", "metadata", "twice"])
    if how == "name":
        header[f"{name}.x"] = header.pop(name)
    elif how == "remove":
        del header[name]
    elif how == "dtype":
        header[name]["dtype"] = rng.choice(["I32", "U32", "F64", "F16", "BOOL", "X", 1])
    elif how == "shape":
        header[name]["shape"] = rng.choice([[], [0], [-1], [10**18], header[name]["shape"][::-1], "x", None])
    elif how == "offsets":
        header[name]["data_offsets"] = rng.choice([[0, 4], [4, 0], [10**18, 10**18 + 4], [], None])
    elif how == "metadata":
        header["__metadata__"] = rng.choice([{}, {"format": "x"}, {"plan": "0"}, {"sha256": "0"}, 1])
    else:
        header[f"{name}.twin"] = header[name]
    written = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + size :])
    return f"{file.name}: {how} of {name}"


def mutate_place(rng: random.Random, file: Path) -> str:
    """Remove a file, rename it, or put a directory, a link to itself or another file in its place."""
    how = rng.choice(["remove", "rename", "directory", "loop", "other"])
    others = [path for path in file.parent.iterdir() if path.is_file() and path != file]
    content = file.read_bytes()
    file.unlink()
    if how == "rename":
        file.with_name(f"{rng.choice('abc')}.{file.name}").write_bytes(content)
    elif how == "directory":
        file.mkdir()
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "other" and others:
        file.write_bytes(rng.choice(others).read_bytes())
    return f"{file.name}: {how}"


def mutate(rng: random.Random, directory: Path) -> str:
    """Damage one file of a model directory; returns how."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    file = rng.choice(files)
    kinds: list[Callable[[random.Random, Path], str]] = [mutate_bytes, mutate_place]
    further = {".json": [*[mutate_value] * 6, mutate_text], ".safetensors": [mutate_header] * 4}
    kinds += further.get(file.suffix, [mutate_text])
    return rng.choice(kinds)(rng, file)
