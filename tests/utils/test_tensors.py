"""Named tensors on disk: the same bytes each time, and nothing altered loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffprune_plugin.errors import BadInput
from diffprune_plugin.utils.tensors import load_tensors, save_tensors

TENSORS = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}
METADATA = {f"key {i}": f'"\n\u00e4 {i}' for i in range(20)}


def test_the_same_tensors_and_metadata_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_tensors(TENSORS, tmp_path / name, METADATA)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    tensors, metadata = load_tensors(tmp_path / "one", bound=True)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert METADATA.items() <= metadata.items()


@pytest.mark.parametrize(("old", "new"), [(b"key 7", b"key x"), (torch.ones(1).numpy().tobytes(), b"\0\0\0\0")])
def test_altered_metadata_are_refused_like_altered_tensors(old: bytes, new: bytes, tmp_path: Path) -> None:
    save_tensors(TENSORS, tmp_path / "file", METADATA)
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content.replace(old, new, 1))
    with pytest.raises(BadInput, match="file: altered since it was written"):
        load_tensors(tmp_path / "file")


def test_metadata_of_older_versions_load_unless_their_meaning_counts(tmp_path: Path) -> None:
    save_tensors(TENSORS, tmp_path / "file", METADATA)
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content.replace(b'"metadata_sha256"', b'"metadata_older1"'))
    load_tensors(tmp_path / "file")
    with pytest.raises(BadInput, match="file: altered since it was written"):
        load_tensors(tmp_path / "file", bound=True)
