"""A model or a pipeline into a directory, all of it or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffprune_plugin.adapters.state import check_stock
from diffprune_plugin.plugins import denoiser_of
from diffprune_plugin.pruning.pruned_class import write_model
from diffprune_plugin.utils.files import new_directory


def save(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    extra: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a pipeline or a UNet, dense or pruned, as a diffusers directory, all of it or nothing; returns the path.

    ``extra``: further files by name. Raises BadInput if the directory exists and ``overwrite`` is not set, or for
    a masked UNet, which `save_masked` writes.
    """
    path = Path(directory)
    name, denoiser = denoiser_of(model) if isinstance(model, DiffusionPipeline) else ("", model)
    check_stock(denoiser)
    with new_directory(path, overwrite) as temporary:
        if isinstance(model, DiffusionPipeline):
            # A pipeline remembers the class that its UNet had when it was made: before remove_ gave it its own.
            model.register_modules(**{name: denoiser})
            model.save_pretrained(str(temporary), safe_serialization=True)
        else:
            write_model(model, temporary)
        for name, content in (extra or {}).items():
            (temporary / name).write_bytes(content.encode() if isinstance(content, str) else content)
        for file in files_below(temporary):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    return path


def files_below(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file())
