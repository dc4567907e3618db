"""Images of every mode and rotation become what training scripts make of them, and standard error says it once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image, ImageOps
from tiny import make_unet
from tiny_pipelines import PIPELINES

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.errors import BadInput

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
SCHEDULER = DDPMScheduler()


def saved(path: Path, mode: str) -> Path:
    image = Image.fromarray(PIXELS, "RGBA")
    (image if mode == "RGBA" else image.convert("RGB").convert(mode)).save(path / f"{mode}.png")
    return path / f"{mode}.png"


def taken(source: Any, channels: int) -> torch.Tensor:
    """What a model of so many channels is given, as uint8 (count, height, width, channels)."""
    samples = fitting(load_samples(source), make_unet(in_channels=channels, out_channels=channels), UNET_2D, SCHEDULER)
    assert samples.shape == (channels, 16, 16)
    return samples.values


@pytest.mark.parametrize("mode", ["RGBA", "P", "RGB", "1", "L"])
@pytest.mark.parametrize(("channels", "wanted"), [(3, "RGB"), (1, "L")])
def test_a_folder_of_any_mode_is_given_to_a_model_as_image_convert_has_it(mode, channels, wanted, tmp_path) -> None:
    with Image.open(saved(tmp_path, mode)) as image:
        image = image.convert("RGB") if mode in ("P", "RGBA") else image
        expected = np.asarray(image.convert(wanted)).reshape(16, 16, channels)
    np.testing.assert_array_equal(taken(tmp_path, channels)[0], expected)


def test_what_is_done_to_the_images_is_said_in_one_line(tmp_path, capsys) -> None:
    for mode in ("RGBA", "P", "L"):
        saved(tmp_path, mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 16)).save(tmp_path / "z.jpg", exif=exif)
    assert load_samples(tmp_path).shape == (3, 16, 16)
    said = capsys.readouterr().err
    assert said == (
        "data: of 4 images 1 converted from grey to RGB, 1 converted from P to RGB, 1 converted from RGBA to RGB, "
        "1 turned as EXIF says\n"
    )
    taken([np.zeros((16, 16), np.uint8)] * 2, 3)
    assert capsys.readouterr().err == "data: 2 images converted from grey to RGB for the model\n"


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("resolution", [None, 8])
def test_a_photo_is_turned_as_its_exif_says_before_anything_else(turn, resolution, tmp_path) -> None:
    image, exif = Image.fromarray(PIXELS[:12, ..., :3]), Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as file:
        upright = ImageOps.exif_transpose(file)
    expected = load_samples([upright], resolution)
    samples = load_samples(tmp_path, resolution)
    assert samples.sha256 == expected.sha256
    assert samples.values.shape[1:3] == ((8, 8) if resolution else (upright.height, upright.width))


def test_transparent_pixels_keep_their_colour_when_they_are_resized_too() -> None:
    pixels = np.full((16, 16, 4), [200, 100, 50, 0], np.uint8)
    assert load_samples([Image.fromarray(pixels, "RGBA")], 8).values.unique().tolist() == [50, 100, 200]


@torch.no_grad()
def test_a_pipelines_autoencoder_gets_grey_images_in_rgb(tmp_path) -> None:
    pipeline = PIPELINES["stable diffusion"][0](tmp_path / "pipeline")
    grey = [np.full((16, 16, 1), value, np.uint8) for value in (0, 90)]
    colour = [np.repeat(image, 3, 2) for image in grey]
    torch.testing.assert_close(dp.encode(pipeline, grey).values, dp.encode(pipeline, colour).values)


def test_a_pipeline_of_pixels_gets_them_in_its_own_colours_once(capsys) -> None:
    pipeline = DDPMPipeline(make_unet(), SCHEDULER)
    samples = dp.encode(pipeline, [PIXELS[..., :3]])
    assert samples.shape == (1, 16, 16)
    assert capsys.readouterr().err.count("from RGB to grey") == 1
    fitting(samples, pipeline.unet, UNET_2D, SCHEDULER)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("channels", [3, 4])
def test_what_the_channels_of_an_array_are_is_not_guessed(channels) -> None:
    with pytest.raises(BadInput, match=rf"samples are \({channels}, 16, 16\).* the UNet takes \(1, 16, 16\)"):
        fitting(load_samples(PIXELS[None, ..., :channels]), make_unet(), UNET_2D, SCHEDULER)


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_an_image_of_more_than_8_bits_a_channel_is_refused_by_its_name(mode) -> None:
    with pytest.raises(BadInput, match=f"row 0 is a {mode} image; convert it to 8-bit grey or RGB"):
        load_samples([Image.new(mode, (4, 4))])


def test_float_inputs_take_whole_numbers_and_indices_only_these(tmp_path) -> None:
    unet = make_unet(num_class_embeds=3)
    images = torch.zeros(2, 16, 16, 1, dtype=torch.uint8)
    samples = Samples(images, {"class_labels": torch.tensor([0, 2], dtype=torch.int16)})
    assert fitting(samples, unet, UNET_2D, SCHEDULER).extra["class_labels"].dtype is torch.int64
    with pytest.raises(BadInput, match=r"class_labels is torch.float32 \(2,\), the UNet takes int64"):
        fitting(Samples(images, {"class_labels": torch.zeros(2)}), unet, UNET_2D, SCHEDULER)
