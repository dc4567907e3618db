"""Named tensors on disk: safetensors with a hash of their contents, so that a flipped bit does not load in silence."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffprune_plugin.errors import BadInput
from diffprune_plugin.utils.files import disk_errors

HASH = "sha256"


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


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the tensors with their hash; raises BadInput if the disk is full."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stamp = {"format": "pt", **(metadata or {}), HASH: tensors_hash(sorted(plain.items()))}
    try:
        with disk_errors(path):
            save_file(plain, path, metadata=stamp)
    except SafetensorError as error:
        raise BadInput(f"cannot write {path.name}: {error}; free space or choose another output") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file; raises BadInput if it is missing, truncated or altered."""
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; save the model again") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: truncated or damaged: {' '.join(str(error).split())}") from None
    if metadata.get(HASH) != tensors_hash(sorted(tensors.items())):
        raise BadInput(f"{path}: altered since it was written (its sha256 differs); restore it or make it again")
    return tensors, metadata
