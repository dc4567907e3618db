"""The importance in torch-pruning's own pruner, and each thing that pruner gets wrong on UNets beside ours."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch_pruning as tp
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from tiny import make_unet, output_of

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.adapters.unet_2d_condition import UNET_2D_CONDITION
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.errors import BadInput, MissingGradients
from diffprune_plugin.graph.groups import trace_groups

SMALL = Sweep(samples=8, curve_samples=2)
BLOCKS = {"block_out_channels": (80,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
ATTENTION = "mid_block.attentions.0"


def stock(unet: Any, importance: Any = "magnitude", adapter: Any = UNET_2D, **arguments: Any) -> Any:
    """torch-pruning's own pruner, told what the adapter knows."""
    told = adapter.torch_pruning_kwargs(unet) | {"pruning_ratio": 0.5} | arguments
    criterion = dp.importance(importance) if isinstance(importance, str) else importance
    return tp.pruner.BasePruner(unet, adapter.example_inputs(unet), importance=criterion, **told)


def ours(unet: Any, importance: Any = "magnitude", adapter: Any = UNET_2D, **arguments: Any) -> dp.Pruner:
    return dp.Pruner(unet, adapter.example_inputs(unet), importance, **{"pruning_ratio": 0.5, **arguments})


def params(unet: Any) -> int:
    return sum(p.numel() for p in unet.parameters())


def make_condition_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32,),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    ).eval()


# The importance object in the stock pruner.


@pytest.mark.parametrize("kwargs", [{}, {"global_pruning": True}, {"global_pruning": True, "isomorphic": True}])
@pytest.mark.parametrize("name", ["diff_taylor", "magnitude", "random"])
def test_the_stock_pruner_takes_the_importance(name, kwargs, scheduler, images) -> None:
    unet = make_unet()
    options = {}
    if name == "diff_taylor":
        options["calibration"] = dp.calibrate(unet, scheduler, images, SMALL, timesteps=2, progress=False)
    before = params(unet)
    stock(unet, dp.importance(name, **options), **kwargs).step()
    UNET_2D.mend_(unet)
    assert params(unet) < before
    assert torch.isfinite(output_of(unet)).all()


@pytest.mark.parametrize("kwargs", [{}, {"global_pruning": True}, {"global_pruning": True, "isomorphic": True}])
def test_the_stock_pruner_goes_in_steps_with_a_calibration_between_them(kwargs, scheduler, images) -> None:
    unet = make_unet()
    criterion = dp.importance("diff_taylor")
    pruner = stock(unet, criterion, iterative_steps=3, **kwargs)
    sizes = [params(unet)]
    for _ in range(3):
        criterion.calibration = dp.calibrate(unet, scheduler, images, SMALL, timesteps=2, progress=False)
        pruner.step()
        UNET_2D.mend_(unet)
        sizes.append(params(unet))
        assert torch.isfinite(output_of(unet)).all()
    assert sizes == sorted(set(sizes), reverse=True)


def test_the_stock_pruner_takes_the_importance_on_a_conditional_unet() -> None:
    unet = make_condition_unet()
    stock(unet, adapter=UNET_2D_CONDITION).step()
    UNET_2D_CONDITION.mend_(unet)
    assert torch.isfinite(unet(**UNET_2D_CONDITION.example_inputs(unet)).sample).all()


def test_gradients_accumulated_by_the_user_are_used_without_a_calibration() -> None:
    unet = make_unet()
    output = unet(**UNET_2D.example_inputs(unet)).sample
    output.square().mean().backward()
    plan = dp.make_plan(unet, dp.importance("diff_taylor"), pruning_ratio=0.5)
    assert plan.params[1] < plan.params[0]


def test_after_a_removal_the_old_calibration_is_refused_with_the_remedy(scheduler, images) -> None:
    unet = make_unet()
    calibration = dp.calibrate(unet, scheduler, images, SMALL, timesteps=2, progress=False)
    pruner = stock(unet, dp.importance("diff_taylor", calibration=calibration), iterative_steps=2)
    pruner.step()
    with pytest.raises(MissingGradients, match="calibrate again after each removal"):
        pruner.step()


