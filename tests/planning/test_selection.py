"""Targets, whole heads, families and bounds: what is asked of the groups, and what they lose."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from test_plan import group_of
from tiny import make_unet, output_of
from tiny_conditional import SD
from tiny_conditional import make_unet as make_conditional

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.planning.channels import AskedGroup, Request, select
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.target import nearest_to
from diffprune_plugin.plugins import find_adapter


@pytest.mark.parametrize("key", ["macs_target", "params_target"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.85])
def test_a_target_is_met_within_one_percent(key, share) -> None:
    unet = make_unet(block_out_channels=(64, 128))
    plan = dp.make_plan(unet, "magnitude", **{key: share})
    before, after = plan.macs if key == "macs_target" else plan.params
    assert after / before == pytest.approx(share, rel=0.01)
    assert plan.target == {key: share}
    assert not plan.shortfalls()
    dp.remove_(unet, plan)
    assert sum(p.numel() for p in unet.parameters()) == plan.params[1]


def test_a_target_that_the_steps_do_not_allow_is_reported_and_an_error_if_strict(unet) -> None:
    plan = dp.make_plan(unet, "magnitude", macs_target=0.55, round_to=16)
    assert plan.shortfalls()[-1].startswith("macs_target: asked 0.55, got 0.")
    with pytest.raises(CheckFailed, match=r"macs_target: asked 0\.55"):
        dp.make_plan(unet, "magnitude", macs_target=0.55, round_to=16, strict=True)


def test_a_target_out_of_reach_says_how_far_the_settings_go(unet) -> None:
    with pytest.raises(BadInput, match=r"params_target: 0.1 is below 0\.\d+, all that these settings can reach"):
        dp.make_plan(unet, "magnitude", params_target=0.1, max_pruning_ratio=0.25)


def test_groups_of_one_width_jump_together_but_a_target_lets_only_some_of_them() -> None:
    """Two equal groups of 4 channels in 2 parts: sizes 8, 4 and nothing between, unless one of them jumps alone."""
    other = dataclasses.replace(group_of(4, 2), root="other")
    items = [
        AskedGroup(other, Request(), np.array([5.0, 9, 9, 9])),
        AskedGroup(group_of(4, 2), Request(), np.array([1.0, 9, 9, 9])),
    ]
    assert {sum(len(g.removed) for g in select(items, r / 10, PlanOptions())) for r in range(10)} == {0, 4}
    _, plans = nearest_to(6, items, PlanOptions(), lambda plans: 8 - sum(len(g.removed) for g in plans))
    assert [len(plan.removed) for plan in plans] == [0, 2]  # the second loses the lower share of its score


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pruning_ratio": 0.3, "macs_target": 0.5}, "pruning_ratio 0.3 and macs_target 0.5 ask for different things"),
        ({"params_target": 0.5, "macs_target": 0.5}, "macs_target 0.5 and params_target 0.5 ask"),
        ({"macs_target": 1.5}, r"macs_target: 1.5 is outside \(0, 1\]"),
        ({"macs_target": "45%"}, r"macs_target: '45%': input should be a valid number in \(0, 1\]"),
        ({"ignored_layers": "conv_in"}, r"ignored_layers: 'conv_in': input should be a list, as in \['conv_in'\]"),
        ({"max_pruning_ratio": 0}, "max_pruning_ratio: 0 is outside"),
        ({"head_pruning_ratio": 1.0}, "head_pruning_ratio: 1.0 is outside"),
        ({"isomorphic": True}, "needs global_pruning: true"),
        ({"halves": "both"}, "halves: 'both' is none of together, apart"),
    ],
)
def test_what_contradicts_itself_is_refused(options, words) -> None:
    with pytest.raises(BadInput, match=words):
        PlanOptions.make(options)


def test_no_group_loses_more_than_the_bound_and_the_plan_names_it(unet) -> None:
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5, max_pruning_ratio=0.25)
    assert max(len(group.removed) / group.units for group in plan.groups) == 0.25
    assert all("max_pruning_ratio 0.25" in line for line in plan.shortfalls())
    assert len(plan.shortfalls()) > 5


def test_families_are_ranked_apart() -> None:
    """A family whose scores are all tiny loses everything in a common ranking, and its share in one of its own."""
    unet = make_unet()
    attention = [f"mid_block.attentions.0.{name}" for name in ("to_q", "to_k", "to_v")]
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith((".to_q", ".to_k", ".to_v")):
                module.weight.mul_(1e-3)
    criterion = dp.importance("magnitude")
    criterion.normalizer = None
    lost = {}
    for isomorphic in (False, True):
        plan = dp.make_plan(unet, criterion, pruning_ratio=0.25, global_pruning=True, isomorphic=isomorphic)
        groups = [g for g in plan.groups if set(g.layers) & set(attention)]
        lost[isomorphic] = max(len(g.removed) / g.units for g in groups)
    assert lost[False] == 0.875  # a dimension of each head has to stay
    assert lost[True] < 0.6


def test_whole_heads_go_together_from_queries_keys_and_values() -> None:
    """The oracle: the dense UNet with the removed heads' values at zero."""
    unet = make_unet(attention_head_dim=8)
    masked = copy.deepcopy(unet)
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.0, head_pruning_ratio=0.5)
    assert plan.heads == dict.fromkeys(plan.heads, (4, 2))
    assert len(plan.heads) == 4
    assert not plan.shortfalls()
    removed = {layer: group.removed for group in plan.groups for layer in group.layers if group.removed}
    for name in plan.heads:
        assert removed[f"{name}.to_q"] == removed[f"{name}.to_v"]
        masked.get_submodule(f"{name}.to_v").weight.data[list(removed[f"{name}.to_v"])] = 0
        masked.get_submodule(f"{name}.to_v").bias.data[list(removed[f"{name}.to_v"])] = 0
    dp.remove_(unet, plan)
    assert unet.mid_block.attentions[0].heads == 2
    torch.testing.assert_close(output_of(unet), output_of(masked), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [make_unet, lambda: make_conditional(SD)], ids=["UNet2DModel", "conditional"])
