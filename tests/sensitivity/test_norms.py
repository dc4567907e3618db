"""What norms over fewer channels do to those that stay, against the norm itself run over what is left."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny import make_unet
from torch import nn
from torch.nn.functional import group_norm

from diffprune_plugin.graph.groups import CoupledGroup, Member, trace_groups
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.sensitivity.linear import measure_sensitivity
from diffprune_plugin.sensitivity.norms import Norms
from diffprune_plugin.sensitivity.sensitivity import Sensitivity

SAMPLES, CHANNELS, PARTS, SIDE, PROBES = 6, 16, 4, 5, 3


def inputs() -> torch.Tensor:
    """Channels of different size, which differ from sample to sample."""
    torch.manual_seed(0)
    sizes = torch.rand(SAMPLES, CHANNELS, 1, 1) + 0.2
    return torch.randn(SAMPLES, CHANNELS, SIDE, SIDE) * sizes + torch.randn(SAMPLES, CHANNELS, 1, 1)


def measured(norm: nn.GroupNorm, x: torch.Tensor, probes: torch.Tensor) -> tuple[Norms, dict[str, np.ndarray]]:
    """One norm as a model, its moments, and its products in the mean over probes and samples."""
    model = nn.Sequential(OrderedDict(norm=norm))
    norms = Norms(model, ("norm",))
    sums = norms.empty(SAMPLES)
    with norms.noting(), torch.no_grad():
        for batch in x.split(4):
            model(batch)
    for rows in torch.arange(SAMPLES).split(4):
        for probe in probes:
            with norms.watched() as products:
                (model(x[rows]) * probe[rows]).sum().backward()
            sums["norm"][rows] += products["norm"]
    return norms, {name: (total / (SAMPLES * PROBES)).numpy() for name, total in sums.items()}


def by_hand(norm: nn.GroupNorm, x: torch.Tensor, probes: torch.Tensor, stay: list[int], refitted: bool) -> float:
    """The squared change of v . y by each channel that stays, with the norm run over these alone."""
    weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
    before = group_norm(x.double(), PARTS, weight, bias, norm.eps)[:, stay]
    size = CHANNELS // PARTS
    runs = [[channel for channel in stay if channel // size == part] for part in range(PARTS)]
    after = [group_norm(x[:, run].double(), 1, weight[run], bias[run], norm.eps) for run in runs]
    change = torch.cat(after, 1) - before
    for channel in range(len(stay) if refitted else 0):
        rows = torch.stack([before[:, channel].flatten(), torch.ones(SAMPLES * SIDE * SIDE)], 1)
        fit = torch.linalg.lstsq(rows, change[:, channel].flatten()).solution
        change[:, channel] -= (rows @ fit).view(SAMPLES, SIDE, SIDE)
    return sum(float((change * v[:, stay]).sum((2, 3)).square().sum()) for v in probes) / (SAMPLES * PROBES)


@pytest.mark.parametrize("refitted", [True, False])
@pytest.mark.parametrize("first", [0, 8])  # of the channels that the group has of the norm; others are another group's
def test_the_error_of_each_count_is_that_of_the_norm_run_over_what_is_left(first: int, refitted: bool) -> None:
    x, probes = inputs(), torch.randn(PROBES, SAMPLES, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    norm = nn.GroupNorm(PARTS, CHANNELS)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    norms, products = measured(norm, x, probes)
    mine = np.arange(first, CHANNELS)
    parts, size = len(mine) // 4, 4
    group = CoupledGroup("root", len(mine), 1, parts, (Member("norm", "out", mine, mine - first),), None)
    scores = np.random.default_rng(2).random(len(mine))
    found = norms.errors(group, scores, products, refitted)
    assert found.shape == (size,)
    assert found[0] == 0
    order = np.argsort(scores.reshape(parts, size), 1)
    for gone in range(1, size):
        lost = (order[:, :gone] + size * np.arange(parts)[:, None]).flatten() + first
        stay = sorted(set(range(CHANNELS)) - set(lost.tolist()))
        assert found[gone] == pytest.approx(by_hand(norm, x, probes, stay, refitted), rel=1e-4)


def test_a_sensitivity_has_it_for_each_group_with_norms_and_adds_it_to_what_goes(images: np.ndarray) -> None:
    unet, options = make_unet(), {"samples": 4, "probes": 2, "batch_size": 2, "progress": False}
    found = measure_sensitivity(unet, DDPMScheduler(num_train_timesteps=20), images, **options)
    groups = {group.root: group for group in trace_groups(unet, find_adapter(unet))}
    for norms in (found.norms, found.norms_alone):
        assert {root for root, values in norms.items() if values} == {r for r, group in groups.items() if group.normed}
    group = groups["mid_block.resnets.0.conv1"]
    assert len(found.norms[group.root]) == group.units // group.parts
    assert min(found.norms_alone[group.root][1:]) > 0
    units = range(group.parts)
    without = dataclasses.replace(found, norms={})
    added = found.error(group.root, units) - without.error(group.root, units)
    assert added == pytest.approx(found.norms[group.root][1] / math.sqrt(1 - group.parts / group.units))
    assert found.unrefitted().norms == found.norms_alone != found.norms


def test_between_two_counts_of_a_part_it_is_in_proportion_and_beyond_the_last_as_there() -> None:
    facts: Any = {"power": 1.0, "samples": 1, "probes": 1, "seed": 0, "weights": "", "images": "", "scheduler": {}}
    found = Sensitivity({"conv": (0.0,) * 6}, norms={"conv": (0.0, 1.0, 4.0)}, **facts)
    told = [found.error("conv", range(count)) * math.sqrt((6 - count) / 6) for count in range(6)]
    assert told == pytest.approx([0, 0.5, 1, 2.5, 4, 4])
