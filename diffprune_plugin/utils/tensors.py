"""Named tensors on disk: safetensors with a hash of their contents, so that a flipped bit does not load in silence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.utils.files import disk_errors
from diffprune_plugin.utils.hashes import json_hash

HASH = "sha256"
BOUND = "metadata_sha256"  # of the other metadata, with the hash of the tensors among them


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names and contents, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of all parameters, in order."""
    return tensors_hash(model.named_parameters())


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> str:
    """Write the tensors and metadata with their hashes, always the same bytes; returns the hash of the tensors.

    Raises BadInput if the disk is full.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stamp = {"format": "pt", **(metadata or {}), HASH: tensors_hash(sorted(plain.items()))}
    stamp[BOUND] = bound_hash(stamp)
    try:
        with disk_errors(path):
            save_file(plain, path, metadata=stamp)
            sort_header(path)
    except SafetensorError as error:
        raise BadInput(f"cannot write {path.name}: {error}; free space or choose another output") from error
    return stamp[HASH]


def sort_header(path: Path) -> None:
    """Put the metadata of a file in order: safetensors writes them in another one each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(ordered) == length
        file.seek(8)
        file.write(ordered)


def load_tensors(path: Path, bound: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file; raises BadInput if it is missing, truncated or altered.

    ``bound``: also if nothing says that the metadata are those it was written with, as in files of older versions.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; save the model again") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: truncated or damaged: {first_line(error)}") from None
    stated = metadata.get(BOUND, None if bound else bound_hash(metadata))
    if metadata.get(HASH) != tensors_hash(sorted(tensors.items())) or stated != bound_hash(metadata):
        raise BadInput(f"{path}: altered since it was written (its sha256 differs); restore it or make it again")
    return tensors, metadata


def bound_hash(metadata: Mapping[str, str]) -> str:
    return json_hash({key: value for key, value in metadata.items() if key != BOUND})
