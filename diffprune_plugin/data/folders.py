"""Images in a folder: those that its metadata lists, else all that lie below it."""

from __future__ import annotations

from pathlib import Path

from diffprune_plugin.data.columns import Label, described
from diffprune_plugin.data.metadata import read_metadata
from diffprune_plugin.data.pictures import every, read_picture, stack
from diffprune_plugin.data.places import SUFFIXES, image_files, shown
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput


def load_folder(path: Path, resolution: int | None = None, whole: bool = False) -> Samples:
    """The images that a metadata file lists, with their captions or classes; else every image below a folder, in the
    order of their names, labelled by class where each lies in a folder of its class."""
    rows = read_metadata(path)
    files = [row.file for row in rows] or image_files(path)
    if not files:
        raise BadInput(f"data: {shown(path)}: no image in this folder ({', '.join(sorted(SUFFIXES))})")
    labels: list[Label] = [row.label for row in rows]
    if not rows and path not in {file.parent for file in files}:
        labels = [file.relative_to(path).parts[0] for file in files]
    step = 1 if whole else every(len(files), read_picture(files[0], resolution))
    samples = stack([read_picture(file, resolution) for file in files[::step]], resolution)
    return described(samples, [row.text for row in rows[::step]], labels, step=step)
