"""Pictures with names and categories: the npm package emoji-datasource-google (art: Apache-2.0), at 32x32 on white.

    python benchmarks/making/emoji.py     # benchmarks/models/emoji/train.npz and held_out.npz; needs npm, once

Skin tones and other variants of a picture are on the same side of the split as the picture itself.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffprune_plugin.utils.files import new_file

MODELS = Path(__file__).parents[1] / "models"  # what is made or fetched, and is not in git
PLACE = MODELS / "emoji"
PACKAGE = "emoji-datasource-google@16.0.0"
SIZE, HELD_OUT = 32, 0.1  # pixels; share of the pictures, variants not counted
CLASSES = ("faces", "hands", "people", "animals", "food", "places", "objects", "symbols", "flags")
NULL = len(CLASSES)  # the label that stands for no class
CATEGORIES = {
    "Smileys & Emotion": "faces",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "places",
    "Activities": "objects",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
SUBCATEGORIES = {"heart": "symbols", "emotion": "symbols", "body-parts": "hands"}  # not as their category


def class_of(entry: dict[str, Any]) -> str | None:
    """The class of a picture by its category and subcategory; None for the bare skin tones."""
    subcategory = entry["subcategory"]
    if subcategory.startswith("hand"):
        return "hands"
    return SUBCATEGORIES.get(subcategory) or CATEGORIES.get(entry["category"])


def fetched() -> Path:
    """The package as npm packs it, kept."""
    PLACE.mkdir(parents=True, exist_ok=True)
    file = PLACE / f"{PACKAGE.replace('@', '-')}.tgz"
    if not file.exists():
        subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=PLACE, check=True, stdout=subprocess.DEVNULL)
    return file


def pictures(package: tarfile.TarFile) -> Iterator[tuple[int, str, str]]:
    """Of each picture: the number of the one that it is a variant of (or its own), its class, its file."""
    listing = package.extractfile("package/emoji.json")
    assert listing is not None
    for number, entry in enumerate(json.load(listing)):
        name = class_of(entry)
        for each in (entry, *entry.get("skin_variations", {}).values()):
            if name and each["has_img_google"]:
                yield number, name, each["image"]


def on_white(data: bytes) -> npt.NDArray[np.uint8]:
    """uint8 (32, 32, 3) of a 64x64 PNG with transparency: composed first, then every four pixels averaged."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB").reduce(image.width // SIZE))


def make() -> tuple[Path, Path]:
    """The files of the pictures to train on and of those held out: ``images``, ``class_labels`` and the null label."""
    train, held_out = PLACE / "train.npz", PLACE / "held_out.npz"
    if train.exists() and held_out.exists():
        return train, held_out
    with tarfile.open(fetched()) as package:
        listed = list(pictures(package))
        folder = "package/img/google/64/"
        data = {m.name.removeprefix(folder): m for m in package.getmembers() if m.name.startswith(folder)}
        images = np.stack([on_white(package.extractfile(data[file]).read()) for _, _, file in listed])  # type: ignore[union-attr]
    bases = np.array([number for number, _, _ in listed])
    labels = np.array([CLASSES.index(name) for _, name, _ in listed])
    known = np.unique(bases)
    out = np.random.default_rng(0).permutation(known)[: round(HELD_OUT * len(known))]
    for file, rows in ((train, ~np.isin(bases, out)), (held_out, np.isin(bases, out))):
        with new_file(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, images=images[rows], class_labels=labels[rows], null_class_labels=np.array([NULL]))
    return train, held_out


if __name__ == "__main__":
    for path in make():
        with np.load(path) as arrays:
            counts = np.bincount(arrays["class_labels"], minlength=len(CLASSES))
        print(path.name, counts.sum(), dict(zip(CLASSES, counts.tolist(), strict=True)))
