"""Which files hold a model's weights, and whether the model took all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import nn

from diffprune_plugin.errors import BadInput
from diffprune_plugin.pruning.building import foreign_errors

UnusedTensors = Literal["refuse", "ignore"]
# diffusers and transformers put the variant before the number of a shard, or, long ago, after it.
NAME = re.compile(
    r"(diffusion_pytorch_)?model(\.(?P<variant>[\w-]+?))?(-\d+-of-\d+)?(\.(?P<late>[\w-]+))?\.safetensors"
)
PICKLE = re.compile(r"(diffusion_)?pytorch_model[\w.-]*\.bin")


def weight_files(folder: Path) -> dict[str | None, list[Path]]:
    """The safetensors files of a component by variant; None is the one without a name."""
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if name := NAME.fullmatch(path.name):
            found.setdefault(name["variant"] or name["late"], []).append(path)
    return found


def variant_of(folder: Path, asked: str | None) -> str | None:
    """The variant of a component's weights: the one asked for, else the plain one, else the only one.

    Raises BadInput where there is none, or more than one to choose from.
    """
    found = weight_files(folder)
    named = ", ".join(sorted(str(name) for name in found if name))
    if asked in found or (asked is None and len(found) == 1):
        return asked if asked in found else next(iter(found))
    if found and asked is not None:
        raise BadInput(
            f"variant: {asked!r}: no such weights in {folder}; it has {named or 'plain ones, without a name'}"
        )
    if found:
        raise BadInput(f"{folder}: weights of several variants; choose one with 'variant': {named}")
    if any(PICKLE.fullmatch(path.name) for path in folder.iterdir()):
        raise BadInput(
            f"{folder}: its weights are .bin files, pickles, which are never opened here; convert them with diffusers, "
            "if you trust them: load with use_safetensors=False, then save_pretrained(DIRECTORY)"
        )
    raise BadInput(f"{folder}: no weights (*.safetensors); save the model again")


def tensors_in(files: list[Path]) -> dict[str, str]:
    """The dtype of each tensor by name, from the headers."""
    found: dict[str, str] = {}
    for path in files:
        with foreign_errors(f"{path}: truncated or damaged"), safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def check_used(
    model: nn.Module, tensors: Mapping[str, str], info: Mapping[str, Any], where: Path, unused: UnusedTensors
) -> None:
    """Raises BadInput, with the first of them, unless every tensor of the model came from the files and none is left.

    ``info``: what diffusers says of the loading.
    """
    if missing := sorted(info["missing_keys"]):
        raise BadInput(
            f"{where}: no tensor {missing[0]!r} in the weights ({len(missing)} missing), which config.json describes; "
            "restore the files"
        )
    if (left := sorted(info["unexpected_keys"])) and unused == "refuse":
        raise BadInput(
            f"{where}: tensor {left[0]!r} ({len(left)} such) is not part of what config.json describes; restore the "
            "files, or go on without with 'unused_tensors: ignore'"
        )
    for name, _ in model.named_parameters():
        if not tensors.get(name, "F").startswith(("F", "BF")):
            raise BadInput(f"{where}: tensor {name!r} holds {tensors[name]}, no floating-point numbers; restore it")
