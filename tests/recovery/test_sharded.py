"""A fine-tune with the model split over processes by Accelerate's FSDP 2: what one process gives, resumed as well.

Accelerate has FSDP for GPUs alone; on CPUs it is told that these are some, and torch splits over gloo.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from processes import two_processes
from safetensors.torch import save_file
from tiny_transformers import make

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput
from diffprune_plugin.recovery import training
from diffprune_plugin.recovery.finetune import FinetuneReport, finetune, make_accelerator
from diffprune_plugin.utils.distributed import check_parallel

SCRIPT = """
import os, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_sharded import one_of_two
one_of_two()
"""
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP |= {"FSDP_TRANSFORMER_CLS_TO_WRAP": "JointTransformerBlock", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
STEPS, BROKEN = 5, 3
VALUES: dict[str, Any] = {"model": "pruned", "teacher": "dense", "data": "data.safetensors", "steps": STEPS}
VALUES |= {"batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "tracker": "none", "checkpoint_every": 1}
VALUES |= {"ema_decay": 0.5, "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a pruned Stable Diffusion 3 without encoders, and what they learn from."""
    folder, model = tmp_path_factory.mktemp("sharded"), make("SD 3")
    parts = ("vae", *(f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")))
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = StableDiffusion3Pipeline(transformer=model, scheduler=scheduler, **dict.fromkeys(parts))
    dp.save(pipeline, folder / "dense")
    dp.remove_(model, dp.make_plan(model, "magnitude", pruning_ratio=0.5))
    dp.save(pipeline, folder / "pruned")
    torch.manual_seed(0)
    size, config = model.config.sample_size, model.config
    shapes = {"sample": (config.in_channels, size, size), "encoder_hidden_states": (3, config.joint_attention_dim)}
    shapes |= {"pooled_projections": (config.pooled_projection_dim,)}
    save_file({name: torch.randn(8, *shape) for name, shape in shapes.items()}, folder / "data.safetensors")
    return folder


def tune(**changes: Any) -> FinetuneReport:
    return finetune(dp.FinetuneConfig.make({**VALUES, **changes}), progress=False, overwrite=True)


def one_of_two() -> None:
    """Stopped after some steps and started again; writes what this process saw."""
    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.MULTI_GPU
    drawn, calls, held = training.batch_of, iter(range(1, 100)), dict[str, float]()
    start = training.Training.__post_init__

    def broken(*arguments: Any) -> Any:
        if next(calls) > BROKEN:
            raise KeyboardInterrupt
        return drawn(*arguments)

    def begun(self: training.Training) -> None:
        start(self)
        mine = sum(parameter.to_local().numel() for parameter in self.parameters)  # type: ignore[attr-defined]
        held["share"] = mine / sum(parameter.numel() for parameter in self.parameters)

    training.Training.__post_init__ = begun  # type: ignore[method-assign]
    training.batch_of = broken
    with pytest.raises(KeyboardInterrupt):
        tune(output="two")
    training.batch_of = drawn
    report = tune(output="two")
    seen = {"resumed": report.resumed, "curve": report.curve, "share": held["share"], "processes": report.processes}
    Path(f"seen-{state.process_index}.json").write_text(json.dumps(seen))


def test_two_processes_with_a_part_of_the_model_each_train_as_one_with_all_of_it(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    script = place / "script.py"
    script.write_text(SCRIPT)
    ended = two_processes(script, os.pathsep.join(sys.path), cwd=(place, place), env=FSDP)
    assert [code for code, _, _ in ended] == [0, 0], "".join(errors for _, _, errors in ended)
    alone = tune(output="one")
    for rank in range(2):
        seen = json.loads(Path(f"seen-{rank}.json").read_text())
        assert (seen["resumed"], seen["processes"]) == (BROKEN, 2)
        assert 0.4 < seen["share"] < 0.6
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(seen["curve"][name], alone.curve[name], rtol=1e-4)
    one, two, before = (dp.load(name).state_dict() for name in ("one", "two", "pruned"))
    moved = torch.cat([(one[name] - before[name]).flatten() for name in one])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one])
    assert apart.norm() < 0.01 * moved.norm()
    assert dp.load("two").pruning_plan.sha256 == dp.load("pruned").pruning_plan.sha256


def test_what_splits_in_another_way_is_refused(tmp_path, monkeypatch) -> None:
    first = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(BadInput, match="FSDP 1 flattens the weights; set fsdp_version: 2"):
        check_parallel(first, splitting=True)
    with pytest.raises(BadInput, match="DEEPSPEED splits the model; use multi-GPU or FSDP 2"):
        check_parallel(SimpleNamespace(distributed_type=DistributedType.DEEPSPEED), splitting=True)
    second = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True, mixed_precision="no")
    check_parallel(second, splitting=True)
    monkeypatch.setattr("diffprune_plugin.recovery.finetune.Accelerator", lambda **_: second)
    with pytest.raises(BadInput, match="lora: is not split over processes"):
        make_accelerator(dp.FinetuneConfig.make({**VALUES, "output": "o", "lora": {"rank": 2}}))
