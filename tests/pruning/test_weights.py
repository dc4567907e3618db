"""A dense directory: every tensor is there and used, of the variant meant, and no code of its own is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file, save_file
from tiny import make_unet, output_of
from tiny_pipelines import PIPELINES

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput
from diffprune_plugin.pruning.directory import WEIGHTS
from diffprune_plugin.pruning.loading import load_pipeline


@pytest.fixture
def dense(unet, tmp_path) -> Path:
    unet.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def change(file: Path, **tensors: torch.Tensor | None) -> None:
    state = {**load_file(file), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"conv_in__weight": None}, r"no tensor 'conv_in.weight' in the weights \(1 missing\)"),
        ({"ema__conv_in": torch.zeros(2)}, r"'ema.conv_in' \(1 such\) is not part of .*unused_tensors: ignore"),
        ({"conv_in__bias": torch.zeros(2)}, "cannot be loaded as UNet2DModel: .*conv_in.bias"),
        ({"conv_in__bias": torch.zeros(16, dtype=torch.int32)}, "'conv_in.bias' holds I32"),
    ],
)
def test_weights_that_are_not_the_configs_are_named(tensors, words, dense) -> None:
    change(dense / WEIGHTS, **tensors)
    with pytest.raises(BadInput, match=words):
        dp.load(dense)


def test_further_tensors_are_passed_over_when_asked(run, dense, unet, tmp_path) -> None:
    change(dense / WEIGHTS, ema__conv_in=torch.zeros(2))
    assert torch.equal(output_of(dp.load(dense, unused_tensors="ignore")), output_of(unet))
    command = ("prune", config(tmp_path, dense), "--set", "importance=magnitude")
    code, _, err = run(*command)
    assert code == 2
    assert "unused_tensors: ignore" in err
    assert run(*command, "--set", "unused_tensors=ignore")[0] == 0


def config(folder: Path, model: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"model": str(model), "output": str(folder / "pruned"), **values}))
    return path


def test_the_only_variant_is_found_and_one_of_several_is_asked_for(pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path / "dense", variant="fp16")
    assert torch.equal(output_of(load_pipeline(tmp_path / "dense").unet), output_of(pipeline.unet))
    other = make_unet(seed=1)
    DDPMPipeline(other, pipeline.scheduler).save_pretrained(tmp_path / "dense", variant="ema")
    with pytest.raises(BadInput, match="several variants; choose one with 'variant': ema, fp16"):
        dp.load(tmp_path / "dense")
    assert torch.equal(output_of(dp.load(tmp_path / "dense", variant="ema")), output_of(other))
    with pytest.raises(BadInput, match=r"variant: 'fp8': no such weights in .*; it has ema, fp16"):
        load_pipeline(tmp_path / "dense", variant="fp8")


def test_parts_that_are_there_in_different_variants_alone_are_refused(tmp_path) -> None:
    pipeline = PIPELINES["stable diffusion"][0](tmp_path / "words")
    pipeline.save_pretrained(tmp_path / "dense", variant="fp16")
    for path in (tmp_path / "dense" / "vae").glob("*.safetensors"):
        path.rename(path.with_name(path.name.replace("fp16", "bf16")))
    with pytest.raises(BadInput, match=r"its parts have weights of bf16 and fp16 alone; save it with one of them"):
        load_pipeline(tmp_path / "dense")


def test_a_pipeline_inside_a_pipeline_is_not_looked_into(dense_dir, pipeline) -> None:
    pipeline.save_pretrained(dense_dir / "scheduler", safe_serialization=False)
    with pytest.raises(BadInput, match=r"scheduler holds a pipeline of its own, whose code is not looked at; remove"):
        load_pipeline(dense_dir)


def test_weights_in_several_files_are_read_and_one_that_is_missing_is_told(unet, tmp_path) -> None:
    unet.save_pretrained(tmp_path, max_shard_size="300KB", variant="fp16")
    assert torch.equal(output_of(dp.load(tmp_path)), output_of(unet))
    sorted(tmp_path.glob("*-of-*.safetensors"))[-1].unlink()
    with pytest.raises(BadInput, match="cannot be loaded as UNet2DModel"):
        dp.load(tmp_path)


def test_a_pickle_is_not_opened_and_the_line_says_how_to_convert_it(unet, tmp_path) -> None:
    unet.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(BadInput, match=r"\.bin files, pickles, .*use_safetensors=False, then save_pretrained"):
        dp.load(tmp_path)


@pytest.mark.parametrize(
    "sizes",
    [
        {"layers_per_block": 10**9},
        {"block_out_channels": [10**30] * 2},
        {"act_fn": []},
        *({"sample_size": value} for value in ("x", ["a", "b"], {"a": 1}, [1], [[]], 1e308)),
    ],
)
def test_damaged_sizes_end_in_a_line(sizes, dense) -> None:
    path = dense / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    with pytest.raises(BadInput, match=str(dense)):
        dp.load(dense)


HOSTILE = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass P: pass\nclass Evil: pass\n"


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["mypipe", "P"]},
        {"unet": ["evil", "Evil"]},
        {"scheduler": ["evil", "Evil"]},
        {"scheduler": ["evil.inner", "Evil"]},
        {"scheduler": ["diffusers", "DDPMScheduler"]},  # evil: a module of that name lies beside
    ],
)
def test_code_in_a_model_directory_is_not_run(index, run, dense_dir, tmp_path, monkeypatch) -> None:
    """The checks are our own: diffusers 0.35 runs it."""
    path = dense_dir / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **index}))
    for folder in (dense_dir, dense_dir / "unet", dense_dir / "scheduler"):
        for name in ("mypipe", "evil", *(["diffusers"] if index.get("scheduler", [""])[0] == "diffusers" else [])):
            (folder / f"{name}.py").write_text(HOSTILE)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)
    code, _, err = run("prune", config(tmp_path, dense_dir, importance="magnitude"), "--dry-run")
    assert code == 2
    assert "is not run" in err or "would be run in its place" in err
    assert not list(dense_dir.rglob("ran"))
    assert "evil" not in sys.modules


@pytest.mark.parametrize("count", [10**12, 0, "many", None])
def test_a_scheduler_with_timesteps_without_end_is_refused(count, dense_dir) -> None:
    path = dense_dir / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_train_timesteps": count}))
    with pytest.raises(BadInput, match="num_train_timesteps"):
        load_pipeline(dense_dir)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_json_nested_too_deeply_is_a_line(file, dense_dir) -> None:
    (dense_dir / file).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(BadInput, match="nested too deeply"):
        load_pipeline(dense_dir)


def test_a_plan_nested_too_deeply_is_a_line(pipeline, tmp_path) -> None:
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude"))
    dp.save(pipeline, tmp_path / "pruned")
    (tmp_path / "pruned" / "unet" / "pruning_plan.json").write_text("[" * 100_000)
    with pytest.raises(BadInput, match=r"plan\.json: not valid json: nested too deeply; restore it or prune again"):
        dp.load(tmp_path / "pruned")
