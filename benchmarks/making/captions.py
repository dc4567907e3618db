"""The pictures of making/emoji.py at 64x64 with their names, as folders of captioned images.

    python benchmarks/making/captions.py     # benchmarks/models/captions/train and held_out; needs npm, once

What is held out is what making/emoji.py holds out.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from diffprune_plugin.utils.files import write_text
from making.emoji import MODELS, fetched, held_out, pictures

PLACE = MODELS / "captions"
SIZE = 64  # pixels


def make() -> tuple[Path, Path]:
    """Folders of those to train on and of those held out: PNG files, and metadata.jsonl, which is written last."""
    folders = PLACE / "train", PLACE / "held_out"
    if all((folder / "metadata.jsonl").exists() for folder in folders):
        return folders
    with tarfile.open(fetched()) as package:
        found = list(pictures(package))
        rows: tuple[list[str], list[str]] = ([], [])
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for picture, unseen in zip(found, np.array(held_out(found), int), strict=True):
            Image.fromarray(picture.pixels(package, SIZE)).save(folders[unseen] / picture.file)
            rows[unseen].append(json.dumps({"file_name": picture.file, "text": picture.caption}))
    for folder, lines in zip(folders, rows, strict=True):
        write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")
    return folders


if __name__ == "__main__":
    for path in make():
        print(path, len(list(path.glob("*.png"))))
