"""Pruned folders where this package is not installed: their own loader, with diffusers and torch alone."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from tiny import make_unet, output_of
from tiny_pipelines import PIPELINES
from tiny_transformers import make

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d_condition import UNET_2D_CONDITION
from diffprune_plugin.errors import BadInput
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning import index
from diffprune_plugin.pruning.directory import LOADER_FILE, LOADERS, WEIGHTS, loader_bytes
from diffprune_plugin.pruning.loading import load_pipeline
from diffprune_plugin.pruning.pruned_class import PLAN_FILE

# Another Python's view: no path to the checkout, no editable install.
BARE = """
import sys
sys.path = [p for p in sys.path if p not in {hidden!r}]
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__name__", "").lower()]
import importlib.util
assert importlib.util.find_spec("diffprune_plugin") is None
import json, torch, numpy as np
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
for place, given in json.loads(sys.argv[1]).items():
    try:
        pipeline = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
    except ValueError as error:
        print("refused:", error)
        continue
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(generator=torch.Generator().manual_seed(0), output_type="np", **given).images
    np.save(place + ".npy", found)
"""


def loader(folder: Path) -> ModuleType:
    """The loader in a folder as diffusers would run it, where there is no diffprune_plugin."""
    spec: Any = importlib.util.spec_from_file_location("loader_beside_weights", folder / LOADER_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PACKAGE = "package_that_is_nowhere"
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    unet = make_unet()
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.5))
    return dp.save(unet, tmp_path / "unet")


def test_the_loader_rebuilds_the_same_model_from_the_tensors_alone(folder: Path) -> None:
    (folder / PLAN_FILE).unlink()  # as in what diffusers downloads from a hub
    state = torch.random.get_rng_state()
    model = loader(folder).PrunedUNet2DModel.from_pretrained(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(output_of(model), output_of(dp.load(folder)))
    with pytest.raises(ValueError, match="was loaded without"):
        model.save_pretrained(folder)


@pytest.mark.parametrize("heads", [{}, {"head_pruning_ratio": 0.5}], ids=["inside heads", "whole heads"])
def test_attention_keeps_its_heads_and_scale(heads: dict[str, float], tmp_path: Path) -> None:
    unet = PIPELINES["stable diffusion xl"][0](tmp_path).unet
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.5, **heads))
    dp.save(unet, tmp_path / "unet")
    model = loader(tmp_path / "unet").PrunedUNet2DConditionModel.from_pretrained(tmp_path / "unet")
    inputs = UNET_2D_CONDITION.example_inputs(unet, batch=2)
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, unet(**inputs).sample)


@pytest.mark.parametrize("name", ["DiT", "Flux", "SD 3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformer_computes_the_same_with_this_package_and_without(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Whole heads are gone, and DiT's positions, which are not saved, stay float32 as in diffusers."""
    dp.save(make(name), tmp_path / "dense")
    model = dp.load(tmp_path / "dense", dtype)
    dp.remove_(model, dp.make_plan(model, "magnitude", pruning_ratio=0.5, head_pruning_ratio=0.5))
    dp.save(model, tmp_path / "pruned")
    cls = type(model).__name__
    alone = getattr(loader(tmp_path / "pruned"), cls).from_pretrained(tmp_path / "pruned", torch_dtype=dtype)
    again = dp.load(tmp_path / "pruned", dtype)
    heads = {
        part: [m.heads for m in each.modules() if hasattr(m, "to_q")] for part, each in (("1", model), ("2", alone))
    }
    assert heads["1"] == heads["2"]
    inputs = {
        k: v.to(dtype) if v.is_floating_point() else v for k, v in find_adapter(model).example_inputs(model).items()
    }
    with torch.no_grad():
        outputs = [each(**inputs, return_dict=False)[0] for each in (model, again, alone)]
    assert outputs[0].dtype is dtype
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_changed_weights_or_a_changed_loader_are_refused_and_named_by_their_hash(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: was changed: its SHA-256 is [0-9a-f]{{64}}, .* states [0-9a-f]"):
        loader(folder).PrunedUNet2DModel.from_pretrained(folder)
    (folder / WEIGHTS).write_bytes(whole)
    with (folder / LOADER_FILE).open("a") as file:
        file.write("\nprint('tampered')\n")
    with pytest.raises(ValueError, match="py beside it: was changed: its SHA-256 is"):
        loader(folder).PrunedUNet2DModel.from_pretrained(folder)


def test_code_in_a_directory_is_ours_to_the_byte_or_the_directory_is_refused(
    scheduler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = make_unet()
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.5))
    place = dp.save(DDPMPipeline(unet, scheduler), tmp_path / "pruned")
    assert DiffusionPipeline.from_pretrained(place).unet.pruning_plan == load_pipeline(place).unet.pruning_plan
    shutil.copy(place / "unet" / LOADER_FILE, place / LOADER_FILE)  # beside model_index.json it has no business
    with pytest.raises(BadInput, match="would be run in its place"):
        load_pipeline(place)
    (place / LOADER_FILE).unlink()
    with (place / "unet" / LOADER_FILE).open("a") as file:
        file.write("\n")
    with pytest.raises(BadInput, match="would be run in its place"):
        load_pipeline(place)
    earlier = hashlib.sha256((place / "unet" / LOADER_FILE).read_bytes()).hexdigest()
    monkeypatch.setattr(index, "LOADERS", (earlier, *LOADERS))  # as if a version of ours had written it
    assert load_pipeline(place).unet.pruning_plan


