"""Train a class-conditional DDPM of the pictures of making/emoji.py: RGB, 32x32, nine classes.

    python benchmarks/making/train_emoji.py          # make models: more than an hour on one core

Leaves benchmarks/models/emoji/model, a pipeline directory, and training.json beside it. Killed and started again it
goes on from its last checkpoint. A grid of samples is drawn every thousand steps.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import CONDITION_DROPOUT, Samples
from making.emoji import CLASSES, NULL, PACKAGE, PLACE, make
from making.training import Training, averaged, is_there, write_down

SCHEDULE: dict[str, Any] = {"num_train_timesteps": 1000}
MIN_SNR = 5.0  # Hang et al., arXiv 2303.09556: of a noise prediction the weight is min(snr, 5) / snr
GUIDANCE = 2.0


def make_unet() -> UNet2DModel:
    """3.8 M parameters; attention at 8x8 and 4x4, and a label for no class."""
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 96, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
        num_class_embeds=NULL + 1,
    )


@torch.no_grad()
def draw(
    model: nn.Module,
    labels: Tensor,
    seed: int = 0,
    steps: int = 25,
    guidance: float = GUIDANCE,
    null: int = NULL,
    channels: int = 3,
    schedule: dict[str, Any] = SCHEDULE,
) -> Tensor:
    """Images in [0, 1], (count, channels, 32, 32), of these classes by DDIM with classifier-free guidance."""
    scheduler = DDIMScheduler(**schedule)
    scheduler.set_timesteps(steps)
    noise = torch.randn(len(labels), channels, 32, 32, generator=torch.Generator().manual_seed(seed))
    parts = []
    for sample, label in zip(noise.split(32), labels.split(32), strict=True):
        both = torch.cat([label, torch.full_like(label, null)])
        for timestep in scheduler.timesteps:
            predicted = model(torch.cat([sample, sample]), timestep.expand(len(both)), class_labels=both).sample
            with_class, without = predicted.chunk(2)
            guided = without + guidance * (with_class - without)
            sample = scheduler.step(guided, timestep, sample).prev_sample
        parts.append(sample)
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def grid(images: Tensor, columns: int) -> Image.Image:
    """Rows of ``columns`` images (count, 1 or 3, height, width) in [0, 1], each pixel twice as large."""
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    pixels = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().byte().numpy()
    size = 2 * pixels.shape[1], 2 * pixels.shape[0]
    grey = pixels.shape[2] == 1
    return Image.fromarray(pixels[..., 0] if grey else pixels).resize(size, Image.Resampling.NEAREST)


class Loss:
    """The weighted error of the predicted noise; classes are drawn alike however many pictures they have."""

    def __init__(self, unet: nn.Module, samples: Samples, batch_size: int) -> None:
        self.unet, self.samples, self.batch_size = unet, samples, batch_size
        self.scheduler = DDPMScheduler(**SCHEDULE)
        kept = self.scheduler.alphas_cumprod
        self.weights = (kept / (1 - kept)).clamp(max=MIN_SNR) / (kept / (1 - kept))
        labels = samples.extra["class_labels"]
        self.chances = 1 / labels.bincount(minlength=len(CLASSES))[labels].double()

    def __call__(self, seed: int) -> Tensor:
        """Of the batch that this seed draws."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.multinomial(self.chances, self.batch_size, generator=generator)
        images, labels = self.samples.sample(rows), self.samples.extra["class_labels"][rows]
        timesteps = torch.randint(0, 1000, (len(rows),), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        dropped = torch.rand(len(rows), generator=generator) < CONDITION_DROPOUT
        labels = torch.where(dropped, NULL, labels)
        noisy = self.scheduler.add_noise(images, noise, timesteps).contiguous(memory_format=torch.channels_last)
        # Not in bfloat16: a CPU that only emulates it took nine times as long.
        predicted = self.unet(noisy, timesteps, class_labels=labels).sample
        return (self.weights[timesteps] * (predicted - noise).square().mean((1, 2, 3))).mean()


def average(run: Training) -> Any:
    """The model with the moving average of the weights."""
    return averaged(run, make_unet())


def rate(step: int) -> float:
    """The learning rate's factor: 1/2 after 200 steps, 1 after 1300; what falls at the end is the average's noise."""
    return min((step + 1) / 400, 0.5 if step < 1250 else (step - 1200) / 100, 1.0)


def main(
    work: Annotated[Path, typer.Option(help="where checkpoints go")] = PLACE / "training",
    output: Annotated[Path, typer.Option(help="where model/ and training.json go")] = PLACE,
    steps: int = 8000,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Train, write the moving average of the weights."""
    torch.set_num_threads(threads)
    asked, written = {"seed": seed, "steps": steps, "batch_size": batch_size, "lr": lr}, output / "training.json"
    if is_there(written, asked):
        return
    run = Training(make_unet, partial(LambdaLR, lr_lambda=rate), lr, seed, decay=0.999)
    run.unet.to(memory_format=torch.channels_last)
    loss = Loss(run.unet, load_samples(make()[0]), batch_size)

    def drawn(step: int) -> None:
        if step % 1000 == 0:
            labels = torch.arange(len(CLASSES)).repeat_interleave(8)
            grid(draw(average(run), labels), 8).save(work / f"{step}.png")

    trained = run.go_on(steps, loss, work / "checkpoint.safetensors", drawn)
    DDPMPipeline(average(run), DDPMScheduler(**SCHEDULE)).save_pretrained(output / "model")
    weights = output / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    write_down(written, asked, trained, weights, PACKAGE)


if __name__ == "__main__":
    typer.run(main)
