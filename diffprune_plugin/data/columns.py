"""What may stand beside an image, in a row of metadata or of a dataset: its caption, its class."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import LONGEST, BadInput

TEXTS = ("text", "caption")  # the first of them that a row has
LABELS = ("label", "labels")
MOST = 2**31  # a class's number is below it
WHOLE = re.compile(r"\d+(\.0+)?")

Label = int | str | None


def text_of(row: Mapping[str, Any]) -> str | None:
    """The caption in a row, or None."""
    return next((row[key] for key in TEXTS if isinstance(row.get(key), str)), None)


def label_of(row: Mapping[str, Any]) -> Label:
    """The class in a row, its number or its name; None for none, and for what is neither (several, boxes)."""
    value = next((row[key] for key in LABELS if row.get(key) is not None), None)
    if isinstance(value, str):
        return value or None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except Exception:  # no whole number: its own error, whatever the value's class is
        return None


def described(
    samples: Samples, texts: Sequence[str | None], labels: Sequence[Label], names: Sequence[str] = (), step: int = 1
) -> Samples:
    """The samples with a caption and a class each, where there are such; ``names``: of the classes, by number.

    Every ``step``-th of the labels is of the samples. Raises BadInput where only some images have one.
    """
    for what, found in (("caption", texts), ("class", labels)):
        without = next((number for number, value in enumerate(found) if value is None), None)
        if without is not None and any(value is not None for value in found):
            raise BadInput(f"data: of {len(found)} images number {without + 1} has no {what}, others have; mend it")
    samples = replace(samples, captions=tuple(text for text in texts if text is not None))
    known = [label for label in labels if label is not None]
    if not known:
        return samples
    numbers, classes = class_labels(known, names)
    return replace(samples, extra=samples.extra | {"class_labels": numbers[::step]}, classes=classes)


def class_labels(labels: Sequence[int | str], names: Sequence[str] = ()) -> tuple[Tensor, int | None]:
    """The class of each image: its name as number if all names are numbers (``3``, and ``3.0`` of a column that once
    had a gap); else the place of the name among all of them, and of how many."""
    labels = [names[label] if isinstance(label, int) and 0 <= label < len(names) else label for label in labels]
    given = names or sorted({label for label in labels if isinstance(label, str)})
    if all(WHOLE.fullmatch(name) for name in given):
        return torch.tensor([class_number(label) for label in labels]), None
    places = {name: place for place, name in enumerate(given)}
    return torch.tensor([places.get(str(label), -1) for label in labels]), len(places)


def class_number(label: int | str) -> int:
    if isinstance(label, int) and abs(label) < MOST:
        return label
    if isinstance(label, str) and len(label) < len(str(MOST)):
        return int(label.partition(".")[0])
    raise BadInput(f"data: {str(label)[:LONGEST]!r} is no class number; mend it")
