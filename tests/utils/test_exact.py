"""Float32 that is exact for a while, and what is regressed and compared in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import make_unet

import diffprune_plugin as dp
from diffprune_plugin.export.verify import Subject
from diffprune_plugin.recovery import equations, ridge
from diffprune_plugin.recovery.compensate import compensate_
from diffprune_plugin.sensitivity.redundancy import Correlations
from diffprune_plugin.utils.exact import exact_float32

EXACT = ["ieee"] * 4


def precisions() -> list[str]:
    backends = torch.backends
    rows = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
    return [str(row.fp32_precision) for row in rows]


@pytest.fixture(params=["highest", "high", "medium", "new"])
def coarse(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """As a user's script may have set it, by the old switch or a new one; what each backend has then."""
    if request.param == "new":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision(request.param)
    yield precisions()
    torch.set_float32_matmul_precision("highest")


def test_what_the_process_had_is_there_again_after_an_error_too(coarse: list[str]) -> None:
    with exact_float32():
        inside = precisions()
    with pytest.raises(KeyError), exact_float32():
        raise KeyError
    assert inside == EXACT
    assert precisions() == coarse


def test_regressions_are(coarse: list[str], images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (seen.append(precisions()), function(*given))[1]

    monkeypatch.setattr(ridge, "ROWS", 256)
    places = (equations.NormalEquations, "add"), (equations.HeldOut, "error"), (equations, "solved")
    for where, name in places:
        monkeypatch.setattr(where, name, watched(getattr(where, name)))
    dense = make_unet()
    smaller, plan = copy.deepcopy(dense), dp.make_plan(dense, "magnitude", pruning_ratio=0.5)
    dp.remove_(smaller, plan)
    compensate_(smaller, dense, plan, DDPMScheduler(num_train_timesteps=100), images, samples=8, progress=False)
    Correlations().add("layer", SimpleNamespace(float=lambda: (seen.append(precisions()), torch.ones(3, 2))[1]))  # type: ignore[arg-type]
    assert len(seen) > len(places)
    assert all(each == EXACT for each in seen)


def test_the_reference_of_an_export_is(coarse: list[str]) -> None:
    adapter: Any = SimpleNamespace(sample="sample", timestep="timestep", denoise=lambda model, inputs: precisions())
    inputs = {"sample": torch.zeros(2, 1), "timestep": torch.zeros(1)}
    assert Subject(torch.nn.Identity(), adapter, None).denoise(inputs) == EXACT
