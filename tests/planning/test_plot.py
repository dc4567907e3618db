"""The picture of a plan: what is drawn, from the drawing itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import make_unet

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.graph.running import execution_order
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.planning.plot import bars, heat_map, levels, plot_widths
from diffprune_plugin.utils.optional import need_pyplot


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    return dp.make_plan(make_unet(), "magnitude", pruning_ratio=0.5)


@pytest.fixture
def axes() -> Any:
    pyplot = need_pyplot()
    figure, axes = pyplot.subplots()
    yield axes
    pyplot.close(figure)


def test_layers_come_in_the_order_of_execution() -> None:
    order = execution_order(make_unet(), UNET_2D)
    names = ["conv_in", "down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.conv1", "up_blocks.1.resnets.1.conv2"]
    assert sorted(names, key=order.index) == names
    assert order.index("conv_out") > order.index(names[-1])


def test_bars_are_the_channels_before_and_after(plan: PruningPlan, axes: Any) -> None:
    bars(axes, plan.groups)
    drawn = [patch.get_width() for patch in axes.patches]
    before = [group.units * group.pairs for group in plan.groups]
    assert drawn[: len(before)] == before
    assert drawn[len(before) :] == [b - len(g.removed) * g.pairs for b, g in zip(before, plan.groups, strict=True)]


def test_the_heat_map_shows_each_width_s_error_and_marks_the_chosen(plan: PruningPlan, axes: Any) -> None:
    errors = {group.root: {0: 0.0} for group in plan.groups}
    group = plan.groups[1]
    errors[group.root] = {0: 0.0, group.units // 2: 3e-3, group.units // 4: 1e-3}
    table = np.ma.filled(heat_map(axes, plan.groups, errors).get_array(), np.nan)
    seen = table[1][~np.isnan(table[1])]
    assert set(seen) == {1e-3, 3e-3}
    assert (np.diff(seen) >= 0).all()
    assert np.isnan(np.delete(table, 1, 0)).all()
    (marks,) = axes.lines
    assert marks.get_xdata()[1] == len(group.removed) / group.units


def test_levels_begin_where_the_block_changes(plan: PruningPlan, tmp_path: Path) -> None:
    order = execution_order(make_unet(), UNET_2D)
    groups = sorted(plan.groups, key=lambda group: order.index(group.root))
    starts = levels(groups)
    assert groups[starts[-1]].root == "conv_out"
    assert all(groups[row].root.split(".")[:2] != groups[row - 1].root.split(".")[:2] for row in starts)
    plot_widths(plan, order, tmp_path / "widths.png")
    assert min(Image.open(tmp_path / "widths.png").size) > 300