# What the stock pruner gets wrong on UNets: its result, then ours.


@pytest.mark.parametrize(("round_to", "stock_keeps"), [(None, 40), (8, 16), (16, 80)])
def test_trap_round_to_beside_a_group_norm(round_to, stock_keeps) -> None:
    """Asked for half of 80 channels in 8 norm groups."""
    unet, layer = make_unet(**BLOCKS), "down_blocks.0.resnets.0.conv1"
    stock(unet, round_to=round_to).step()
    assert unet.get_submodule(layer).out_channels == stock_keeps  # four fifths gone, or nothing, in silence
    unet = make_unet(**BLOCKS)
    ours(unet, round_to=round_to).step()
    assert unet.get_submodule(layer).out_channels == {None: 40, 8: 40, 16: 48}[round_to]


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
def test_trap_geglu_halves_ranked_apart(ratio) -> None:
    """Of 128 paired channels the stock pruner keeps far fewer than asked, or all; with the adapter's groups exactly."""
    asked = int(128 * (1 - ratio))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net"
    kept = {}
    for key, arguments in {"stock": {"out_channel_groups": {}}, "told": {}}.items():
        unet = make_condition_unet()
        stock(unet, adapter=UNET_2D_CONDITION, pruning_ratio=ratio, **arguments).step()
        kept[key] = unet.get_submodule(f"{name}.2").in_features
    unet = make_condition_unet()
    ours(unet, adapter=UNET_2D_CONDITION, pruning_ratio=ratio).step()
    assert kept["stock"] < asked - 10 or kept["stock"] == 128
    assert kept["told"] == unet.get_submodule(f"{name}.2").in_features == asked
    assert unet.get_submodule(f"{name}.0.proj").out_features == 2 * asked


def test_trap_heads_of_unequal_size() -> None:
    unet = make_unet()
    stock(unet, pruning_ratio=0.3, num_heads={}).step()
    UNET_2D.mend_(unet)
    assert unet.get_submodule(ATTENTION).to_q.out_features % 4
    with pytest.raises(RuntimeError, match="shape"):
        output_of(unet)
    for make in (stock, ours):
        unet = make_unet()
        make(unet, pruning_ratio=0.3).step()
        UNET_2D.mend_(unet)
        assert unet.get_submodule(ATTENTION).to_q.out_features % 4 == 0
        assert torch.isfinite(output_of(unet)).all()


def test_trap_stale_channels_of_resamplers() -> None:
    unet = make_unet()
    stock(unet).step()
    with pytest.raises(AssertionError):
        output_of(unet)
    UNET_2D.mend_(unet)
    assert torch.isfinite(output_of(unet)).all()
    unet = make_unet()
    ours(unet).step()
    assert torch.isfinite(output_of(unet)).all()


def without_half_of_each_head(unet: UNet2DModel) -> None:
    """Make the last half of every head's dimensions of one attention useless: removing them must change nothing."""
    attention: Any = unet.get_submodule(ATTENTION)
    useless = torch.arange(32) % 8 >= 4
    with torch.no_grad():
        for layer in (attention.to_q, attention.to_k, attention.to_v):
            layer.weight[useless] = 0
            layer.bias[useless] = 0
        attention.to_out[0].weight[:, useless] = 0


def test_trap_softmax_temperature_of_pruned_heads() -> None:
    differences = []
    for make in (stock, ours):
        unet = make_unet()
        without_half_of_each_head(unet)
        expected = output_of(unet)
        attention: Any = unet.get_submodule(ATTENTION)
        make(unet, pruning_ratio=0.0, pruning_ratio_dict={attention.to_q: 0.5}).step()
        assert attention.to_q.out_features == 16
        UNET_2D.mend_(unet)
        differences.append((output_of(unet) - expected).abs().max().item())
    assert differences[0] > 1e-3
    assert differences[1] < 1e-6


