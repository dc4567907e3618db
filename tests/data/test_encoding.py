"""Captions and images as the pipeline itself encodes them; precomputed ones; classes; what does not fit is named."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import save_file
from tiny import make_unet
from tiny_conditional import CLASSES, REFINER, SDXL
from tiny_conditional import make_unet as make_conditional
from tiny_pipelines import CAPTIONS, PIPELINES, captioned_folder

import diffprune_plugin as dp
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.errors import BadInput
from diffprune_plugin.plugins import find_adapter

SMALL = Sweep(samples=8, curve_samples=2)
FAST = {"batch_size": 4, "timesteps": 4, "progress": False}


@pytest.fixture
def pipeline(request, tmp_path) -> Any:
    return PIPELINES[getattr(request, "param", "stable diffusion")][0](tmp_path / "pipeline")


@pytest.fixture
def folder(tmp_path) -> Any:
    return captioned_folder(tmp_path / "data", 16)


def tokens(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


# against the encoders themselves, by hand


@torch.no_grad()
def test_stable_diffusion_sees_its_text_encoders_last_state_and_the_mean_of_its_autoencoders_latents(
    pipeline, folder
) -> None:
    samples = dp.encode(pipeline, folder)
    expected = pipeline.text_encoder(tokens(pipeline.tokenizer, list(CAPTIONS)))[0]
    torch.testing.assert_close(samples.extra["encoder_hidden_states"], expected)
    empty = pipeline.text_encoder(tokens(pipeline.tokenizer, [""]))[0]
    torch.testing.assert_close(samples.null["encoder_hidden_states"], empty)
    pixels = torch.from_numpy(np.array(Image.open(folder / "1.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    latent = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(samples.values[1:2], latent)


@torch.no_grad()
@pytest.mark.parametrize("pipeline", ["stable diffusion xl"], indirect=True)
def test_sdxl_sees_both_encoders_the_pooled_embedding_zeros_for_no_caption_and_its_six_numbers(
    pipeline, folder
) -> None:
    samples = dp.encode(pipeline, folder)
    first, second = (
        encoder(tokens(tokenizer, list(CAPTIONS)), output_hidden_states=True)
        for encoder, tokenizer in (
            (pipeline.text_encoder, pipeline.tokenizer),
            (pipeline.text_encoder_2, pipeline.tokenizer_2),
        )
    )
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    torch.testing.assert_close(samples.extra["encoder_hidden_states"], states)
    torch.testing.assert_close(samples.extra["text_embeds"], second.text_embeds)
    assert {name: (len(row), row.abs().max().item()) for name, row in samples.null.items()} == {
        "encoder_hidden_states": (1, 0.0),
        "text_embeds": (1, 0.0),
    }
    assert samples.extra["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 4


@torch.no_grad()
@pytest.mark.parametrize("pipeline", ["latent diffusion"], indirect=True)
def test_latent_diffusion_sees_its_bert(pipeline, tmp_path) -> None:
    samples = dp.encode(pipeline, captioned_folder(tmp_path / "data", 64))
    expected = pipeline.bert(tokens(pipeline.tokenizer, list(CAPTIONS)))[0]
    torch.testing.assert_close(samples.extra["encoder_hidden_states"], expected)
    assert samples.shape == (4, 8, 8)


@pytest.mark.parametrize("pipeline", ["stable diffusion xl"], indirect=True)
def test_resized_only_when_asked_and_the_numbers_say_what_was_done(pipeline, folder) -> None:
    Image.new("RGB", (48, 32)).save(folder / "2.png")
    with pytest.raises(BadInput, match=r"2\.png is \(32, 48, 3\).* set 'resolution'"):
        dp.encode(pipeline, folder)
    numbers = dp.encode(pipeline, folder, resolution=16).extra["time_ids"].tolist()
    assert numbers[2] == [32, 48, 0, 4, 16, 16], "24 x 16 after resizing, 4 columns cut off on either side"
    assert numbers[0] == [16, 16, 0, 0, 16, 16]


@pytest.mark.parametrize("pipeline", ["stable diffusion xl"], indirect=True)
def test_the_refiners_fifth_number_is_an_aesthetic_score(pipeline, folder) -> None:
    pipeline.unet = make_conditional(REFINER)
    assert dp.encode(pipeline, folder).extra["time_ids"].tolist() == [[16, 16, 0, 0, 6.0]] * 4


# the condition left out


def test_the_condition_of_a_share_of_the_samples_is_left_out_whatever_the_batch_size(pipeline, folder) -> None:
    """With everything dropped: as if every caption were empty. The same samples at every batch size."""
    samples = dp.encode(pipeline, folder)
    empty = Samples(samples.values, {n: row.expand(4, -1, -1) for n, row in samples.null.items()})

    def gradients(data: Samples, dropout: float | None, **changes: Any) -> torch.Tensor:
        sweep = Sweep(samples=8, curve_samples=2, condition_dropout=dropout)
        calibration = dp.calibrate(pipeline.unet, pipeline.scheduler, data, sweep, **{**FAST, **changes})
        return torch.cat([g.flatten() for g in calibration.gradients.values()])

    assert torch.equal(gradients(samples, 1.0), gradients(empty, 0.0))
    assert not torch.equal(gradients(samples, 0.5), gradients(samples, 0.0))
    assert not torch.equal(gradients(samples, 0.5), gradients(samples, 1.0))
    torch.testing.assert_close(gradients(samples, 0.5), gradients(samples, 0.5, batch_size=3), rtol=1e-3, atol=1e-5)
    assert torch.equal(gradients(samples, None), gradients(samples, 0.1))
    assert torch.equal(gradients(empty, None), gradients(empty, 0.0))
    with pytest.raises(BadInput, match=r"condition_dropout 0\.1, but the data \(encoder_hidden_states\) has no null"):
        gradients(empty, 0.1)


@pytest.mark.parametrize("share", [-0.1, 1.1, True, "some"])
def test_an_impossible_share_is_refused(share) -> None:
    with pytest.raises(BadInput, match="condition_dropout"):
        dp.importance("diff_taylor", condition_dropout=share)


# precomputed


def test_precomputed_latents_and_embeddings_give_the_same_calibration_as_the_images(pipeline, folder, tmp_path) -> None:
    samples = dp.encode(pipeline, folder)
    nulls = {f"null_{name}": row for name, row in samples.null.items()}
    save_file({"latents": samples.values, **samples.extra, **nulls}, tmp_path / "data.safetensors")
    stored = dp.encode(pipeline, tmp_path / "data.safetensors")
    assert stored.sha256 == samples.sha256
    first, second = (dp.calibrate(pipeline.unet, pipeline.scheduler, s, SMALL, **FAST) for s in (samples, stored))
    assert all(torch.equal(first.gradients[name], second.gradients[name]) for name in first.gradients)


def sdxl_tensors(**changes: Any) -> dict[str, torch.Tensor]:
    tensors = {
        "latents": torch.zeros(2, 4, 8, 8),
        "encoder_hidden_states": torch.zeros(2, 7, 24),
        "text_embeds": torch.zeros(2, 32),
        "time_ids": torch.zeros(2, 6),
        **changes,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents": None}, "neither latents nor sample"),
        ({"latents": torch.zeros(2, 4, 8)}, r"latents is torch.float32 \(2, 4, 8\), not float"),
        ({"text_embeds": None, "time_ids": None}, "the UNet needs text_embeds, time_ids, the data has encoder_hidden"),
        ({"encoder_hidden_states": None}, "needs encoder_hidden_states, .*; add metadata.jsonl with captions"),
        ({"text_embeds": torch.zeros(3, 32)}, r"text_embeds is \(3, 32\), not a row for each of 2 latents"),
        ({"text_embeds": torch.tensor(1.0)}, r"text_embeds is \(\), not a row for each"),
        ({"time_ids": torch.zeros(2, 5)}, r"time_ids is torch.float32 \(2, 5\), the UNet takes .* \(batch 6\)"),
        ({"encoder_hidden_states": torch.zeros(2, 24)}, r"\(2, 24\), the UNet takes .* \(batch sequence 24\)"),
        ({"null_text_embeds": torch.zeros(31)}, r"null_text_embeds is \(31,\), not a row of text_embeds, \(32,\)"),
        ({"null_txt": torch.zeros(31)}, "null_txt is there but txt is not; have encoder_hidden_states, text_embeds"),
        ({"latents": torch.zeros(2, 4, 16, 16)}, r"\(4, 16, 16\) .* the UNet takes \(4, 8, 8\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(changes, words, tmp_path) -> None:
    unet = make_conditional(SDXL)
    save_file(sdxl_tensors(), tmp_path / "good.safetensors")
    fitting(load_samples(tmp_path / "good.safetensors"), unet, find_adapter(unet), DDPMScheduler())
    save_file(sdxl_tensors(**changes), tmp_path / "bad.safetensors")
    with pytest.raises(BadInput, match=words):
        fitting(load_samples(tmp_path / "bad.safetensors"), unet, find_adapter(unet), DDPMScheduler())


def test_a_damaged_safetensors_file_is_named(tmp_path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(BadInput, match=r"a\.safetensors: not a readable"):
        load_samples(tmp_path / "a.safetensors")


# captions and images that do not fit


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json\n", r"metadata.jsonl: line 1: not valid json"),
        ('\n{"file_name": "0.png"}\n', r"line 2 has \['file_name'\], not a 'file_name' and a 'text'"),
        ('["0.png"]\n', "line 1 has list"),
        ("\n", "no line in it"),
        ('{"file_name": "9.png", "text": ""}', r"9\.png: no such image; mend metadata\.jsonl"),
    ],
)
def test_spoilt_captions_are_named(folder, text, words) -> None:
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(BadInput, match=words):
        load_samples(folder)


def test_an_image_may_have_several_captions_and_of_too_many_pixels_every_nth_is_taken(folder, monkeypatch) -> None:
    lines = [json.dumps({"file_name": "0.png", "text": text}) for text in "abcd"]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert load_samples(folder).captions == ("a", "b", "c", "d")
    monkeypatch.setattr("diffprune_plugin.data.pictures.BYTES", 3 * 16 * 16 * 3)
    samples = load_samples(folder)
    assert (len(samples), samples.captions) == (2, ("a", "c"))


def test_a_sequence_may_carry_captions_too(folder) -> None:
    rows = [{"image": Image.open(folder / f"{i}.png"), "text": text} for i, text in enumerate(CAPTIONS)]
    first, second = load_samples(rows), load_samples(folder)
    assert (first.sha256, first.captions) == (second.sha256, second.captions)


def test_images_of_another_size_than_the_pipeline_takes_are_refused_with_the_remedy(pipeline, tmp_path) -> None:
    with pytest.raises(BadInput, match=r"\(3, 32, 32\) .*takes \(3, 16, 16\): .* 'resolution: 16'"):
        dp.encode(pipeline, captioned_folder(tmp_path / "data", 32))


def test_captions_without_a_text_encoder_and_images_without_captions_are_refused(pipeline, folder) -> None:
    pipeline.text_encoder = None
    with pytest.raises(BadInput, match="StableDiffusionPipeline cannot encode the captions: "):
        dp.encode(pipeline, folder)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(BadInput, match=r"needs encoder_hidden_states, the data has none; add metadata\.jsonl"):
        dp.calibrate(pipeline.unet, pipeline.scheduler, dp.encode(pipeline, folder), SMALL, **FAST)


# classes


def class_folder(path: Any, names: list[str]) -> Any:
    for name in names:
        (path / name).mkdir(parents=True)
        Image.new("L", (16, 16), 40).save(path / name / "a.png")
        Image.new("L", (16, 16), 80).save(path / name / "b.png")
    return path


@pytest.mark.parametrize(
    ("names", "labels"), [(["cat", "dog", "eel"], [0, 0, 1, 1, 2, 2]), (["0", "2", "10"], [0, 0, 10, 10, 2, 2])]
)
def test_the_folder_of_an_image_is_its_class_by_place_or_by_number(names, labels, tmp_path) -> None:
    assert load_samples(class_folder(tmp_path / "data", names)).extra["class_labels"].tolist() == labels


def test_a_class_conditional_unet_is_calibrated_from_folders_and_wrong_classes_are_refused(tmp_path) -> None:
    folder = class_folder(tmp_path / "data", ["cat", "dog", "eel"])
    scheduler = DDPMScheduler(num_train_timesteps=20)
    calibration = dp.calibrate(make_unet(num_class_embeds=3), scheduler, folder, SMALL, **FAST)
    assert calibration.gradients["class_embedding.weight"].abs().sum(1).gt(0).all()
    with pytest.raises(BadInput, match="3 class folders, but the UNet knows 10 classes"):
        dp.calibrate(make_unet(num_class_embeds=10), scheduler, folder, SMALL, **FAST)
    numbered = class_folder(tmp_path / "numbered", ["0", "3"])
    with pytest.raises(BadInput, match="class_labels goes from 0 to 3, the UNet knows 0 to 2"):
        dp.calibrate(make_unet(num_class_embeds=3), scheduler, numbered, SMALL, **FAST)


def test_a_conditional_unet_takes_class_labels_beside_the_embeddings(tmp_path) -> None:
    tensors = {
        "sample": torch.randn(3, 4, 8, 8),
        "encoder_hidden_states": torch.randn(3, 1, 24),
        "class_labels": torch.arange(3),
        "null_class_labels": torch.tensor([9]),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    sweep = Sweep(samples=8, curve_samples=2, condition_dropout=1.0)
    unet, scheduler = make_conditional(CLASSES), DDPMScheduler(num_train_timesteps=20)
    calibration = dp.calibrate(unet, scheduler, tmp_path / "a.safetensors", sweep, **FAST)
    assert calibration.gradients["class_embedding.weight"].abs().sum(1).nonzero().flatten().tolist() == [9]


def test_metadata_is_read_as_the_datasets_library_writes_it(folder) -> None:
    """Other columns are allowed, files may lie in subfolders."""
    (folder / "sub").mkdir()
    (folder / "0.png").rename(folder / "sub" / "0.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "sub/0.png", "text": "é", "id": 3}) + "\n")
    samples = load_samples(folder)
    assert (len(samples), samples.captions) == (1, ("é",))


def test_captions_may_hold_any_line_separator_but_have_to_be_utf_8(folder) -> None:
    file = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    lines = (json.dumps(row | {"text": "a\u2028b"}, ensure_ascii=False) for row in rows)
    file.write_text("\n".join(lines), encoding="utf-8")
    assert load_samples(folder).captions[0] == "a\u2028b"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match=r"metadata\.jsonl: not UTF-8"):
        load_samples(folder)
