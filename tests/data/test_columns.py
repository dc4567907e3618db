"""Captions and classes, wherever a folder's metadata or a dataset's rows have them."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.errors import BadInput

PIXELS = [np.full((4, 4), 50 * i, np.uint8) for i in range(5)]
ROWS = [{"file_name": f"{i}.png", "text": f'a "{i}",\nb', "label": 4 - i} for i in range(5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def write_jsonl(folder: Path, rows: list[dict[str, Any]]) -> None:
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text(f"\ufeff{text}\n", encoding="utf-8")


def write_csv(folder: Path, rows: list[dict[str, Any]]) -> None:
    with open(folder / "metadata.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metadata.parquet")


class Dataset(list):
    """Rows as a Dataset of the datasets library has them, with the names of the classes."""

    def __init__(self, rows: list[Any], names: list[str] | None) -> None:
        super().__init__(rows)
        self.features = {"label": SimpleNamespace(names=names)} if names else {}


def dataset(labels: list[Any], names: list[str] | None = None) -> Dataset:
    return Dataset([{"image": pixels, "label": label} for pixels, label in zip(PIXELS, labels, strict=False)], names)


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_each_kind_of_metadata_gives_the_captions_and_classes_of_its_images(write, folder) -> None:
    write(folder, ROWS[::-1])
    samples = load_samples(folder)
    assert samples.captions == tuple(row["text"] for row in ROWS[::-1])
    assert samples.extra["class_labels"].tolist() == [0, 1, 2, 3, 4]
    assert samples.values[:, 0, 0, 0].tolist() == [200, 150, 100, 50, 0]


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
def test_a_caption_may_be_named_so_and_classes_may_stand_alone_by_name(write, folder) -> None:
    write(folder, [{"file_name": row["file_name"], "caption": row["text"]} for row in ROWS])
    assert load_samples(folder).captions[1] == ROWS[1]["text"]
    names = ["cat", "dog", "cat", "eel", "dog"]
    write(folder, [{"file_name": f"{i}.png", "label": name} for i, name in enumerate(names)])
    samples = load_samples(folder)
    assert (samples.captions, samples.classes) == ((), 3)
    assert samples.extra["class_labels"].tolist() == [0, 1, 0, 2, 1]


def test_parquet_without_its_reader_is_one_line(folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match=r"metadata\.parquet: needs pyarrow 15 or later; run: pip install"):
        load_samples(folder)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.csv", "file_name,text\n0.png\n", r"line 2 has not 2 values"),
        ("metadata.csv", 'file_name,text\n0.png,"a\n', r"no CSV after line 1: unexpected end of data"),
        (
            "metadata.csv",
            "image,text\n0.png,a\n",
            r"line 2 has \['image', 'text'\], not a 'file_name' and a 'text' \(or",
        ),
        ("metadata.csv", "file_name,text\n", "no line in it"),
        ("metadata.jsonl", '{"a": ' * 100000, "line 1: not valid json: nested too deeply"),
        ("metadata.jsonl", '{"file_name": "a\\u0000b.png", "text": ""}', r"'.*a\\x00b\.png': embedded null byte"),
        ("metadata.jsonl", '{"file_name": "a\\nb.png", "text": ""}', r"'.*a\\nb\.png': no such image; mend metadata"),
        ("metadata.jsonl", f'{{"file_name": "0.png", "label": {10**30}}}', f"'{10**30}' is no class number"),
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "text": "a", "label": 1}\n{"file_name": "1.png", "text": "a"}',
            "of 2 images number 2 has no class, others have",
        ),
    ],
)
def test_metadata_that_cannot_be_used_is_one_line(name, text, words, folder) -> None:
    (folder / name).write_text(text)
    with pytest.raises(BadInput, match=words) as caught:
        load_samples(folder)
    assert str(caught.value).isprintable()


def test_of_two_metadata_files_one_has_to_go(folder) -> None:
    write_jsonl(folder, ROWS)
    write_csv(folder, ROWS)
    with pytest.raises(BadInput, match=r"has metadata\.jsonl and metadata\.csv; keep one"):
        load_samples(folder)


@pytest.mark.parametrize(
    ("labels", "names", "numbers", "classes"),
    [
        ([3, 1, np.int64(2), 0, 1], None, [3, 1, 2, 0, 1], None),
        ([1, 0, 2, 0, 1], ["cat", "dog", "eel", "fox"], [1, 0, 2, 0, 1], 4),
        ([1, 0, 2, 0, 1], ["0", "10", "2"], [10, 0, 2, 0, 10], None),
        (["b", "a", "c", "a", "b"], None, [1, 0, 2, 0, 1], 3),
        ([-1] * 5, ["0", "10", "2"], [-1] * 5, None),
        (["10.0", "2.0", "0.0", "2.0", "10.0"], None, [10, 2, 0, 2, 10], None),
        (["1.0", "1.5", "1.0", "1.5", "1.0"], None, [0, 1, 0, 1, 0], 2),
    ],
)
def test_the_label_of_a_datasets_row_is_its_class_as_its_folder_would_be(labels, names, numbers, classes) -> None:
    """The names of a dataset's classes are those of the folders that it was read from."""
    samples = load_samples(dataset(labels, names))
    assert (samples.extra["class_labels"].tolist(), samples.classes) == (numbers, classes)


@pytest.mark.parametrize("labels", [[1, 0, 2, 0, 1], ["b", "a", "c", "a", "b"]])
def test_of_every_nth_image_the_class_is_the_one_it_has_among_all(labels, monkeypatch, folder) -> None:
    monkeypatch.setattr("diffprune_plugin.data.samples.LIMIT", 3)
    assert load_samples(dataset(labels)).extra["class_labels"].tolist() == [1, 2, 1]
    write_jsonl(folder, [row | {"label": label} for row, label in zip(ROWS, labels, strict=True)])
    samples = load_samples(folder)
    assert samples.extra["class_labels"].tolist() == [1, 2, 1]
    assert samples.captions == tuple(row["text"] for row in ROWS[::2])


def test_pairs_are_images_and_classes_as_torchvision_gives_them() -> None:
    rows = [(Image.fromarray(pixels), i) for i, pixels in enumerate(PIXELS)]
    assert load_samples(rows).extra["class_labels"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("labels", [[[1, 2], [3]], [0.5, 1.5], [{"box": 1}, {"box": 2}], [None, None]])
def test_labels_that_are_no_classes_are_left_out(labels) -> None:
    assert load_samples(dataset(labels)).extra == {}


def test_a_row_that_cannot_be_decoded_and_one_without_class_are_named() -> None:
    class Broken(list):
        def __getitem__(self, number: Any) -> Any:
            if number == 1:
                raise OSError("cannot\nidentify image")
            return super().__getitem__(number)

    with pytest.raises(BadInput, match="row 1 cannot be read: cannot identify image"):
        load_samples(Broken(PIXELS))
    with pytest.raises(BadInput, match="of 2 images number 1 has no class"):
        load_samples(dataset([None, 1]))


def test_a_dataset_of_several_splits_is_told_to_give_one() -> None:
    with pytest.raises(BadInput, match=r"give what is under one of its keys, \['test', 'train'\]"):
        load_samples({"train": PIXELS, "test": PIXELS})
