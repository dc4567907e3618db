"""Inputs for an ONNX file of ours, from the file alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffprune_plugin.errors import BadInput, nearest
from diffprune_plugin.export.integrity import parse, read_fact, read_provenance
from diffprune_plugin.utils.optional import need

# Of files that do not say what theirs are.
INPUTS = {"sample": "sample", "timestep": "timestep"}
TIMESTEPS = [0, 999]
Feeds = dict[str, npt.NDArray[Any]]


def input_shapes(path: Path) -> dict[str, list[str | int]]:
    """The inputs of a graph, in order: a word for each dynamic axis, a number for each fixed one."""
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in parse(path).graph.input
    }


def input_names(facts: Mapping[str, str]) -> dict[str, str]:
    """What the inputs ``sample`` and ``timestep`` are called in a file with this provenance."""
    named: dict[str, str] = read_fact(facts, "inputs")
    return INPUTS | named


def timesteps(facts: Mapping[str, str]) -> range:
    """Those that the model of a file with this provenance takes."""
    first, last = read_fact(facts, "timesteps") or TIMESTEPS
    return range(first, last + 1)


def multiples(facts: Mapping[str, str]) -> dict[str, int]:
    """The number that the size of a dynamic axis has to be a multiple of, by its word; 1 for those not listed."""
    found: dict[str, int] = read_fact(facts, "multiples")
    return found


def check_multiple(path: Path, word: str, size: int, step: int) -> None:
    """Raises BadInput, naming sizes near by, for a size of a dynamic axis that the file does not compute."""
    if size % step:
        below = [size // step * step] if size > step else []
        near = " and ".join(map(str, [*below, -(-size // step) * step]))
        raise BadInput(f"{path}: {word} {size}: it computes multiples of {step}, next {near}; pad or resize the sample")


def input_types(path: Path) -> dict[str, np.dtype[Any]]:
    helper = need("onnx").helper
    return {v.name: helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in parse(path).graph.input}


def fixed_dims(path: str | Path, **asked: int) -> dict[str, int]:
    """A size for each dynamic axis: as asked, else as the model's config has it.

    Raises BadInput for a size below 1 or one that the file has fixed to another.
    """
    path = Path(path)
    facts = read_provenance(path)
    defaults: dict[str, int] = read_fact(facts, "axes")
    words = {axis for shape in input_shapes(path).values() for axis in shape if isinstance(axis, str)}
    for word, size in asked.items():
        if word not in defaults:
            raise BadInput(f"{path}: no axis {word!r}{nearest(word, defaults)}; it has {', '.join(defaults)}")
        if size < 1:
            raise BadInput(f"{word} {size}: at least 1 is needed")
        if word not in words and size != defaults[word]:
            raise BadInput(f"{path}: {word} is fixed to {defaults[word]}, not {size}; export with --dynamic {word}")
        check_multiple(path, word, size, multiples(facts).get(word, 1))
    return {word: asked.get(word, defaults[word]) for word in defaults if word in words}


def example_feeds(path: str | Path, dims: Mapping[str, int]) -> Feeds:
    """Seeded inputs: normal noise, the middle timestep, index 0 of what is an index."""
    generator, facts = np.random.default_rng(0), read_provenance(Path(path))
    timestep, steps = input_names(facts)["timestep"], timesteps(facts)
    feeds: Feeds = {}
    types = input_types(Path(path))
    for name, axes in input_shapes(Path(path)).items():
        shape = [dims[axis] if isinstance(axis, str) else axis for axis in axes]
        if name == timestep:
            feeds[name] = np.full(shape, steps[len(steps) // 2], types[name])
        elif types[name].kind == "f":
            feeds[name] = generator.standard_normal(shape).astype(types[name])
        else:
            feeds[name] = np.zeros(shape, types[name])
    return feeds
