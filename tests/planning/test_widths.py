"""`round_to: auto`: the widths that keep a runtime's kernels, against the conditions of the kernels themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_plan import group_of

import diffprune_plugin as dp
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.groups import CoupledGroup
from diffprune_plugin.planning.allocated import widths
from diffprune_plugin.planning.channels import AskedGroup, Request, plan_group
from diffprune_plugin.planning.options import PlanOptions

ROOT = Path(__file__).parents[2]
CUDA = {"provider": "cuda", "dtype": "fp16"}


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from size import widths as suite

    return suite


def item(units: int, parts: int = 1, pairs: int = 1, normed: bool = False) -> AskedGroup:
    group = group_of(units, parts, pairs)
    kind = type("Group", (CoupledGroup,), {"normed": normed})
    return AskedGroup(
        kind(*(getattr(group, f) for f in group.__dataclass_fields__)), Request(), np.arange(float(units))
    )


@pytest.mark.parametrize(
    ("group", "runtime", "requested", "left", "step"),
    [
        (item(320, 32, normed=True), "cuda-fp16", 96, 256, 64),  # an even number in each of 32 norm groups
        (item(320, 32, normed=True), "cpu-fp32", 96, 224, 32),
        (item(320, 8), "cuda-fp16", 96, 256, 64),  # heads of 40: 32
        (item(640, 5), "cuda-fp32", 192, 480, 160),  # heads in eights, layers in warps
        (item(358), "cuda-fp16", 100, 264, 8),
        (item(1280, pairs=2), "cuda-fp16", 384, 896, 8),
        (item(1280, pairs=2), "cuda-fp16-fused", 384, 1280, 1280),
        (item(5120, pairs=2), "cuda-fp16-fused", 3000, 2560, 1280),
        (item(100, pairs=2), "cuda-fp16-fused", 30, 72, 8),  # never had that kernel
        (item(320, 10), "tensorrt-fp16", 96, 240, 80),
    ],
)
def test_the_step_of_a_group_is_what_its_kernels_ask(group: AskedGroup, runtime, requested, left, step) -> None:
    plan = plan_group(group, requested, PlanOptions.make({"round_to": runtime}))
    assert plan.units - len(plan.removed) == left
    assert plan.step == step
    assert requested - len(plan.removed) < step
    assert f"round_to {runtime}" in plan.reason or requested == len(plan.removed)


def test_an_allocation_chooses_among_the_listed_widths_alone() -> None:
    plans = widths(item(5120, pairs=2), PlanOptions.make({"round_to": "cuda-fp16-fused"}), 0.75)
    assert [plan.units - len(plan.removed) for plan in plans] == [5120, 2560, 1280]


def test_auto_is_the_runtime_of_the_latency_of_a_config() -> None:
    for latency, runtime in (({}, "cpu-fp32"), (CUDA, "cuda-fp16"), ({**CUDA, "fuse": True}, "cuda-fp16-fused")):
        config = PruningConfig.make({"model": "m", "round_to": "auto", "latency": latency})
        assert config.round_to == runtime
        assert PruningConfig.make(config.model_dump()).round_to == runtime


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"round_to": "cuda-fp61"}, "round_to: 'cuda-fp61': no multiple, and no runtime: one of cpu-fp32"),
        ({"round_to": True}, "round_to: True: input should be a valid integer"),
        ({"round_to": 65537}, r"round_to: 65537 is outside \[1, 65536\]"),
        ({"round_to": "auto", "latency": {"dtype": "fp16"}}, "round_to: auto: 'cpu-fp16'.*: not one of cpu-fp32"),
        (
            {"latency": {"provider": "openvino", "fuse": True}},
            "fuse: true: .* are for provider: cpu or cuda",
        ),
    ],
)
def test_what_no_runtime_has_is_refused(keys, words) -> None:
    with pytest.raises(BadInput, match=words):
        PruningConfig.make({"model": "m", **keys})


def test_make_plan_has_no_latency_that_auto_could_stand_for(unet) -> None:
    with pytest.raises(BadInput, match="auto is for a config, whose latency names the runtime; here name it: one of"):
        dp.make_plan(unet, "magnitude", round_to="auto")


def check(suite: Any, name: str, runtime: str, ratio: float) -> None:
    plan, before, after = suite.planned(name, runtime, ratio)
    kept = () if runtime.endswith("fused") else ("BiasSplitGelu",)
    assert not [key for key in before if before[key] and not after[key] and key[0] not in kept]
    assert all(group.requested - len(group.removed) < group.step for group in plan.groups)


def test_no_kernel_of_the_cifar_model_is_lost_and_without_it_some_are(suite) -> None:
    check(suite, "ddpm-cifar10-32", "cuda-fp16-fused", 0.3)
    _, before, after = suite.planned("ddpm-cifar10-32", None)
    assert suite.lost(before, after) == "11 GroupNorm, 18 attention, 24 tensor cores"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl-base", "ddpm-cifar10-32"])
def test_no_kernel_of_a_real_size_is_lost(name, suite) -> None:
    for runtime in ("cuda-fp16", "cuda-fp16-fused"):
        for ratio in (0.3, 0.5):
            check(suite, name, runtime, ratio)
