"""Train a small Stable Diffusion of the captioned pictures of making/captions.py: its autoencoder (64x64 to latents of
16x16), a tokenizer and a text encoder of its own, and a UNet with cross attention.

    python benchmarks/making/train_captions.py        # make models: an hour and a half on one core

Leaves benchmarks/models/captions/model, a StableDiffusionPipeline, training.json beside it, and the latents and encoded
captions as train.safetensors and held_out.safetensors. Killed and started again it goes on from its last checkpoint.
Grids of pictures that were decoded or drawn are kept beside the checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Generator, Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffprune_plugin.data.encoding import encode
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import CONDITION_DROPOUT, Samples
from diffprune_plugin.utils.files import new_file
from making.captions import PLACE, make
from making.emoji import CLASSES, PACKAGE
from making.train_emoji import MIN_SNR, grid
from making.training import Training, averaged, is_there, write_down

WORDS, WIDTH, VOCABULARY = 16, 128, 2048  # tokens of a caption, features of each, kinds of tokens
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
GUIDANCE = 2.0
ASKED = ("grinning face", "waving hand, dark skin", "woman, medium skin", "cat face", "green apple", "house", "key", "")
KINDS = ("faces", "hands", "people", "animals", "food", "places", "objects", "")
SHOWN = [f"{kind}: {name}" if name else "" for kind, name in zip(KINDS, ASKED, strict=True)]


def make_vae() -> AutoencoderKL:
    """0.7 M parameters: 64x64x3 to 16x16x4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
    )


def make_unet() -> UNet2DConditionModel:
    """7.1 M parameters; attention to itself and to the caption at 8x8 and 4x4."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 160),
        layers_per_block=1,
        attention_head_dim=(2, 3, 5),  # the number of heads: its name here
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
    )


def make_text_encoder() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=WORDS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def make_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Byte pairs of these captions, in the files of CLIP's tokenizer."""
    pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    pairs.normalizer = normalizers.Lowercase()
    pairs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[BEGIN, END],
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    pairs.model.save(str(folder))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=WORDS)


class Denoiser(nn.Module):
    """UNet and text encoder, which learn together."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text_encoder = make_unet(), make_text_encoder()


class Pixels:
    """Of a batch of pictures: what the autoencoder loses, and a little for latents that are far from normal."""

    def __init__(self, vae: nn.Module, pictures: Samples, batch_size: int) -> None:
        self.vae, self.pictures, self.batch_size = vae, pictures, batch_size

    def __call__(self, seed: int) -> Tensor:
        generator = Generator().manual_seed(seed)
        images = self.pictures.sample(torch.randint(0, len(self.pictures), (self.batch_size,), generator=generator))
        found = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(found.sample(generator)).sample
        return functional.l1_loss(decoded, images) + functional.mse_loss(decoded, images) + 1e-5 * found.kl().mean()


class Noise:
    """The weighted error of the predicted noise (min-SNR, arXiv 2303.09556); classes are drawn alike."""

    def __init__(self, model: Denoiser, latents: Tensor, tokens: Tensor, chances: Tensor, batch_size: int) -> None:
        self.model, self.latents, self.tokens, self.chances = model, latents, tokens, chances
        self.scheduler, self.batch_size = DDIMScheduler(), batch_size
        kept = self.scheduler.alphas_cumprod
        self.weights = (kept / (1 - kept)).clamp(max=MIN_SNR) / (kept / (1 - kept))

    def __call__(self, seed: int) -> Tensor:
        """Of the batch that this seed draws; the last row of the tokens is the empty caption's."""
        generator = Generator().manual_seed(seed)
        rows = torch.multinomial(self.chances, self.batch_size, generator=generator)
        timesteps = torch.randint(0, 1000, (len(rows),), generator=generator)
        noise = torch.randn(self.latents[rows].shape, generator=generator)
        dropped = torch.rand(len(rows), generator=generator) < CONDITION_DROPOUT
        words = self.model.text_encoder(self.tokens[torch.where(dropped, len(self.tokens) - 1, rows)])[0]
        noisy = self.scheduler.add_noise(self.latents[rows], noise, timesteps)
        predicted = self.model.unet(noisy, timesteps, words).sample
        return (self.weights[timesteps] * (predicted - noise).square().mean((1, 2, 3))).mean()


def pipeline_of(vae: Any, denoiser: Any, tokenizer: Any) -> StableDiffusionPipeline:
    made = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipeline: Any, captions: list[str], steps: int = 25, seed: int = 0) -> Tensor:
    """Images in [0, 1], (count, 3, 64, 64), of these captions, a batch of 32 at a time."""
    noise = torch.randn(len(captions), 4, 16, 16, generator=Generator().manual_seed(seed))
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "pt"}
    options |= {"height": 64, "width": 64}
    parts = [
        pipeline(captions[start : start + 32], latents=noise[start : start + 32], **options).images
        for start in range(0, len(captions), 32)
    ]
    return torch.cat(parts)