def test_trap_taylor_does_not_score_norms() -> None:
    scores: dict[str, list[torch.Tensor]] = {"stock": [], "ours": []}
    for scale in (1.0, 100.0):
        unet = make_unet()
        unet(**UNET_2D.example_inputs(unet)).sample.square().mean().backward()
        with torch.no_grad():
            unet.mid_block.resnets[0].norm2.weight.mul_(scale)
        group = next(g for g in trace_groups(unet, UNET_2D) if g.root == "mid_block.resnets.0.conv1").graph_group
        scores["stock"].append(tp.importance.GroupTaylorImportance(normalizer=None)(group))
        scores["ours"].append(dp.importance("diff_taylor", norms=True, normalizer=None)(group))
    assert torch.equal(*scores["stock"])
    assert (scores["ours"][1] > scores["ours"][0]).all()


def test_trap_a_parameter_without_gradient() -> None:
    unet = make_unet()
    unet(**UNET_2D.example_inputs(unet)).sample.square().mean().backward()
    unet.mid_block.resnets[0].conv1.weight.grad = None
    with pytest.raises(AttributeError):
        stock(unet, tp.importance.GroupTaylorImportance()).step()
    with pytest.raises(MissingGradients, match=r"mid_block.resnets.0.conv1.weight has no gradient; pass importance"):
        ours(unet, "diff_taylor").step()


def test_trap_default_dicts_shared_by_all_pruners() -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(tp.pruner.BasePruner).parameters.items()
        if isinstance(parameter.default, dict)
    }
    first, second = make_unet(), make_unet()
    before = {name: dict(shared) for name, shared in defaults.items()}
    try:
        tp.pruner.BasePruner(first, UNET_2D.example_inputs(first), importance=dp.importance("magnitude"))
        other = tp.pruner.BasePruner(second, UNET_2D.example_inputs(second), importance=dp.importance("magnitude"))
        assert first.mid_block.resnets[0].norm1 in other.out_channel_groups
    finally:
        for name, shared in defaults.items():
            shared.clear()
            shared.update(before[name])
    for make in (stock, ours):
        assert all(layer in set(second.modules()) for layer in make(second).out_channel_groups)
    assert {name: dict(shared) for name, shared in defaults.items()} == before
    fresh = UNET_2D.torch_pruning_kwargs(first)
    assert all(value is not UNET_2D.torch_pruning_kwargs(first)[key] for key, value in fresh.items())


def test_trap_types_in_ignored_layers() -> None:
    unet = make_unet()
    stock(unet, ignored_layers=[unet.conv_out, Attention]).step()
    assert unet.get_submodule(ATTENTION).to_q.out_features < 32
    unet = make_unet()
    ours(unet, ignored_layers=[Attention]).step()
    assert unet.get_submodule(ATTENTION).to_q.out_features == 32
    assert params(unet) < params(make_unet())


def test_trap_isomorphic_without_global_pruning() -> None:
    """Of groups whose shape occurs more than once, the stock pruner removes nothing."""
    unet = make_unet()
    stock(unet, isomorphic=True).step()
    inner = [module.conv1.out_channels for module in unet.modules() if type(module).__name__ == "ResnetBlock2D"]
    assert inner == [16, 32, 32, 32, 16, 16, 32, 32]
    with pytest.raises(BadInput, match="needs global_pruning=True; add it"):
        ours(unet, isomorphic=True)


def test_trap_a_layer_that_would_be_emptied_is_skipped() -> None:
    unet, layer = make_unet(), "time_embedding.linear_1"
    stock(unet, pruning_ratio=0.99).step()
    assert unet.get_submodule(layer).out_features == 64  # all of it, in silence
    unet = make_unet()
    pruner = ours(unet, pruning_ratio=0.99)
    pruner.step()
    assert unet.get_submodule(layer).out_features == 1
    assert "conv_in: 8 of 16 went: 8 norm groups or heads lose equally many: 8 at a time" in pruner.plan.shortfalls()
