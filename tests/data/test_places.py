"""What a path may lead to instead of a file, and numbers in every dtype: taken, or one line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import _SIZE, save_file

from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.errors import BadInput


def refused(source: object) -> str:
    with pytest.raises(BadInput) as caught:
        load_samples(source)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "folder/a.png", "folder/metadata.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "device", "circle"])
def test_a_pipe_a_device_and_a_circle_of_links_are_not_opened(name, kind, tmp_path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    words = {"pipe": "is a pipe, not a file", "device": "is a device, not a file", "circle": "levels of symbolic links"}
    source = path.parent if path.parent != tmp_path else path
    assert words[kind] in refused(source)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a\0b", r"'a\x00b': embedded null byte"),
        ("a\nb", r"'a\nb': no such folder, .npz or .safetensors file"),
        ("\ud800", r"'\ud800': "),
        ("a" * 5000, "File name too long"),
        ("a" * 300 + ".npz", "File name too long"),
    ],
)
def test_a_path_that_cannot_be_is_one_line(path, words) -> None:
    assert words in refused(path)
    assert words in refused(Path(path))


def test_a_damaged_image_with_line_breaks_in_its_name_is_one_line(tmp_path) -> None:
    (tmp_path / "a\nb\x1b[31m.png").write_bytes(b"nothing")
    assert r"a\nb\x1b[31m.png': damaged image" in refused(tmp_path)


def test_folders_behind_links_count_once_and_never_in_circles(tmp_path) -> None:
    for place in ("elsewhere", "data/cat"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / place / "a.png")
    data = tmp_path / "data"
    (data / "dog").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (data / "again").symlink_to(data / "cat", target_is_directory=True)
    (data / "cat" / "up").symlink_to(data, target_is_directory=True)
    assert load_samples(data).extra["class_labels"].tolist() == [0, 1]


def test_hidden_files_and_folders_are_no_data(tmp_path) -> None:
    for place in ("cat/a.png", "dog/b.png", "cat/.thumbnails/a.png", ".ipynb_checkpoints/c.png", "__MACOSX/cat/d.png"):
        (tmp_path / "data" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / "data" / place)
    (tmp_path / "data/dog/._b.png").write_bytes(b"a Mac's own")
    assert load_samples(tmp_path / "data").extra["class_labels"].tolist() == [0, 1]
    hidden = (tmp_path / "data").rename(tmp_path / ".data")
    assert len(load_samples(hidden)) == 2, "the user named it"


def test_a_resolution_is_refused_of_latents_as_of_arrays(tmp_path) -> None:
    save_file({"latents": torch.zeros(2, 4, 8, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=r"resolution: 64 is for image files, not for a float tensor of \(8, 8\); leave"):
        load_samples(tmp_path / "a.safetensors", 64)
    assert len(load_samples(tmp_path / "a.safetensors", 8)) == 2


@pytest.mark.parametrize("dtype", [">i8", ">i2", "u2", ">u4", "u8", "i1"])
def test_whole_numbers_of_every_byte_order_and_width_are_inputs(dtype, tmp_path) -> None:
    labels = np.array([1, 0, 2]).astype(dtype)
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 4, 1), ">u1"), class_labels=labels)
    samples = load_samples(tmp_path / "a.npz")
    assert samples.extra["class_labels"].tolist() == [1, 0, 2]
    assert int(samples.extra["class_labels"].max()) == 2, "torch computes with it"


@pytest.mark.parametrize("dtype", [">f4", ">f8", "g", ">g", "f2"])
def test_real_numbers_of_every_byte_order_and_width_are_inputs(dtype, tmp_path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4, 1), "u1"), x=np.array([1.5, -2], dtype), null_x=np.zeros(()))
    samples = load_samples(tmp_path / "a.npz")
    assert samples.extra["x"].tolist() == [1.5, -2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents": torch.full((2, 4, 8, 8), float("nan"))}, "latents holds NaN or infinity"),
        ({"x": torch.tensor([1.0, float("inf")])}, "x holds NaN or infinity"),
        pytest.param(
            {"x": torch.zeros(2, dtype=torch.complex64)},
            "x is torch.complex64, not numbers",
            marks=pytest.mark.skipif(torch.complex64 not in _SIZE, reason="safetensors below 0.7 writes none"),
        ),
        ({"a\nb": torch.zeros(3)}, r"'a\nb' is (3,), not a row for each"),
        ({"latents": torch.zeros(2, 4, 0, 8)}, "not float (count, channels, h, w)"),
    ],
)
def test_tensors_that_hold_no_numbers_are_named(changes, words, tmp_path) -> None:
    save_file({"latents": torch.zeros(2, 4, 8, 8), **changes}, tmp_path / "a.safetensors")
    assert words in refused(tmp_path / "a.safetensors")