@cache
def captions_held_out(count: int) -> list[str]:
    """Of each class as many, in turn, none trained on."""
    captions = load_samples(make()[1]).captions
    by_class = [[text for text in captions if text.startswith(f"{name}:")] for name in CLASSES]
    return [by_class[i % len(CLASSES)][i // len(CLASSES) % len(by_class[i % len(CLASSES)])] for i in range(count)]


def autoencoder(pictures: Samples, steps: int, batch_size: int, lr: float, seed: int, work: Path) -> AutoencoderKL:
    """Trained, its latents of variance 1 by the scaling factor."""
    cosine = partial(get_cosine_schedule_with_warmup, num_warmup_steps=100, num_training_steps=steps)
    run = Training(make_vae, cosine, lr, seed, decay=0.99)

    @torch.no_grad()
    def decoded(step: int) -> None:
        if step % 500 == 0:
            images = pictures.sample(torch.arange(0, len(pictures), len(pictures) // 15))
            found = averaged(run, make_vae())(images).sample
            grid((torch.cat([images, found]) / 2 + 0.5).clamp(0, 1), len(images)).save(work / f"decoded-{step}.png")

    run.go_on(steps, Pixels(run.unet, pictures, batch_size), work / "autoencoder.safetensors", decoded)
    vae = averaged(run, make_vae())
    vae.register_to_config(scaling_factor=float(1 / latents_of(vae, pictures).std()))
    return vae


@torch.no_grad()
def latents_of(vae: Any, pictures: Samples) -> Tensor:
    """The means, not scaled."""
    rows = torch.arange(len(pictures)).split(64)
    return torch.cat([vae.encode(pictures.sample(part)).latent_dist.mean for part in rows])


def tokens_of(tokenizer: Any, captions: Iterable[str]) -> Tensor:
    options = {"padding": "max_length", "max_length": WORDS, "truncation": True, "return_tensors": "pt"}
    found: Tensor = tokenizer(list(captions), **options).input_ids
    return found


def encoded(pipeline: Any, folder: Path, file: Path) -> None:
    """A folder of captioned images as the UNet sees it."""
    samples = encode(pipeline, folder)
    null = {f"null_{key}": row for key, row in samples.null.items()}
    tensors = {"latents": samples.values, **samples.extra, **null}
    with new_file(file) as temporary:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)


def main(
    output: Annotated[Path, typer.Option(help="where model/ and training.json go")] = PLACE,
    steps: int = 5000,
    autoencoder_steps: int = 1500,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Train the autoencoder, then text encoder and UNet on its latents; write the moving averages of the weights."""
    torch.set_num_threads(threads)
    asked: dict[str, Any] = {"seed": seed, "steps": steps, "autoencoder_steps": autoencoder_steps}
    asked |= {"batch_size": batch_size, "lr": lr}
    written, work = output / "training.json", output / "training"
    if is_there(written, asked):
        return
    folders = make()
    pictures = load_samples(folders[0])
    vae = autoencoder(pictures, autoencoder_steps, batch_size // 2, 2e-3, seed, work)
    tokenizer = make_tokenizer(pictures.captions, work / "tokenizer")
    labels = torch.tensor([CLASSES.index(text.partition(":")[0]) for text in pictures.captions])
    cosine = partial(get_cosine_schedule_with_warmup, num_warmup_steps=200, num_training_steps=steps)
    run = Training(Denoiser, cosine, lr, seed, decay=0.999)
    latents, tokens = (
        latents_of(vae, pictures) * vae.config.scaling_factor,
        tokens_of(tokenizer, [*pictures.captions, ""]),
    )
    loss = Noise(run.unet, latents, tokens, (1 / labels.bincount()[labels]).double(), batch_size)

    def drawn(step: int) -> None:
        if step % 1000 == 0:
            made = pipeline_of(vae, averaged(run, Denoiser()), tokenizer)
            grid(draw(made, [text for text in SHOWN for _ in range(8)]), 8).save(work / f"{step}.png")

    trained = run.go_on(steps, loss, work / "checkpoint.safetensors", drawn)
    made = pipeline_of(vae, averaged(run, Denoiser()), tokenizer)
    made.save_pretrained(output / "model")
    for folder in folders:
        encoded(made, folder, folder.with_suffix(".safetensors"))
    weights = output / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    write_down(written, asked, trained, weights, PACKAGE)


if __name__ == "__main__":
    typer.run(main)
