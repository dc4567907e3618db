"""The published repairs that the benchmarks compare with, against their formulas the long way round."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny import make_unet
from torch import Tensor, nn

import diffprune_plugin as dp

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from shared import rivals

    return rivals


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Weights (outputs, channels, taps), inputs (rows, channels), channels that stay."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    rows = torch.randn(50, 6, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(3, 6, 2, generator=generator, dtype=torch.float64), rows, torch.tensor([0, 2, 3, 5])


def test_grail_rebuilds_each_channel_by_ridge_regression(rivals: Any, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, rows, kept = problem
    found = rivals.by_ridge(weight, rows.T @ rows / len(rows), kept)
    ridge = rivals.RIDGE * rows[:, kept].square().mean()
    padded = torch.cat([rows[:, kept], (ridge * len(rows)).sqrt() * torch.eye(len(kept), dtype=rows.dtype)])
    for output in range(3):
        for tap in range(2):
            expected = torch.zeros(len(kept), dtype=rows.dtype)
            for channel in range(6):  # its own regression, with the ridge as further rows
                wanted = torch.cat([rows[:, channel], torch.zeros(len(kept), dtype=rows.dtype)])
                expected += weight[output, channel, tap] * torch.linalg.lstsq(padded, wanted).solution
            torch.testing.assert_close(found[output, :, tap], expected)


def test_the_surgeon_finds_the_least_error_of_what_stays(rivals: Any, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, rows, kept = problem
    moments = rows.T @ rows / len(rows)
    damped = moments + rivals.DAMPING * moments.diagonal().mean() * torch.eye(6, dtype=rows.dtype)
    found = rivals.by_surgeon(weight, moments, kept)
    new = torch.zeros_like(weight)
    new[:, kept] = found
    slope = torch.einsum("oct,cd->odt", new - weight, damped)[:, kept]
    torch.testing.assert_close(slope, torch.zeros_like(slope))  # where the damped error has no slope left
    new[0, kept[0]] += 0.1  # and elsewhere it has
    assert torch.einsum("oct,cd->odt", new - weight, damped)[:, kept].abs().max() > 0.01


def test_a_channel_that_repeats_another_is_no_loss_to_either(rivals: Any) -> None:
    rows = torch.randn(40, 4, dtype=torch.float64)
    rows[:, 3] = rows[:, 1]
    weight, kept, moments = torch.randn(2, 4, 1, dtype=torch.float64), torch.arange(3), rows.T @ rows / 40
    plain = rivals.error(weight, weight[:, kept], moments, kept)
    for update in (rivals.by_ridge, rivals.by_surgeon):
        assert rivals.error(weight, update(weight, moments, kept), moments, kept) < 1e-3 * plain


@pytest.mark.parametrize(("way", "kinds"), [("obs_linear", {nn.Linear}), ("grail", {nn.Linear, nn.Conv2d})])
def test_only_weights_behind_the_cuts_change_and_by_their_layers_inputs(
    rivals: Any, images: np.ndarray, way: str, kinds: set[type]
) -> None:
    dense = make_unet()
    plan = dp.make_plan(dense, "magnitude", pruning_ratio=0.5)
    before = copy.deepcopy(dense)
    dp.remove_(before, plan)
    after = copy.deepcopy(before)
    scheduler = DDPMScheduler(num_train_timesteps=100)
    report = rivals.WAYS[way](after, dense, plan, scheduler, images, samples=16, seed=0)
    new = {name for name, value in after.named_parameters() if not value.equal(before.get_parameter(name))}
    changed = {name.removesuffix(".weight") for name in new}
    assert changed == {repair.layers[0] for repair in report.repairs}
    assert {type(after.get_submodule(name)) for name in changed} == kinds
    assert all(repair.after <= repair.before for repair in report.repairs)
    assert "conv_in" not in changed
