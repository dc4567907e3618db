"""A model or a pipeline into a directory, all of it or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from diffprune_plugin.adapters.state import check_loaded, check_own_layers, check_stock
from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.plan import PLAN_FILE
from diffprune_plugin.plugins import denoiser_of, find_adapter
from diffprune_plugin.pruning.card import source_of, write_card
from diffprune_plugin.pruning.directory import SOURCE_KEY, read_json, to_json, without_paths
from diffprune_plugin.pruning.pruned_class import PrunedModelMixin, check_loadable
from diffprune_plugin.pruning.stock import as_stock
from diffprune_plugin.utils.files import new_directory, sync

# What a directory is; one is replaced only by its like.
DENSE, PRUNED = "dense model", "pruned model"


def save(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    extra: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a pipeline or a UNet, dense or pruned, as a diffusers directory, all of it or nothing; returns the path.

    ``extra``: further files by name. Raises BadInput if the directory exists and may not be replaced, for a masked
    UNet, which `save_masked` writes, and for a model that could not be loaded again.
    """
    path = Path(directory)
    name, denoiser = denoiser_of(model) if isinstance(model, DiffusionPipeline) else ("", model)
    find_adapter(denoiser)
    check_stock(denoiser)
    check_loaded(denoiser)
    check_own_layers(denoiser)
    check_loadable(denoiser)
    pruned = isinstance(denoiser, PrunedModelMixin) or PLAN_FILE in (extra or {})  # where blocks alone went, it is none
    with new_directory(path, overwrite, PRUNED if pruned else DENSE) as temporary:
        try:
            model.save_pretrained(str(temporary), safe_serialization=True)
        except SafetensorError as error:
            raise BadInput(f"cannot write {path}: {error}; free space or choose another output") from error
        if isinstance(denoiser, PrunedModelMixin):
            as_stock(temporary, name, denoiser)
        for file_name, content in (extra or {}).items():
            (temporary / file_name).write_bytes(content.encode() if isinstance(content, str) else content)
        if isinstance(model, DiffusionPipeline):
            write_card(temporary, source_of(model))
        for file in files_below(temporary):
            if file.suffix == ".json" and SOURCE_KEY in file.read_text():
                file.write_text(to_json(without_paths(read_json(file))))
            sync(file)
    return path


def files_below(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file())
