"""Images in a sequence, as the datasets library and torchvision give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffprune_plugin.data.columns import LABELS, described, label_of, text_of
from diffprune_plugin.data.pictures import Picture, damage_told, every, picture, stack
from diffprune_plugin.data.places import shown
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput, first_line

IMAGES = ("image", "img")


def from_sequence(rows: Sequence[Any], resolution: int | None = None, whole: bool = False) -> Samples:
    """Rows as the datasets library gives them: a PIL image or array, alone or under the key ``image``; beside it there
    may be a caption, ``text``, and a class, ``label``. A pair is an image and its class, as in torchvision."""
    kind = f"data: a {type(rows).__name__} is no folder, .npz, array or sequence of images"
    if isinstance(rows, Mapping):
        raise BadInput(f"{kind}; give what is under one of its keys, {sorted(map(str, rows))}")
    try:
        count = len(rows)
        rows[0] if count else None
    except (TypeError, KeyError):
        raise BadInput(kind) from None
    except Exception:
        pass  # an image that cannot be decoded: said below
    if not count:
        raise BadInput("data: the sequence of images is empty")
    step = 1 if whole else every(count, pictured(row_at(rows, 0), 0, resolution))
    taken = {number: row_at(rows, number) for number in range(0, count, step)}
    samples = stack([pictured(row, number, resolution) for number, row in taken.items()], resolution)
    texts, labels = [text_of(row) for row in taken.values()], [label_of(row) for row in taken.values()]
    if step == 1 or not isinstance(labels[0], str):
        return described(samples, texts, labels, names_of(rows))
    # a name's number is its place among all names
    return described(samples, texts, [label_of(row_at(rows, number)) for number in range(count)], step=step)


def row_at(rows: Sequence[Any], number: int) -> Mapping[str, Any]:
    """A row by column; raises BadInput for one that cannot be read or has no image."""
    try:
        row = rows[number]
    except Exception as error:  # of whatever decodes it
        reason = shown(first_line(error)) or type(error).__name__
        raise BadInput(f"data: row {number} cannot be read: {reason}; remove or mend it") from None
    if isinstance(row, tuple) and len(row) == 2:
        return {IMAGES[0]: row[0], LABELS[0]: row[1]}
    if not isinstance(row, Mapping):
        return {IMAGES[0]: row}
    key = next((key for key in IMAGES if key in row), None)
    if key is None:
        raise BadInput(f"data: row {number} has {sorted(map(str, row))}, none of {', '.join(IMAGES)}")
    return row


def pictured(row: Mapping[str, Any], number: int, resolution: int | None) -> Picture:
    name = f"row {number}"
    with damage_told(name):  # Pillow reads a file's pixels only now
        return picture(row[next(key for key in IMAGES if key in row)], name, resolution)


def names_of(rows: Any) -> Sequence[str]:
    """The names of the classes, by number, where a dataset's features say them."""
    features = getattr(rows, "features", None)
    if not isinstance(features, Mapping):
        return ()
    names = next((getattr(features[key], "names", None) for key in LABELS if key in features), None)
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
