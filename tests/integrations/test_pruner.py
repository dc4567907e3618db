"""One changed import: a script written for torch-pruning's BasePruner, with every argument honoured or refused."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import torch_pruning as tp
from diffusers.models.attention_processor import Attention
from tiny import make_unet, output_of

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.errors import BadInput, MissingGradients
from diffprune_plugin.integrations import torch_pruning_arguments as module

SMALL = Sweep(samples=8, curve_samples=2)
QUICK = {"name": "diff_taylor", "samples": 8, "curve_samples": 2}


def made(unet, importance="magnitude", **arguments) -> dp.Pruner:
    return dp.Pruner(unet, UNET_2D.example_inputs(unet), importance, **{"pruning_ratio": 0.5, **arguments})


def widths(unet) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}


def kept(plan, root: str) -> int:
    group = next(g for g in plan.groups if root in g.layers)
    return group.units - len(group.removed)


def test_one_step_removes_what_make_plan_and_remove_remove() -> None:
    ours, expected = make_unet(), make_unet()
    pruner = made(ours)
    pruner.step()
    plan = dp.make_plan(expected, "magnitude", pruning_ratio=0.5)
    dp.remove_(expected, plan)
    assert pruner.plan.groups == plan.groups
    assert (pruner.plan.layers, pruner.plan.params, pruner.plan.macs) == (plan.layers, plan.params, plan.macs)
    for (name, tensor), other in zip(ours.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("interactive", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_script_with_several_steps_saves_and_reloads_with_difference_0(
    interactive, pipeline, scheduler, images, tmp_path
) -> None:
    unet = pipeline.unet
    calibration = {"scheduler": scheduler, "images": images, "timesteps": 2, "progress": False}
    pruner = made(unet, QUICK, calibration=calibration, iterative_steps=3)
    sizes = []
    for _ in range(pruner.iterative_steps):
        for group in pruner.step(interactive=True) if interactive else [pruner.step()]:
            if interactive:
                group.prune()
        sizes.append(sum(p.numel() for p in unet.parameters()))
        assert torch.isfinite(output_of(unet)).all()
        with torch.no_grad():  # what a user trains between the steps
            unet.conv_out.weight.mul_(1.1)
    assert sizes == sorted(set(sizes), reverse=True)
    assert pruner.plan.params[1] == sizes[-1] == dp.make_plan(make_unet(), "random", pruning_ratio=0.5).params[1]
    assert pruner.plan.criterion == QUICK
    expected = output_of(unet)
    loaded = dp.load(dp.save(pipeline, tmp_path / "pruned"))
    assert torch.equal(output_of(loaded), expected)
    assert loaded.pruning_plan == pruner.plan


def test_groups_can_be_left_out_pruned_in_part_and_kept_for_later(tmp_path) -> None:
    unet = make_unet()
    pruner = made(unet)
    groups = {pruner.DG._module2name[g[0].dep.target.module]: g for g in pruner.step(interactive=True)}
    first, second, third = "mid_block.resnets.0.conv1", "down_blocks.0.resnets.0.conv1", "time_embedding.linear_1"
    groups[third].prune(idxs=[1, 2, 3])
    groups[second].prune()
    groups["conv_in"].prune()
    plan = pruner.plan
    assert [kept(plan, root) for root in (first, second, third)] == [32, 8, 61]
    (line,) = [line for line in plan.shortfalls() if line.startswith(first)]
    assert line == f"{first}: 0 of 16 went: not pruned by the caller of step(interactive=True)"
    expected = output_of(unet)
    assert torch.equal(output_of(dp.load(dp.save(unet, tmp_path / "pruned"))), expected)


def test_channels_removed_behind_the_pruners_back_are_noticed() -> None:
    unet = make_unet()
    groups = made(unet).step(interactive=True)
    next(groups)
    with pytest.raises(BadInput, match=r"has 16 out channels, .* leaves it 32; .*record_history=True"):
        next(group for group in groups if len(group[0].idxs) == 16).prune(record_history=False)


def test_a_calibration_is_used_and_gradients_in_grad_without_one(scheduler, images) -> None:
    ours, expected = make_unet(), make_unet()
    calibration = dp.calibrate(ours, scheduler, images, SMALL, timesteps=2, progress=False)
    pruner = made(ours, "diff_taylor", calibration=calibration)
    pruner.step()
    criterion = dp.importance("diff_taylor", calibration=calibration)
    assert pruner.plan.groups == dp.make_plan(expected, criterion, pruning_ratio=0.5).groups
    with pytest.raises(MissingGradients):
        made(make_unet(), "diff_taylor").step()
    unet = make_unet()
    pruner = made(unet, dp.importance("diff_taylor"), iterative_steps=2)
    for _ in range(2):
        unet.zero_grad()
        unet(**UNET_2D.example_inputs(unet)).sample.square().mean().backward()
        pruner.step()
    assert pruner.plan.params[1] < pruner.plan.params[0] / 2


def test_a_function_calibrates_again_before_each_step(scheduler, images) -> None:
    seen = []
    options = {"scheduler": scheduler, "images": images, "sweep": SMALL, "timesteps": 2, "progress": False}

    def calibration(unet):
        seen.append(sum(p.numel() for p in unet.parameters()))
        return dp.calibrate(unet, **options)

    pruner = made(make_unet(), dp.importance(**QUICK), calibration=calibration, iterative_steps=2)
    pruner.step()
    pruner.step()
    assert len(seen) == 2
    assert seen[0] > seen[1]
    with pytest.raises(BadInput, match="returned a NoneType"):
        made(make_unet(), QUICK, calibration=lambda unet: None).step()
    with pytest.raises(BadInput, match="made for other weights"):
        made(make_unet(), QUICK, calibration=lambda unet: dp.calibrate(make_unet(1), **options)).step()


def test_a_step_that_cannot_be_decided_changes_nothing_and_can_be_tried_again() -> None:
    unet = make_unet()
    before, pruner = widths(unet), made(unet, "diff_taylor")
    with pytest.raises(MissingGradients):
        pruner.step()
    assert widths(unet) == before
    unet(**UNET_2D.example_inputs(unet)).sample.square().mean().backward()
    pruner.step()
    assert pruner.plan.params[1] < pruner.plan.params[0]


def test_steps_beyond_the_last_remove_nothing_and_say_so() -> None:
    unet = make_unet()
    pruner = made(unet)
    pruner.step()
    before = widths(unet)
    for interactive in (False, True):
        with pytest.warns(UserWarning, match="nothing is removed"):
            assert not list(pruner.step(interactive=interactive) or ())
    assert widths(unet) == before


# Every argument of BasePruner.


def test_every_argument_of_this_torch_pruning_is_honoured_renamed_or_refused() -> None:
    known = {*module.HONOURED, *module.RENAMED, *module.REFUSED}
    assert known == set(inspect.signature(tp.pruner.BasePruner).parameters)
    assert not set(module.HONOURED) & set(module.REFUSED)


@pytest.mark.parametrize(
    ("argument", "value"),
    {
        "head_pruning_ratio_dict": {"layer": 0.5},
        "in_channel_groups": {"layer": 2},
        "customized_pruners": {"layer": None},
        "unwrapped_parameters": [1],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_honoured_is_refused_by_name_with_a_remedy(argument, value) -> None:
    assert argument in module.REFUSED
    with pytest.raises(
        BadInput, match=f"^{argument}: .*(leave it out|use torch_pruning's own BasePruner|use head_pruning_ratio)"
    ):
        made(make_unet(), **{argument: value})
    stock = inspect.signature(tp.pruner.BasePruner).parameters[argument].default
    made(make_unet(), **{argument: stock})


def test_the_order_of_the_positional_arguments_is_torch_prunings() -> None:
    unet = make_unet()
    pruner = dp.Pruner(unet, UNET_2D.example_inputs(unet), "magnitude", True, 0.25, {"conv_in": 0.0}, 0.5)
    assert (pruner.global_pruning, pruner.pruning_ratio, pruner.max_pruning_ratio) == (True, 0.25, 0.5)
    pruner.step()
    assert kept(pruner.plan, "conv_in") == 16


@pytest.mark.parametrize("old", ["ch_sparsity", "ch_sparsity_dict", "channel_groups"])
def test_deprecated_names_mean_what_they_meant(old) -> None:
    unet = make_unet()
    layer = unet.mid_block.resnets[0].conv1
    value = {"ch_sparsity": 0.25, "ch_sparsity_dict": {layer: 0.25}, "channel_groups": {layer: 16}}[old]
    with pytest.warns(UserWarning, match=f"{old} is deprecated"):
        pruner = dp.Pruner(unet, UNET_2D.example_inputs(unet), "magnitude", **{old: value})
    pruner.step()
    assert kept(pruner.plan, "mid_block.resnets.0.conv1") == {"channel_groups": 16}.get(old, 24)
    assert kept(pruner.plan, "mid_block.resnets.1.conv1") == {"ch_sparsity": 24}.get(old, 16)


def test_layers_can_be_ignored_as_modules_types_and_names() -> None:
    unet = make_unet()
    ignored = [unet.mid_block, Attention, "time_embedding"]
    pruner = made(unet, ignored_layers=ignored)
    pruner.step()
    groups = {layer: group for group in pruner.plan.groups for layer in group.layers}
    for layer in ("mid_block.resnets.0.conv1", "down_blocks.1.attentions.0.to_q", "time_embedding.linear_1"):
        assert groups[layer].reason.startswith("ignored_layers"), layer
        assert not groups[layer].removed
    assert groups["down_blocks.0.resnets.0.conv1"].removed
    for wrong, words in (
        ([torch.nn.LSTM], "LSTM.* no such layer"),
        ([make_unet().conv_in], "no such layer"),
        ([3], "int"),
    ):
        with pytest.raises(BadInput, match=f"ignored_layers: .*{words}"):
            made(make_unet(), ignored_layers=wrong)


@pytest.mark.parametrize("global_pruning", [False, True])
def test_a_ratio_by_module_or_tuple_of_modules_replaces_the_common_one(global_pruning) -> None:
    unet = make_unet()
    first, second = (resnet.conv1 for resnet in unet.mid_block.resnets)
    with torch.no_grad():
        first.weight.mul_(1e-3)
        unet.mid_block.resnets[0].conv2.weight.mul_(1e-3)
        unet.mid_block.resnets[0].time_emb_proj.weight.mul_(1e-3)
    criterion = tp.importance.GroupMagnitudeImportance(normalizer=None)
    ratios = {(first, second): 0.25, unet.down_blocks[0].resnets[0].conv1: 0.75}
    pruner = made(unet, criterion, pruning_ratio_dict=ratios, global_pruning=global_pruning, pruning_ratio=0.0)
    pruner.step()
    left = [kept(pruner.plan, f"mid_block.resnets.{i}.conv1") for i in range(2)]
    # Locally a quarter of each; together all of it from the weaker layer, as long as one of each norm group stays.
    assert left == ([16, 32] if global_pruning else [24, 24])
    assert kept(pruner.plan, "down_blocks.0.resnets.0.conv1") == 8  # 4 of 16, but one of each of 8 norm groups stays
    with pytest.raises(BadInput, match=r"pruning_ratio: 1.5 is outside"):
        made(make_unet(), pruning_ratio_dict={"conv_in": 1.5})


def test_isomorphic_groups_are_ranked_among_their_like() -> None:
    def left(**arguments) -> dict[str, int]:
        unet = make_unet()
        with torch.no_grad():
            unet.time_embedding.linear_1.weight.mul_(1e-4)
            unet.time_embedding.linear_2.weight.mul_(1e-4)
        criterion = tp.importance.GroupMagnitudeImportance(normalizer=None)
        pruner = made(unet, criterion, global_pruning=True, pruning_ratio=0.25, **arguments)
        pruner.step()
        return {group.root: group.units - len(group.removed) for group in pruner.plan.groups}

    together, apart = left(), left(isomorphic=True)
    assert together["time_embedding.linear_1"] == 1
    assert apart["time_embedding.linear_1"] == 48  # the only group of its shape: a quarter of 64 goes


@pytest.mark.parametrize(("argument", "cap"), [({}, 8), ({"max_pruning_ratio": 0.5}, 16)])
def test_no_group_loses_more_than_max_pruning_ratio(argument, cap) -> None:
    unet = make_unet()
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight.mul_(1e-4)
        unet.mid_block.resnets[0].conv2.weight.mul_(1e-4)
        unet.mid_block.resnets[0].time_emb_proj.weight.mul_(1e-4)
    criterion = tp.importance.GroupMagnitudeImportance(normalizer=None)
    pruner = made(unet, criterion, pruning_ratio=0.2, global_pruning=True, **argument)
    pruner.step()
    assert kept(pruner.plan, "mid_block.resnets.0.conv1") == cap


def test_the_schedule_gives_the_ratio_of_each_step() -> None:
    def early(ratio, steps):
        return [0.0, ratio, ratio]

    pruner = made(make_unet(), iterative_steps=2, iterative_pruning_ratio_scheduler=early)
    pruner.step()
    first = pruner.plan.params[1]
    pruner.step()
    assert pruner.plan.params[1] == first == dp.make_plan(make_unet(), "magnitude", pruning_ratio=0.5).params[1]


@pytest.mark.parametrize("argument", ["num_heads", "out_channel_groups"])
def test_head_dimensions_stay_if_asked_and_other_heads_than_the_models_are_refused(argument) -> None:
    unet = make_unet()
    attention = unet.mid_block.attentions[0]
    pruner = made(unet, prune_head_dims=False, **{argument: {attention.to_q: 4}})
    pruner.step()
    assert attention.to_q.out_features == 32
    assert attention.to_q.in_features == 16
    dense = make_unet()
    with pytest.raises(BadInput, match=r"3 heads asked for mid_block.attentions.0.to_q, which has 4; leave it out"):
        made(dense, **{argument: {dense.mid_block.attentions[0].to_q: 3}})


def test_whole_heads_go_in_steps_and_the_model_reloads(tmp_path) -> None:
    unet = make_unet()
    heads = {"prune_num_heads": True, "head_pruning_ratio": 0.75, "prune_head_dims": False}
    pruner, attention = made(unet, iterative_steps=3, **heads), unet.mid_block.attentions[0]
    left = []
    for _ in range(3):
        pruner.step()
        left.append((attention.heads, attention.to_q.out_features, pruner.num_heads[attention.to_q]))
    assert left == [(3, 24, 3), (2, 16, 2), (1, 8, 1)]
    assert pruner.plan.heads["mid_block.attentions.0"] == (4, 1)
    expected = make_unet()
    dp.remove_(expected, dp.make_plan(expected, "magnitude", pruning_ratio=0.5, head_pruning_ratio=0.75))
    assert widths(unet) == widths(expected)
    loaded = dp.load(dp.save(unet, tmp_path / "pruned"))
    assert torch.equal(output_of(loaded), output_of(unet))


def test_only_groups_with_a_layer_of_the_root_types_are_pruned() -> None:
    pruner = made(make_unet(), root_module_types=[torch.nn.Linear])
    pruner.step()
    groups = {layer for group in pruner.plan.groups if group.removed for layer in group.layers}
    assert "time_embedding.linear_1" in groups
    assert "mid_block.attentions.0.to_q" in groups
    assert "time_embedding.linear_2" in groups
    untouched = made(make_unet(), root_module_types=[torch.nn.ConvTranspose2d])
    untouched.step()
    assert not untouched.plan.groups


def test_the_forward_function_and_output_transform_are_those_that_are_traced() -> None:
    calls = []

    def forward(model, inputs):
        calls.append("forward")
        return model(*inputs)

    def transform(output):
        calls.append("transform")
        return output.sample

    unet = make_unet()
    example = (torch.randn(1, 1, 16, 16), torch.tensor([1]))
    pruner = dp.Pruner(unet, example, "magnitude", forward_fn=forward, output_transform=transform)
    pruner.step()
    assert {*calls} == {"forward", "transform"}
    assert torch.isfinite(output_of(unet)).all()


def test_rounding_is_to_what_is_kept_and_never_removes_more_than_asked() -> None:
    pruner = made(make_unet(), pruning_ratio=0.4, round_to=12)
    pruner.step()
    assert kept(pruner.plan, "time_embedding.linear_1") == 48  # 38 would be kept
    assert kept(pruner.plan, "mid_block.resnets.0.conv1") == 24  # of 32, in 8 norm groups


def test_channels_named_by_hand_go_and_a_ratio_is_refused_there() -> None:
    unet = make_unet()
    pruner, layer = made(unet), unet.mid_block.resnets[0].conv1
    pruner.manual_prune_width(layer, tp.prune_conv_out_channels, list(range(0, 32, 4)))
    group = next(g for g in pruner.plan.groups if g.root == "mid_block.resnets.0.conv1")
    assert group.removed == tuple(range(0, 32, 4))
    assert torch.isfinite(output_of(unet)).all()
    with pytest.raises(BadInput, match=r"manual_prune_width: torch-pruning removes 1 - 0.3"):
        pruner.manual_prune_width(layer, tp.prune_conv_out_channels, 0.3)


def test_a_pruning_history_replayed_on_the_dense_unet_gives_the_same_plan() -> None:
    first = made(make_unet(), iterative_steps=2)
    first.step()
    first.step()
    unet = make_unet()
    second = made(unet)
    second.load_pruning_history(first.pruning_history())
    assert second.plan.removed_units() == first.plan.removed_units()
    torch.testing.assert_close(output_of(unet), output_of(first.model))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"importance": "diff_tailor"}, "unknown criterion 'diff_tailor'; did you mean"),
        ({"importance": {"nam": "magnitude"}}, "unknown criterion ''"),
        ({"prunning_ratio": 0.3}, "did you mean 'pruning_ratio'"),
        ({"pruning_ratio": 1.0}, r"pruning_ratio: 1.0 is outside \[0, 1\)"),
        ({"max_pruning_ratio": 2}, "max_pruning_ratio: 2 is outside"),
        ({"iterative_steps": 0}, "iterative_steps: 0"),
        ({"isomorphic": True}, "isomorphic: .* needs global_pruning=True; add it"),
        ({"pruning_ratio_dict": {"conv_inn": 0.5}}, "did you mean 'conv_in'"),
        ({"num_heads": {torch.nn.Linear(2, 2): 2}}, "2 heads asked for a Linear outside the model"),
        ({"out_channel_groups": {torch.nn.Linear(2, 2): 2}}, "out_channel_groups: a Linear outside the model"),
        ({"head_pruning_ratio": 0.5}, "one has no effect without the other"),
        ({"head_pruning_ratio": 0.5, "prune_num_heads": True}, "add prune_head_dims=False"),
        (
            {"head_pruning_ratio": 1.0, "prune_num_heads": True, "prune_head_dims": False},
            r"head_pruning_ratio: 1.0 is outside \[0, 1\)",
        ),
        ({"importance": {"name": "taylor", "calibration": 3}}, "'calibration' is an argument of its own"),
        ({"calibration": {}}, "calibration: GroupMagnitudeImportance takes none; leave it out"),
        (
            {"importance": "taylor", "calibration": {"scheduler": 1, "imges": 2}},
            "calibration: unknown argument 'imges'",
        ),
        ({"importance": "taylor", "calibration": {"scheduler": 1}}, "calibration: missing argument 'images'"),
        ({"importance": "taylor", "calibration": 3}, "calibration: a int is no Calibration"),
    ],
)
def test_a_wrong_argument_is_one_clear_line_before_anything_happens(arguments, words) -> None:
    unet = make_unet()
    before = widths(unet)
    with pytest.raises(BadInput, match=words):
        made(unet, **{"importance": "magnitude", **arguments})
    assert widths(unet) == before


def test_one_calibration_for_several_steps_is_refused_and_so_is_one_that_the_importance_did_not_ask_for(
    scheduler, images
) -> None:
    unet = make_unet()
    calibration = dp.calibrate(unet, scheduler, images, SMALL, timesteps=2, progress=False)
    with pytest.raises(BadInput, match="after a removal it is stale, and iterative_steps is 2; give the arguments"):
        made(unet, "diff_taylor", calibration=calibration, iterative_steps=2)
    with pytest.raises(BadInput, match="samples 1024, but calibrated with 8; calibrate again"):
        made(unet, dp.importance("diff_taylor"), calibration=calibration).step()


def test_a_pruned_unet_and_a_model_without_an_adapter_are_refused() -> None:
    unet = make_unet()
    made(unet).step()
    with pytest.raises(BadInput, match="model: pruned already"):
        made(unet)
    with pytest.raises(BadInput, match="no adapter for Linear"):
        dp.Pruner(torch.nn.Linear(2, 2), torch.randn(1, 2), "magnitude")


def test_a_frozen_unet_in_training_mode_is_pruned_like_any_other() -> None:
    unet = make_unet().train().requires_grad_(False)
    pruner = made(unet)
    pruner.step()
    assert unet.training
    assert pruner.plan.params == dp.make_plan(make_unet(), "magnitude", pruning_ratio=0.5).params


def test_partial_functions_calibrate_too(scheduler, images) -> None:
    calibration = functools.partial(
        dp.calibrate, scheduler=scheduler, images=images, sweep=SMALL, timesteps=2, progress=False
    )
    pruner = made(make_unet(), QUICK, calibration=calibration)
    pruner.step()
    assert pruner.plan.params[1] < pruner.plan.params[0]
