"""Damaged model directories, dense and pruned: one line, or a model that computes; never a traceback or a hang."""

from __future__ import annotations

import collections
import faulthandler
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from mutate_directories import mutate
from tiny import make_unet

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.errors import BadInput
from diffprune_plugin.pruning.loading import load_pipeline

COUNT = int(os.environ.get("MUTATIONS", "300"))


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("originals")
    pipeline = DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=10))
    pipeline.save_pretrained(folder / "dense")
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude", pruning_ratio=0.5))
    pipeline.save_pretrained(folder / "pruned")
    return [folder / "dense", folder / "pruned"]


def outcome(directory: Path) -> str:
    """How the loading of a directory ends: ``refused``, or ``loaded`` if it computes."""
    try:
        unet = load_pipeline(directory).unet
    except BadInput as error:
        return "refused" if "\n" not in str(error) else f"refused in several lines: {error}"
    inputs = UNET_2D.trace_inputs(unet)
    with torch.no_grad():
        output = unet(**inputs).sample
    assert output.shape == (1, unet.config.out_channels, *inputs["sample"].shape[2:])
    assert torch.isfinite(output).all()
    return "loaded"


def test_a_damaged_directory_is_refused_in_a_line_or_computes(originals, tmp_path) -> None:
    counts: collections.Counter[str] = collections.Counter()
    for seed in range(COUNT):
        rng = random.Random(seed)
        original = originals[seed % 2]
        shutil.copytree(original, tmp_path / "model")
        how = mutate(rng, tmp_path / "model")
        faulthandler.dump_traceback_later(60, exit=True)  # a hang ends the run and shows where
        try:
            counts[f"{original.name} {outcome(tmp_path / 'model')}"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, {original.name}: {how}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(tmp_path / "model")
    print(dict(counts), file=sys.stderr)
    assert len(counts) == 4, counts
    assert counts["dense loaded"] > 0 < counts["pruned loaded"]
    assert counts["dense refused"] + counts["pruned refused"] > COUNT / 3
