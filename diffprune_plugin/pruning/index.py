"""What model_index.json names, checked before diffusers sees it: some versions run code that lies in the directory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

from diffprune_plugin.errors import BadInput
from diffprune_plugin.plugins import adapters, plugin_manager
from diffprune_plugin.pruning.directory import LOADER_FILE, LOADERS, read_json

INDEX_FILE = "model_index.json"
LIBRARIES = ("diffusers", "transformers", "diffprune_plugin")
MOST_TIMESTEPS = 100_000  # of a scheduler; it makes arrays of that many


def read_index(directory: Path) -> dict[str, tuple[str, str]]:
    """The components of a pipeline directory: library and class by name.

    Raises BadInput for one that is damaged, or names code other than diffusers', transformers' and of plugins that
    bring an adapter.
    """
    path = directory / INDEX_FILE
    index = read_json(path)
    if not isinstance(index.get("_class_name"), str):
        raise BadInput(f"{path}: _class_name {index.get('_class_name')!r} is no diffusers class; other code is not run")
    found = {}
    for name, part in index.items():
        if is_component(part):
            check_component(directory, name, *part)
            found[name] = (part[0], part[1])
    check_scheduler(directory / "scheduler" / "scheduler_config.json")
    return found


def is_component(part: Any) -> bool:
    return isinstance(part, list) and len(part) == 2 and all(isinstance(word, str) for word in part)


def check_component(directory: Path, name: str, library: str, kind: str) -> None:
    """Raises BadInput for a library that is not known, or one that lies in the directory itself."""
    place = f"{directory / INDEX_FILE}: {name}: [{library!r}, {kind!r}]"
    package = library.partition(".")[0]
    if not (library in LIBRARIES or is_pipeline_module(library) or package in plugin_packages()):
        raise BadInput(
            f"{place}: code from {library!r} is not run; known are {', '.join(LIBRARIES)} and the packages of adapters"
        )
    if (directory / name / INDEX_FILE).exists():
        raise BadInput(f"{place}: {name} holds a pipeline of its own, whose code is not looked at; remove {INDEX_FILE}")
    for file in (folder / f"{word}.py" for folder in (directory, directory / name) for word in (library, package)):
        if file.exists() and not is_our_loader(file, directory / name):
            raise BadInput(f"{place}: {file} would be run in its place; remove that file")


def is_our_loader(file: Path, folder: Path) -> bool:
    """Whether a file is a loader that some version of ours wrote into a component's folder, byte for byte."""
    return file == folder / LOADER_FILE and file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() in LOADERS


def is_pipeline_module(name: str) -> bool:
    """Whether a name is a module of diffusers.pipelines, as ``stable_diffusion`` is."""
    import diffusers

    found = getattr(diffusers.pipelines, name, None) if name.isidentifier() else None
    return isinstance(found, ModuleType) and found.__name__.startswith("diffusers.")


def plugin_packages() -> set[str]:
    return {entry.value.module.partition(".")[0] for entry in adapters(plugin_manager()).values()}


def check_scheduler(path: Path) -> None:
    """Raises BadInput for a scheduler's config that is damaged, or has timesteps without end."""
    if path.exists():
        count = read_json(path).get("num_train_timesteps", 1)
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_TIMESTEPS:
            raise BadInput(f"{path}: num_train_timesteps: {count!r} is not between 1 and {MOST_TIMESTEPS}; restore it")