def test_the_loader_of_now_is_on_record_so_that_a_later_version_takes_its_folders() -> None:
    """Where this fails the loader was changed: add its hash, and leave the others."""
    assert hashlib.sha256(loader_bytes()).hexdigest() == LOADERS[-1]
    assert len(set(LOADERS)) == len(LOADERS)


@pytest.mark.slow
def test_plain_diffusers_draws_the_same_images_and_refuses_what_was_tampered_with(tmp_path: Path) -> None:
    pipeline = PIPELINES["stable diffusion"][0](tmp_path / "tokenizer")
    prompted = {"prompt": "a bar", "num_inference_steps": 3, "guidance_scale": 7.5}
    demo = load_pipeline(Path(dp.__file__).parent / "demo" / "model")
    calls = {"sd": (pipeline, prompted), "ddpm": (demo, {"batch_size": 2, "num_inference_steps": 3})}
    expected = {}
    for name, (each, given) in calls.items():
        dp.remove_(each.unet, dp.make_plan(each.unet, "magnitude", pruning_ratio=0.3))
        dp.save(each, tmp_path / name)
        expected[name] = each(generator=torch.Generator().manual_seed(0), output_type="np", **given).images
    for name, file in (("tampered_weights", WEIGHTS), ("tampered_loader", LOADER_FILE)):
        shutil.copytree(tmp_path / "ddpm", tmp_path / name)
        content = (tmp_path / name / "unet" / file).read_bytes()
        (tmp_path / name / "unet" / file).write_bytes(content.replace(b"# Attributes", b"# attributes")[:-1] + b"\n")
    words = {str(tmp_path / name): calls.get(name, calls["ddpm"])[1] for name in (*calls, "tampered_weights")}
    words[str(tmp_path / "tampered_loader")] = calls["ddpm"][1]
    hidden = [str(Path(dp.__file__).parents[1]), ""]
    child = subprocess.run(
        [sys.executable, "-I", "-c", BARE.format(hidden=hidden), json.dumps(words)],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    for name, images in expected.items():
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), images)
    refused = [line for line in child.stdout.splitlines() if line.startswith("refused:")]
    assert len(refused) == 2
    assert "tampered_weights" in refused[0]
    assert "diffprune_plugin.py beside it: was changed" in refused[1]
