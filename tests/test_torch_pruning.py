"""The importance in torch-pruning's own pruner, for people who drive it themselves."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from tiny import make_unet, output_of

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.errors import MissingGradients
from diffprune_plugin.timesteps import Sweep

SMALL = Sweep(samples=8, curve_samples=2)


@pytest.mark.parametrize("kwargs", [{}, {"global_pruning": True}, {"global_pruning": True, "isomorphic": True}])
@pytest.mark.parametrize("name", ["diff_taylor", "magnitude", "random"])
def test_the_stock_pruner_takes_the_importance(name, kwargs, scheduler, images) -> None:
    unet = make_unet()
    options = {}
    if name == "diff_taylor":
        options["calibration"] = dp.calibrate(unet, scheduler, images, SMALL, timesteps=2, progress=False)
    heads = {
        unet.get_submodule(layer): parts
        for layer, parts in UNET_2D.equal_parts(unet).items()
        if layer.split(".")[-1].startswith("to_")
    }
    pruner = tp.pruner.BasePruner(
        unet,
        UNET_2D.example_inputs(unet),
        importance=dp.importance(name, **options),
        pruning_ratio=0.5,
        ignored_layers=[unet.conv_out],
        num_heads=dict(heads),
        in_channel_groups={},
        out_channel_groups={},
        **kwargs,
    )
    before = sum(p.numel() for p in unet.parameters())
    pruner.step()
    UNET_2D.mend_(unet)
    assert sum(p.numel() for p in unet.parameters()) < before
    assert torch.isfinite(output_of(unet)).all()


def test_gradients_accumulated_by_the_user_are_used_without_a_calibration() -> None:
    unet = make_unet()
    output = unet(**UNET_2D.example_inputs(unet)).sample
    output.square().mean().backward()
    plan = dp.make_plan(unet, dp.importance("diff_taylor"), pruning_ratio=0.5)
    assert plan.params[1] < plan.params[0]


def test_after_a_removal_the_old_calibration_is_refused_with_the_remedy(scheduler, images) -> None:
    unet = make_unet()
    calibration = dp.calibrate(unet, scheduler, images, SMALL, timesteps=2, progress=False)
    criterion = dp.importance("diff_taylor", calibration=calibration)
    layer = unet.mid_block.resnets[0].conv1
    graph = tp.DependencyGraph().build_dependency(unet, UNET_2D.example_inputs(unet))
    graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(8))).prune()
    group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(24)))
    with pytest.raises(MissingGradients, match="calibrate again after each removal"):
        criterion(group)
