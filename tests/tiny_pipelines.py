"""Tiny random pipelines of every family, with tokenizers that know letters, and a folder of captioned images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    LDMTextToImagePipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from PIL import Image
from tiny import make_unet as make_unconditional
from tiny_conditional import SD, SDXL, make_unet
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CAPTIONS = ("a bar at the top", "a bar", "bars and bars", "nothing")


def clip_tokenizer(folder: Path) -> Any:
    """Every letter is a token."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def bert_tokenizer(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer.from_pretrained(folder, model_max_length=77)


def clip_text(width: int, cls: Any = CLIPTextModel, **changes: Any) -> Any:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        **changes,
    )
    return cls(config).eval()


def autoencoder(cls: Any = AutoencoderKL, levels: int = 2, **changes: Any) -> Any:
    """4 latent channels at 1 / 2 ** (levels - 1) of the size."""
    torch.manual_seed(2)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    changes = {"latent_channels": 4, **blocks, **changes}
    return cls(block_out_channels=(8,) * levels, norm_num_groups=4, **changes).eval()


def stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip_text(24),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        unet=make_unet(SD),
        scheduler=DDIMScheduler(num_train_timesteps=100),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(folder: Path) -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer(folder / "tokenizer")
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip_text(8),
        text_encoder_2=clip_text(16, CLIPTextModelWithProjection, projection_dim=32),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=make_unet(SDXL),
        scheduler=DDIMScheduler(num_train_timesteps=100),
    )


def latent_diffusion(folder: Path) -> LDMTextToImagePipeline:
    """Its call assumes an autoencoder of scale 8: images of 64 x 64."""
    torch.manual_seed(1)
    settings = {"encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2, "head_dim": 8, "d_model": 24}
    return LDMTextToImagePipeline(
        vqvae=autoencoder(VQModel, levels=4, num_vq_embeddings=16),
        bert=LDMBertModel(LDMBertConfig(vocab_size=57, **settings)).eval(),
        tokenizer=bert_tokenizer(folder / "tokenizer"),
        unet=make_unet(SD),
        scheduler=DDIMScheduler(num_train_timesteps=100),
    )


def unconditional(folder: Path) -> DDIMPipeline:
    return DDIMPipeline(unet=make_unconditional(in_channels=3, out_channels=3), scheduler=DDIMScheduler())


# The family, and the side of its images.
PIPELINES = {
    "stable diffusion": (stable_diffusion, 16),
    "stable diffusion xl": (stable_diffusion_xl, 16),
    "latent diffusion": (latent_diffusion, 64),
    "ddim": (unconditional, 16),
}


def captioned_folder(path: Path, side: int, texts: tuple[str, ...] = CAPTIONS) -> Path:
    """An RGB image for each text, and metadata.jsonl."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number, text in enumerate(texts):
        pixels = np.zeros((side, side, 3), np.uint8)
        pixels[rng.integers(side // 2) :, rng.integers(side // 2) :] = rng.integers(64, 255, 3)
        Image.fromarray(pixels).save(path / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (path / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return path
