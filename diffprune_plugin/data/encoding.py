"""Images and captions as a pipeline's UNet sees them: through its own autoencoder and text encoders."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.pictures import FRAME, coloured
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.plugins import denoiser_of, find_adapter

PIXELS = 8 * 256 * 256  # that go through the autoencoder at once
CAPTIONS = 8  # captions that go through a text encoder at once
WORDS = 77  # tokens a caption that LDMTextToImagePipeline takes
AESTHETIC_SCORE = 6.0  # what SDXL's refiner pipeline takes for its prompts
ENCODERS = ("vae", "vqvae", "bert", "text_encoder", "text_encoder_2", "text_encoder_3")
STATES = "encoder_hidden_states"
NULL = "null "  # before the inputs that stand for no prompt, in what an adapter says is encoded


@torch.no_grad()
def encode(pipeline: Any, source: Any, resolution: int | None = None, whole: bool = False) -> Samples:
    """Whatever `load_samples` takes, as inputs of the pipeline's UNet: latents (their mean) of images, embeddings of
    captions, and that of the empty prompt as null condition. What is neither stays as it is.

    Raises BadInput for images that the autoencoder does not take, or captions without a text encoder.
    """
    samples, (_, model) = load_samples(source, resolution, whole), denoiser_of(pipeline)
    shapes = find_adapter(model).shapes(model)
    needed = set(shapes) - set(samples.extra)
    images = samples.values.dtype is torch.uint8
    if images:
        of_sizes = {name: make(samples, shapes[name]) for name, make in OF_SIZES.items() if name in needed}
        samples = replace(samples, extra=samples.extra | of_sizes)
    with beside(pipeline, model):
        if images:
            samples = replace(samples, values=latents_of(pipeline, model, samples))
        if samples.captions and STATES in needed:
            embeddings, null = texts_encoded(pipeline, model, samples.captions)
            samples = replace(samples, extra=samples.extra | embeddings, null=samples.null | null)
    return samples


@contextlib.contextmanager
def beside(pipeline: Any, model: Any) -> Iterator[None]:
    """The encoders on the device of the model, afterwards where they were: no room for them while it is calibrated."""
    found = (getattr(pipeline, name, None) for name in ENCODERS)
    before = [(encoder, encoder.device) for encoder in found if encoder is not None]
    away = [(encoder, device) for encoder, device in before if device != model.device]
    for encoder, _ in away:
        encoder.to(model.device)
    try:
        yield
    finally:
        for encoder, device in away:
            encoder.to(device)


def latents_of(pipeline: Any, model: nn.Module, samples: Samples) -> Tensor:
    """uint8 images through the pipeline's autoencoder if it has one: the mean of their latents, in its units."""
    encoder = autoencoder(pipeline)
    samples = coloured(samples, image_channels(pipeline))
    if encoder is None:
        return samples.values
    channels, height, width = samples.shape
    scale = 2 ** (len(encoder.config.block_out_channels) - 1)
    adapter = find_adapter(model)
    sides = [side * scale for side in adapter.sample_shape(model)[1:]]
    if adapter.any_size:
        sides = [side // scale * scale for side in (height, width)]
    expected = (encoder.config.in_channels, *sides)
    if (channels, height, width) != expected:
        raise BadInput(
            f"data: images are {samples.shape} (channels, height, width), the pipeline takes {expected}: its UNet's "
            f"sample_size times {scale}; set 'resolution: {expected[1]}' or convert them"
        )
    upcast = encoder.dtype is torch.float16 and encoder.config.get("force_upcast")
    if upcast:
        encoder.to(torch.float32)  # as the pipelines do: in half precision it overflows
    parts = []
    try:
        for rows in torch.split(torch.arange(len(samples)), max(PIXELS // (height * width), 1)):
            encoded = encoder.encode(samples.sample(rows).to(encoder.device, encoder.dtype))
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
            parts.append(normalized(latents.float(), encoder.config).cpu().contiguous())
    finally:
        if upcast:
            encoder.to(torch.float16)
    return torch.cat(parts)


def autoencoder(pipeline: Any) -> Any:
    return getattr(pipeline, "vqvae", None) or getattr(pipeline, "vae", None)


def image_channels(pipeline: Any) -> int:
    """Of the images that a pipeline is trained with, and draws: 1 or 3, or whatever else its model has."""
    encoder, (_, model) = autoencoder(pipeline), denoiser_of(pipeline)
    return int(encoder.config.in_channels) if encoder is not None else min(find_adapter(model).channels(model))


def normalized(latents: Tensor, config: Any) -> Tensor:
    """Latents in the units of the UNet."""
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(config[key], device=latents.device) for key in ("latents_mean", "latents_std"))
        latents = (latents - mean.reshape(1, -1, 1, 1)) / std.reshape(1, -1, 1, 1)
    scaled: Tensor = (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor
    return scaled


def time_ids(samples: Samples, shape: tuple[int | str, ...]) -> Tensor:
    """SDXL's numbers for each image: size before and crop, then its size, or an aesthetic score for the refiner."""
    _, height, width = samples.shape
    frames = samples.extra.get(FRAME, torch.tensor([[height, width, 0, 0]]).expand(len(samples), -1)).float()
    last = [AESTHETIC_SCORE] if shape == ("batch", 5) else [height, width]
    return torch.cat([frames, torch.tensor([last]).float().expand(len(samples), -1)], dim=1)


def resolution_of(samples: Samples, _: tuple[int | str, ...]) -> Tensor:
    """PixArt alpha's height and width of each image."""
    return torch.tensor([samples.shape[1:]] * len(samples)).float()


def aspect_ratio_of(samples: Samples, _: tuple[int | str, ...]) -> Tensor:
    height, width = samples.shape[1:]
    return torch.full((len(samples), 1), height / width)


# What pipelines tell a model of the sizes of images, by its input.
OF_SIZES = {"time_ids": time_ids, "resolution": resolution_of, "aspect_ratio": aspect_ratio_of}


def texts_encoded(pipeline: Any, model: Any, captions: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The UNet's inputs for captions, a row each, and the one row of each for no caption.

    Raises BadInput for a pipeline without a text encoder that is known here.
    """
    if hasattr(pipeline, "encode_prompt"):
        call = prompt_encoded
    elif getattr(pipeline, "bert", None) is not None:
        call = bert_encoded
    else:
        raise BadInput(
            f"data: there are captions, and {type(pipeline).__name__} has no text encoder known here; give embeddings "
            "in a .safetensors"
        )
    try:
        rows = [call(pipeline, model, part) for part in batches(captions)]
        null = call(pipeline, model, None) if knows_none(call, model) else {}
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise BadInput(
            f"data: {type(pipeline).__name__} cannot encode the captions: {first_line(error)}; give embeddings in a "
            ".safetensors"
        ) from error
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}, null


def knows_none(call: Any, model: Any) -> bool:
    """Whether a pipeline says what stands for no prompt: of those distilled with guidance none does."""
    return call is bert_encoded or any(name.startswith(NULL) for name in find_adapter(model).encoded)


def batches(captions: Sequence[str]) -> Iterator[list[str]]:
    return (list(captions[first : first + CAPTIONS]) for first in range(0, len(captions), CAPTIONS))


def prompt_encoded(pipeline: Any, model: Any, texts: list[str] | None) -> dict[str, Tensor]:
    """By the pipeline's own encode_prompt; for None what it takes for no prompt (SDXL: zeros)."""
    options = {
        "prompt": texts or [""],
        "prompt_2": None,
        "prompt_3": None,
        "device": model.device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": texts is None,
    }
    taken = inspect.signature(pipeline.encode_prompt).parameters
    found = pipeline.encode_prompt(**{name: value for name, value in options.items() if name in taken})
    start = "" if texts else NULL
    named = zip(find_adapter(model).encoded, found, strict=False)
    return {
        name.removeprefix(NULL): (tensor.float() if tensor.is_floating_point() else tensor).cpu()
        for name, tensor in named
        if name and name.startswith(NULL) == bool(start)
    }


def bert_encoded(pipeline: Any, model: Any, texts: list[str] | None) -> dict[str, Tensor]:
    """As LDMTextToImagePipeline does it inside its call."""
    tokens = pipeline.tokenizer(
        texts or [""], padding="max_length", max_length=WORDS, truncation=True, return_tensors="pt"
    )
    return {STATES: pipeline.bert(tokens.input_ids.to(pipeline.bert.device))[0].float().cpu()}
