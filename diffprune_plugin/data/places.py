"""Where data lie: files and folders, told from what else a path may lead to before anything is opened."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rich.console import Console

from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.utils.reading import check_regular

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def shown(name: object) -> str:
    """A name as an error's line may hold it: as it is, or quoted with its line breaks and the like spelt out."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


def refusal(path: Path, error: Exception) -> BadInput:
    """The line that says why the system does not give a path's file or folder."""
    if isinstance(error, FileNotFoundError):
        image = path.suffix.lower() in SUFFIXES
        what = "image; mend metadata.jsonl (or .csv, .parquet)" if image else "folder, .npz or .safetensors file"
        return BadInput(f"data: {shown(path)}: no such {what}")
    reason = error.strerror if isinstance(error, OSError) else None
    return BadInput(f"data: {shown(path)}: {reason or first_line(error)}")


def is_folder(path: Path) -> bool:
    """Whether a path leads to a folder; raises BadInput for one that leads nowhere."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError) as error:  # a NUL byte, half a surrogate pair; links in a circle, a name too long
        raise refusal(path, error) from None


def check_file(path: Path) -> None:
    """Raises BadInput for what is no regular file: a pipe or device might never end."""
    try:
        check_regular(path)
    except (OSError, ValueError) as error:
        raise refusal(path, error) from None


def seen_by_people(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith((".", "__MACOSX"))


def image_files(folder: Path) -> list[Path]:
    """Every image below a folder, by its suffix, in the order of their names; folders that links lead to count once.

    What is hidden (``.thumbnails``, ``._0001.png``), or a Mac's own in an archive, is none, as for `datasets`.
    """
    found, seen, left = [], set(), [folder]
    while left:
        here = left.pop()
        try:
            facts = os.stat(here)
            entries = list(os.scandir(here)) if (facts.st_dev, facts.st_ino) not in seen else []
        except OSError as error:
            raise refusal(here, error) from None
        seen.add((facts.st_dev, facts.st_ino))
        for entry in sorted(filter(seen_by_people, entries), key=lambda entry: entry.name):
            if not os.path.isdir(entry):  # entry.is_dir() fails for links in a circle
                found += [Path(entry)] if Path(entry).suffix.lower() in SUFFIXES else []
            elif entry.is_symlink():
                left.insert(0, Path(entry))  # what is here itself comes before what links lead to
            else:
                left.append(Path(entry))
    return sorted(found)


def say(line: str) -> None:
    Console(stderr=True).print(f"data: {line}", soft_wrap=True, markup=False, highlight=False)
