"""Paths as people write them: what a shell did not fill in or an option swallowed is refused, not made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffprune_plugin.errors import BadInput
from diffprune_plugin.utils.files import resolved

UNFILLED = "/$", "${"  # inside a path


def as_written(path: str) -> str:
    """The path; raises ValueError for one that a shell has still to fill in, or that is an option."""
    if path.startswith("~"):
        raise ValueError("only a shell knows what ~ is; write the whole path")
    if path.startswith("$") or any(sign in path for sign in UNFILLED):
        raise ValueError("only a shell fills in what $ stands for; write the whole path")
    if path.startswith("-"):
        raise ValueError("looks like an option, not like a path; give a path, whole if it begins like that")
    if not path:
        raise ValueError("no path, which would be the working directory; write . if that is meant")
    return path


def check_different(results: Mapping[str, Path | str | None], directory: Path | str | None = None) -> None:
    """Raises BadInput where two files to be written, by the name that they were asked for by, are one, or one lies in
    the directory that is written whole."""
    places: dict[Path, str] = {} if directory is None else {resolved(Path(directory)): "the output"}
    whole = set(places)
    for name, path in results.items():
        if path is None:
            continue
        place = resolved(Path(path))
        taken = next((other for other in (place, *(whole & {*place.parents})) if other in places), None)
        if taken is not None:
            where = "is" if taken == place else "lies in"
            raise BadInput(f"{name} {path}: {where} {places[taken]} too; choose another place")
        places[place] = name