def test_a_model_without_some_heads_reloads_with_difference_0(make, tmp_path) -> None:
    unet = make()
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.3, head_pruning_ratio=0.5)
    dp.remove_(unet, plan)
    dp.save(unet, tmp_path / "pruned")
    loaded = dp.load(tmp_path / "pruned")
    inputs = find_adapter(unet).example_inputs(unet)
    with torch.no_grad():
        assert torch.equal(unet(**inputs).sample, loaded(**inputs).sample)


def test_less_than_one_head_is_reported(unet) -> None:
    plan = dp.make_plan(unet, "magnitude", head_pruning_ratio=0.1)
    heads = [group for group in plan.groups if group.root.endswith("to_v")]
    assert all(len(group.removed) == 8 for group in heads)  # C - int(C (1 - ratio)) of 4 heads: one goes
    kept = dp.make_plan(unet, "magnitude", head_pruning_ratio=0.0)
    assert "one of 4 heads is more than was asked" in next(g for g in kept.groups if g.root.endswith("to_v")).reason


@pytest.mark.parametrize(
    ("options", "asked", "gone", "reason"),
    [
        ({"head_pruning_ratio": 0.9}, 4, 3, "one head has to stay: 8 at a time"),
        ({"head_pruning_ratio": 0.5, "max_pruning_ratio": 0.25}, 2, 1, "max_pruning_ratio 0.25: 8 at a time"),
        ({"head_pruning_ratio": 0.25, "round_to": 16}, 1, 0, "round_to 16: 8 at a time"),
        ({"head_pruning_ratio": 0.75, "round_to": 16}, 3, 2, "round_to 16: 8 at a time"),
        ({"head_pruning_ratio": 0.9, "round_to": 8}, 4, 3, "one head has to stay: 8 at a time"),
        ({"head_pruning_ratio": 0.5}, 2, 2, ""),
    ],
)
def test_heads_that_were_asked_and_stay_are_counted_with_the_reason(options, asked, gone, reason) -> None:
    unet = make_unet(attention_head_dim=8)
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.0, **options)
    heads = [group for group in plan.groups if group.root.endswith(("to_q", "to_k", "to_v")) and group.units == 32]
    assert len(heads) > 3
    for group in heads:
        assert (group.requested, len(group.removed), group.reason) == (8 * asked, 8 * gone, reason)
        assert group.short == (gone < asked)
    if gone < asked:
        with pytest.raises(CheckFailed, match="strict: "):
            dp.make_plan(unet, "magnitude", pruning_ratio=0.0, strict=True, **options)


def test_halves_ranked_apart_leave_a_pair_only_where_both_stay() -> None:
    item = AskedGroup(group_of(100, 1, pairs=2), Request(), np.arange(100.0))
    (together,) = select([item], 0.3, PlanOptions())
    (apart,) = select([item], 0.3, PlanOptions(halves="apart"))
    assert (len(together.removed), len(apart.removed)) == (30, 51)
    assert dp.importance("diff_taylor", preset="ldm").halves == "apart"


def test_an_attention_with_an_ignored_layer_keeps_all_its_heads(unet) -> None:
    plan = dp.make_plan(unet, "magnitude", head_pruning_ratio=0.5, ignored_layers=["mid_block.attentions.0.to_v"])
    assert "mid_block.attentions.0" not in plan.heads
    assert len(plan.heads) == 3
    kept = [group for group in plan.groups if group.root.startswith("mid_block.attentions.0.to_")]
    assert kept
    assert not any(group.removed for group in kept if "to_out" not in group.root)


def test_a_ratio_for_a_layer_whose_whole_heads_go_is_refused(unet) -> None:
    with pytest.raises(BadInput, match="head_pruning_ratio takes whole heads; drop one"):
        dp.make_plan(unet, "magnitude", head_pruning_ratio=0.5, pruning_ratio_dict={"*.to_v": 0.2})


def test_among_equal_scores_a_common_ranking_takes_no_more_than_asked() -> None:
    """All scores equal: the ratio of all units goes, where a limit with "at most" would take every one."""
    items = [AskedGroup(dataclasses.replace(group_of(10, 1), root=f"{i}"), Request(), np.ones(10)) for i in range(2)]
    plans = select(items, 0.3, PlanOptions(global_pruning=True))
    assert sum(len(plan.removed) for plan in plans) == 6
