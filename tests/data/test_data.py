"""Images from where people have them, and what is wrong with them."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffprune_plugin.data import arrays
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput


@pytest.fixture
def folder(tmp_path, images):
    for i, image in enumerate(images[:3]):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png")
    return tmp_path


def test_a_folder_an_npz_an_array_and_a_sequence_give_the_same_samples(folder, images, tmp_path) -> None:
    np.savez(tmp_path / "images.npz", images=images[:3])
    rows = [{"image": Image.fromarray(image[..., 0]), "id": 1} for image in images[:3]]
    sources = [folder, str(tmp_path / "images.npz"), images[:3], rows, load_samples(folder)]
    hashes = {load_samples(source).sha256 for source in sources}
    assert len(hashes) == 1
    assert load_samples(folder).shape == (1, 16, 16)


def test_an_array_of_another_length_is_named_as_it_is_left_out(images, tmp_path, capsys) -> None:
    np.savez(tmp_path / "images.npz", images=images[:3], class_labels=np.arange(5), kept=np.arange(3))
    assert set(load_samples(tmp_path / "images.npz").extra) == {"kept"}
    assert "class_labels is (5,), not a row for each of 3 images, and is left out" in capsys.readouterr().err


def test_pixels_become_minus_one_to_one_and_floats_stay() -> None:
    images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
    assert load_samples(images).sample(torch.tensor([0, 1])).flatten().tolist() == [-1.0, 1.0]
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(load_samples(latents).sample(torch.tensor([1])), latents[1:])


def test_colour_and_palette_images_are_rgb(tmp_path) -> None:
    Image.new("P", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert load_samples(tmp_path).shape == (3, 4, 4)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    image = Image.fromarray(np.full((4, 4), 30000, np.uint16))
    assert load_samples([image]).values.unique().tolist() == [116]


def test_of_very_many_images_every_nth_is_taken_and_said_or_all_for_training(
    monkeypatch, images, tmp_path, capsys
) -> None:
    monkeypatch.setattr("diffprune_plugin.data.samples.LIMIT", 5)
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{number}.png")
    for source in (list(images), tmp_path):
        assert len(load_samples(source)) == 4
        assert "4 of 16 images" in capsys.readouterr().err
        assert len(load_samples(source, whole=True)) == 16
        assert not capsys.readouterr().err


def broken_image(path) -> None:
    file = path / "1.png"
    file.write_bytes(file.read_bytes()[:60])


def other_size(path) -> None:
    Image.new("L", (8, 8)).save(path / "1.png")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (broken_image, r"1\.png: damaged image"),
        (other_size, r"1\.png is \(8, 8, 1\) but .*0\.png is \(16, 16, 1\)"),
        (lambda path: [file.unlink() for file in path.iterdir()], "no image in this folder"),
    ],
)
def test_a_spoilt_folder_is_named(folder, spoil, words) -> None:
    spoil(folder)
    with pytest.raises(BadInput, match=words):
        load_samples(folder)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "no such folder"),
        (np.zeros((2, 4, 4), np.uint8), "not uint8"),
        (np.zeros((2, 4, 4, 1)), "float64"),
        (np.zeros((0, 4, 4, 1), np.uint8), "not uint8"),
        ([], "empty"),
        (3, "a int is no folder"),
        ({"a": 1}, "a dict is no folder"),
        (torch.zeros(3, 4, 4), "not float"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "torch.uint8"),
        ([{"text": "a"}], r"row 0 has \['text'\]"),
        ([np.zeros((4, 4))], "float64"),
    ],
)
def test_a_source_that_holds_no_images_is_named(source, words) -> None:
    with pytest.raises(BadInput, match=words):
        load_samples(source)


def test_a_damaged_npz_and_one_without_images_are_named(tmp_path) -> None:
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    with pytest.raises(BadInput, match="not a readable"):
        load_samples(tmp_path / "broken.npz")
    with pytest.raises(BadInput, match=r"has \['pictures'\], not an array 'images'"):
        load_samples(tmp_path / "other.npz")


def npz_of(path: Path, header: bytes, size: int = 1 << 20) -> Path:
    """An .npz whose array has this header and so many zeros."""
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open("images.npy", "w", force_zip64=True) as file:
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    return path


def declared(count: int) -> bytes:
    return f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, 1024, 1024, 1)}}\n".encode()


def png_of(path: Path, side: int) -> Path:
    """A PNG whose header tells of a square, without its pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = [(13, header), (0, b"IDAT")]
    parts = [struct.pack(">I", size) + chunk + struct.pack(">I", zlib.crc32(chunk)) for size, chunk in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def jpeg_of(path: Path, side: int) -> Path:
    path.write_bytes(b"\xff\xd8\xff\xc0" + struct.pack(">HBHHBBBB", 11, 8, side, side, 1, 1, 17, 0) + bytes(99))
    return path


def safetensors_of(path: Path, count: int) -> Path:
    entry = {"latents": {"dtype": "F32", "shape": [count, 4, 8, 8], "data_offsets": [0, count * 1024]}}
    text = json.dumps(entry).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(1024))
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda folder: npz_of(folder / "a.npz", declared(10**15)),
            "images.npy holds .* not what its header says",
        ),
        (lambda folder: npz_of(folder / "a.npz", declared(-1)), "images.npy holds .* not what its header says"),
        (lambda folder: safetensors_of(folder / "a.safetensors", 10**15), "not a readable .safetensors file"),
        (lambda folder: png_of(folder / "a.png", 50_000).parent, "a.png: damaged image: .*exceeds limit"),
        (lambda folder: jpeg_of(folder / "a.jpg", 65_500).parent, "a.jpg: damaged image: .*(exceeds limit|cannot id)"),
    ],
)
def test_what_says_that_it_is_huge_is_refused_before_any_of_it_is_unpacked(make, words, tmp_path) -> None:
    source = make(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match=words):
            load_samples(source)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_a_zip_that_memory_does_not_hold_or_that_blows_itself_up_is_refused(tmp_path, monkeypatch) -> None:
    bomb = npz_of(tmp_path / "a.npz", declared(8), 8 << 20)
    assert len(load_samples(bomb)) == 8, "small enough to be harmless"
    for name, limit in (("free_memory", lambda device: 2**20), ("HARMLESS", 2**20)):
        with monkeypatch.context() as patch:
            patch.setattr(arrays, name, limit)
            with pytest.raises(BadInput, match=r"unpack to 8,388,.*, which is more than"):
                load_samples(bomb)


def test_further_arrays_of_the_npz_are_inputs_by_name(tmp_path, images) -> None:
    np.savez(tmp_path / "a.npz", images=images, class_labels=np.arange(16), note=np.zeros(2), name=np.array("x"))
    samples = load_samples(tmp_path / "a.npz")
    assert isinstance(samples, Samples)
    assert samples.extra.keys() == {"class_labels"}
