"""A pruned directory: loads in plain diffusers bit for bit, written whole or not at all, damage is noticed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from tiny import make_unet, output_of

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.plan import PLAN_FILE
from diffprune_plugin.pruning.directory import WEIGHTS, read_plan
from diffprune_plugin.pruning.loading import load_pipeline
from diffprune_plugin.utils import files


@pytest.fixture
def pruned_dir(pipeline, tmp_path) -> Path:
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude", pruning_ratio=0.5))
    return dp.save(pipeline, tmp_path / "pruned")


def images_of(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch_size=2, generator=generator, num_inference_steps=3, output_type="np").images


@pytest.mark.parametrize("cls", [DiffusionPipeline, DDPMPipeline])
def test_plain_diffusers_loads_it_and_gives_the_same_images_bit_for_bit(cls, pipeline, pruned_dir) -> None:
    loaded = cls.from_pretrained(pruned_dir)
    assert type(loaded.unet).__name__ == "PrunedUNet2DModel"
    assert np.array_equal(images_of(pipeline), images_of(loaded))


def test_a_device_map_of_one_device_moves_it_and_others_are_refused(pruned_dir) -> None:
    load = type(DiffusionPipeline.from_pretrained(pruned_dir).unet).from_pretrained
    for device_map in ("meta", {"": "meta"}, torch.device("meta")):
        assert load(pruned_dir, subfolder="unet", device_map=device_map).device.type == "meta"
    assert load(pruned_dir, subfolder="unet").device.type == "cpu"
    for device_map in ("auto", {"conv_in": "cpu", "conv_out": "meta"}):
        with pytest.raises(BadInput, match="a pruned UNet goes to one device"):
            load(pruned_dir, subfolder="unet", device_map=device_map)
    with pytest.raises(BadInput, match="quantization_config: is not applied to a pruned UNet"):
        load(pruned_dir, subfolder="unet", quantization_config=object())


def test_an_ordinary_save_pretrained_of_a_pruned_pipeline_loads_too(pruned_dir, tmp_path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(pruned_dir)
    pipeline.save_pretrained(tmp_path / "again")
    again = DDIMPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(output_of(again.unet), output_of(pipeline.unet))


def test_the_directory_holds_the_dense_config_the_plan_and_no_pickle(pruned_dir) -> None:
    unet = pruned_dir / "unet"
    assert json.loads((unet / "config.json").read_text())["block_out_channels"] == [16, 32]
    assert {path.suffix for path in pruned_dir.rglob("*") if path.is_file()} == {".json", ".safetensors", ".md", ".py"}
    assert json.loads((pruned_dir / "model_index.json").read_text())["unet"] == [
        "diffprune_plugin",
        "PrunedUNet2DModel",
    ]
    assert read_plan(pruned_dir).layers


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_class_embeds": 4},
        {"resnet_time_scale_shift": "scale_shift"},
        {"time_embedding_type": "learned", "num_train_timesteps": 50},
        {"time_embedding_type": "fourier"},
    ],
    ids=lambda changes: next(iter(changes), "default"),
)
def test_a_bare_unet_is_loaded_with_difference_zero(changes, tmp_path) -> None:
    unet = make_unet(**changes)
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.5))
    dp.save(unet, tmp_path / "unet")
    assert torch.equal(output_of(dp.load(tmp_path / "unet")), output_of(unet))


def test_half_precision_is_kept_when_asked_for(pruned_dir) -> None:
    assert dp.load(pruned_dir, torch.float16).dtype is torch.float16
    assert DiffusionPipeline.from_pretrained(pruned_dir, torch_dtype=torch.float16).unet.dtype is torch.float16
    assert load_pipeline(pruned_dir, torch.float16).unet.dtype is torch.float16


def test_a_dense_directory_loads_by_the_same_call(dense_dir, unet) -> None:
    assert torch.equal(output_of(dp.load(dense_dir)), output_of(unet))
    assert torch.equal(output_of(dp.load(dense_dir / "unet")), output_of(unet))


def test_an_existing_directory_is_kept_unless_told_otherwise(pipeline, dense_dir) -> None:
    with pytest.raises(BadInput, match="use --overwrite"):
        dp.save(pipeline, dense_dir)
    dp.save(pipeline, dense_dir, overwrite=True)
    (dense_dir.parent / "other").mkdir()
    for name in ("thesis.txt", "config.yaml", "config.json"):
        (dense_dir.parent / "other" / name).write_text("years of work")
    with pytest.raises(BadInput, match="holds other files"):
        dp.save(pipeline, dense_dir.parent / "other", overwrite=True)
    with pytest.raises(BadInput, match="is a file"):
        dp.save(pipeline, dense_dir / "model_index.json", overwrite=True)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def flip_plan(path: Path) -> None:
    path.write_text(path.read_text().replace('"pruning_ratio": 0.5', '"pruning_ratio": 0.4'))


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        (WEIGHTS, truncate, "truncated or damaged"),
        (WEIGHTS, flip_a_bit, "altered since it was written"),
        (PLAN_FILE, lambda p: p.write_text("[]"), "not a pruning plan"),
        ("config.json", lambda p: p.write_text(p.read_text().replace('"silu"', "5")), "no UNet2DModel"),
        (WEIGHTS, Path.unlink, "no such file"),
        (PLAN_FILE, flip_plan, "altered since"),
        ("config.json", Path.unlink, "neither a pipeline"),
        ("config.json", lambda p: p.write_text("{"), "config.json: not valid json"),
        ("config.json", lambda p: p.write_text("[]"), "holds a list"),
    ],
)
def test_damage_is_one_clear_line(pruned_dir, file, damage, words) -> None:
    damage(pruned_dir / "unet" / file)
    with pytest.raises(BadInput, match=words):
        dp.load(pruned_dir)


def test_the_plan_is_in_the_weights_too_which_are_all_that_comes_from_a_hub(pruned_dir) -> None:
    plan = dp.load(pruned_dir).pruning_plan
    (pruned_dir / "unet" / PLAN_FILE).unlink()
    assert dp.load(pruned_dir).pruning_plan == plan


def test_weights_of_another_plan_are_noticed(pruned_dir, tmp_path) -> None:
    other = make_unet()
    dp.remove_(other, dp.make_plan(other, "random", pruning_ratio=0.5))
    dp.save(other, tmp_path / "other")
    (tmp_path / "other" / WEIGHTS).replace(pruned_dir / "unet" / WEIGHTS)
    with pytest.raises(BadInput, match="belongs to another plan"):
        dp.load(pruned_dir)


def test_a_config_of_another_architecture_is_noticed(pruned_dir) -> None:
    path = pruned_dir / "unet" / "config.json"
    path.write_text(path.read_text().replace('"act_fn": "silu"', '"act_fn": "gelu"'))
    with pytest.raises(BadInput, match="another architecture"):
        dp.load(pruned_dir)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: d / "nothing", "no such directory"),
        (lambda d: d, "neither a pipeline"),
    ],
)
def test_a_directory_that_is_no_model_is_one_clear_line(make, words, tmp_path) -> None:
    with pytest.raises(BadInput, match=words):
        dp.load(make(tmp_path))
    with pytest.raises(BadInput):
        load_pipeline(make(tmp_path))


def test_a_class_that_diffusers_does_not_have_is_named(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet9D"}')
    with pytest.raises(BadInput, match="UNet9D"):
        dp.load(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "PrunedUNet9D"}')
    with pytest.raises(BadInput, match="no adapter for UNet9D"):
        dp.load(tmp_path)
    with pytest.raises(AttributeError):
        dp.PrunedUNet9D  # noqa: B018


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from tiny import make_unet
from diffusers import DDPMPipeline, DDPMScheduler
from pathlib import Path
import diffprune_plugin as dp
from diffprune_plugin.utils import files
place, real = sys.argv[2], {name: getattr(files, name) for name in ("exchange", "current_umask")}
def die(*a):
    if place == "after" : real["exchange"](*a)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(files, "current_umask" if place == "before" else "exchange", die)
dp.save(DDPMPipeline(make_unet(seed=1), DDPMScheduler()), "model", overwrite=True)
"""


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_killed_save_leaves_the_old_directory_or_the_new_one(place, tmp_path) -> None:
    old, new = make_unet(seed=0), make_unet(seed=1)
    dp.save(DDPMPipeline(old, DDPMScheduler()), tmp_path / "model")
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), place]
    killed = subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    expected = old if place == "before" else new
    assert torch.equal(output_of(dp.load(tmp_path / "model")), output_of(expected))


def test_where_directories_cannot_be_swapped_in_one_step_they_are_moved(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *a, **k: (_ for _ in ()).throw(OSError))
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.mkdir()
        (path / "name").write_text(path.name)
    files.exchange(first, second)
    assert (second / "name").read_text() == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["second"]


FULL = """
import os, resource, signal, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from tiny import make_unet
import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unet = make_unet()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    dp.save(unet, "out")
except BadInput as error:
    print(error)
"""


def test_a_file_that_cannot_grow_is_one_line_and_leaves_nothing(tmp_path) -> None:
    command = [sys.executable, "-c", FULL, str(Path(__file__).parents[1])]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "free space or choose another output" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(pipeline, tmp_path, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffprune_plugin.utils.tensors.save_file", full)
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude"))
    with pytest.raises(BadInput, match="No space left on device; free space"):
        dp.save(pipeline, tmp_path / "out")
    assert not list(tmp_path.iterdir())
