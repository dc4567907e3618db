"""Which images a folder has, with their captions or classes: the metadata file of the datasets library's folders."""

from __future__ import annotations

import csv
import importlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffprune_plugin.data.columns import LABELS, TEXTS, Label, label_of, text_of
from diffprune_plugin.data.places import refusal, shown
from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.utils.reading import parse_json, regular_bytes

FILE = "file_name"  # the column that names an image, relative to the metadata
MOST_BYTES = 2**31
OLDEST_PYARROW = 15  # before it, what a parquet file says of its types could be unpickled

Found = Iterator[tuple[str, Any]]


class Row(NamedTuple):
    """An image's file, its caption and its class, of which one may be None."""

    file: Path
    text: str | None
    label: Label


def read_metadata(folder: Path) -> list[Row]:
    """The rows of metadata.jsonl, metadata.csv or metadata.parquet; none where there is no such file.

    Raises BadInput for several of them, and for one that is damaged or has a row without image, or with nothing to it.
    """
    present = [file for file in (folder / f"metadata{suffix}" for suffix in READERS) if os.path.lexists(file)]
    if not present:
        return []
    if len(present) > 1:
        raise BadInput(f"data: {shown(folder)}: has {' and '.join(file.name for file in present)}; keep one")
    file = present[0]
    try:
        data = regular_bytes(file, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise refusal(file, error) from None
    found = READERS[file.suffix](data, f"data: {shown(file)}")
    rows = [row_of(values, f"data: {shown(file)}: {place}", folder) for place, values in found]
    if not rows:
        raise BadInput(f"data: {shown(file)}: no line in it; add one for each image, or remove the file")
    return rows


def row_of(values: Any, where: str, folder: Path) -> Row:
    """Raises BadInput unless a row names an image, and has a caption or a class for it."""
    if isinstance(values, Mapping) and isinstance(values.get(FILE), str):
        row = Row(folder / values[FILE], text_of(values), label_of(values))
        if row.text is not None or row.label is not None:
            return row
    have = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
    others = ", ".join(map(repr, (*TEXTS[1:], *LABELS[:1])))
    raise BadInput(f"{where} has {have}, not a {FILE!r} and a {TEXTS[0]!r} (or {others})")


def decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: not UTF-8: {first_line(error)}; convert it") from None


def json_rows(data: bytes, where: str) -> Found:
    for number, line in enumerate(decoded(data, where).split("\n"), 1):  # splitlines() would cut at U+2028 too
        if line.strip():
            yield f"line {number}", parse_json(line, f"{where}: line {number}")


def csv_rows(data: bytes, where: str) -> Found:
    reader = csv.DictReader(io.StringIO(decoded(data, where), newline=""), strict=True)
    rows: Iterable[dict[str | Any, Any]] = reader
    try:
        for row in rows:
            place = f"line {reader.line_num}"
            if None in row or None in row.values():
                raise BadInput(f"{where}: {place} has not {len(reader.fieldnames or ())} values, as the first line has")
            yield place, row
    except csv.Error as error:
        raise BadInput(f"{where}: no CSV after line {reader.line_num}: {first_line(error)}") from None


def parquet_rows(data: bytes, where: str) -> Found:
    try:
        version = importlib.import_module("pyarrow").__version__
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        version = "0"
    if int(version.partition(".")[0]) < OLDEST_PYARROW:
        raise BadInput(
            f"{where}: needs pyarrow {OLDEST_PYARROW} or later; run: pip install 'pyarrow>={OLDEST_PYARROW}', or write "
            "metadata.jsonl"
        )
    try:
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    except Exception as error:  # whatever its damage leads to
        raise BadInput(f"{where}: not a readable parquet file: {shown(first_line(error))}") from None
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


READERS: dict[str, Callable[[bytes, str], Found]] = {".jsonl": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}
