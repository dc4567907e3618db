"""The models that the benchmarks prune: where each is, what it is calibrated, trained and judged with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from making import train_captions, train_transformer
from making.emoji import CLASSES, MODELS, PLACE
from making.train_demo import digits
from making.train_emoji import draw
from torch import Tensor

from diffprune_plugin import demo
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.evaluation.sampling import sample_images
from diffprune_plugin.evaluation.settings import SamplingSettings
from diffprune_plugin.utils.files import new_file
from shared.results import RUNS

MAKING = Path(__file__).parents[1] / "making"


@dataclass(frozen=True)
class Look:
    """How a model is measured: held-out images of the loss and noises for each; images drawn, their DDIM steps, and
    from how many seeds as many are drawn: a Frechet distance of a hundred images varies by a tenth with them."""

    held_out: int = 500
    repeats: int = 4
    count: int = 192
    steps: int = 50
    noises: int = 1


@dataclass(frozen=True)
class Subject:
    """A pipeline directory; ``facts``: what its training wrote down; ``calibration``, ``held_out``: files of images.

    ``train``: the file to fine-tune on, made if it is not there; ``features``: the net of the Frechet distance, and
    ``real``: the images that it compares with; ``images``: those that a pipeline draws from the noise of a seed, float
    (count, channels, height, width) in [0, 1]; ``classes``: how many they are asked of in turn, which the features' net
    knows, or 0.
    """

    name: str
    model: Path
    facts: Path
    calibration: Path
    held_out: Path
    train: Callable[[], Path]
    features: Path
    real: Callable[[], Tensor]
    images: Callable[[Any, Look, int], Tensor]
    classes: int = 0

    def __str__(self) -> str:  # of a result: results of another model are never mixed in
        return f"{self.name} {self.training['sha256']}"

    __repr__ = __str__

    @property
    def training(self) -> dict[str, Any]:
        if not self.facts.exists():
            sys.exit(f"{self.facts} is not there; run: make models")
        found: dict[str, Any] = json.loads(self.facts.read_text())
        return found

    @property
    def steps(self) -> int:
        """Of the dense model's training."""
        return int(self.training["steps"])

    @property
    def work(self) -> Path:
        """Where what is made of it is kept."""
        return RUNS / str(self.training["sha256"])[:12]


def digit_images(pipeline: Any, look: Look, noise: int) -> Tensor:
    settings = SamplingSettings(count=look.count, seed=noise, steps=look.steps, batch_size=32)
    images = sample_images(pipeline, settings, progress=False)
    return torch.stack([torch.from_numpy(np.array(image.convert("L"))) for image in images])[:, None] / 255.0


def emoji_images(pipeline: Any, look: Look, noise: int) -> Tensor:
    """Of each class as many."""
    return draw(pipeline.unet, torch.arange(look.count) % len(CLASSES), noise, look.steps)


def captioned_images(pipeline: Any, look: Look, noise: int) -> Tensor:
    """Of captions that were not trained on, of each class as many."""
    return train_captions.draw(pipeline, train_captions.captions_held_out(look.count), look.steps, noise)


def labelled_digits(name: str, pipeline: Any, look: Look, noise: int) -> Tensor:
    """Of each digit as many."""
    labels = torch.arange(look.count) % train_transformer.NULL
    return train_transformer.KINDS[name].draw(pipeline.transformer, labels, look.steps, noise)


@cache
def samples_of(file: Path) -> Samples:
    return load_samples(file)


def real_digits() -> Tensor:
    """uint8 (500, 1, 32, 32), held out."""
    return samples_of(demo.HELD_OUT_IMAGES).values.permute(0, 3, 1, 2)


def real_emoji() -> Tensor:
    """uint8 (count, 3, 32, 32): of each class as many of the pictures that were trained on as the smallest has."""
    samples = samples_of(PLACE / "train.npz")
    labels = samples.extra["class_labels"]
    count = int(labels.bincount().min())
    rows = torch.cat([(labels == label).nonzero().flatten()[:count] for label in range(len(CLASSES))])
    return samples.values[rows].permute(0, 3, 1, 2)


def training_digits() -> Path:
    """The digits that the dense model was trained on, as an .npz."""
    file = DIGITS.work / "digits.npz"
    if not file.exists():
        with new_file(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, images=digits()[0])
    return file


def training_emoji() -> Path:
    return PLACE / "train.npz"


def training_captions() -> Path:
    return train_captions.PLACE / "train.safetensors"


def training_labelled_digits(name: str) -> Path:
    return train_transformer.data(name)[0]


DIGITS = Subject(
    "digits",
    demo.MODEL,
    demo.HERE / "training.json",
    demo.CALIBRATION_IMAGES,
    demo.HELD_OUT_IMAGES,
    training_digits,
    MAKING / "digits_classifier.onnx",
    real_digits,
    digit_images,
)
EMOJI = Subject(
    "emoji",
    PLACE / "model",
    PLACE / "training.json",
    PLACE / "train.npz",
    PLACE / "held_out.npz",
    training_emoji,
    PLACE / "emoji_classifier.onnx",
    real_emoji,
    emoji_images,
    len(CLASSES),
)
CAPTIONS = Subject(
    "captions",
    train_captions.PLACE / "model",
    train_captions.PLACE / "training.json",
    train_captions.PLACE / "train.safetensors",
    train_captions.PLACE / "held_out.safetensors",
    training_captions,
    PLACE / "emoji_classifier.onnx",
    real_emoji,
    captioned_images,
    len(CLASSES),
)
SUBJECTS = {subject.name: subject for subject in (DIGITS, EMOJI, CAPTIONS)}


def transformer(name: str) -> Subject:
    """One of making/train_transformer.py."""
    place = MODELS / name
    return Subject(
        name,
        place / "model",
        place / "training.json",
        place / "train.safetensors",
        place / "held_out.safetensors",
        partial(training_labelled_digits, name),
        MAKING / "digits_classifier.onnx",
        real_digits,
        partial(labelled_digits, name),
        train_transformer.NULL,
    )


TRANSFORMERS = {name: transformer(name) for name in train_transformer.KINDS}
