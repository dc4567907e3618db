"""The plan: exact counts, honest about what it could not do, and JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import make_unet, output_of
from tiny_transformers import make as make_transformer
from torch import nn

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.graph.costs import layer_costs, meta_copy
from diffprune_plugin.graph.groups import CoupledGroup, Member
from diffprune_plugin.planning.channels import AskedGroup, Request, plan_group
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.planning.planner import check_patterns, material_of
from diffprune_plugin.plugins import find_adapter


def group_of(units: int, parts: int, pairs: int = 1) -> CoupledGroup:
    channels = np.arange(units * pairs)
    return CoupledGroup("layer", units * pairs, pairs, parts, (Member("layer", "out", channels, channels),), None)


def kept(units: int, parts: int, requested: int, round_to: int = 1) -> int:
    item = AskedGroup(group_of(units, parts), Request(), np.arange(float(units)))
    plan = plan_group(item, requested, PlanOptions(round_to=round_to))
    return plan.units - len(plan.removed)


@pytest.mark.parametrize(
    ("units", "parts", "requested", "round_to", "left"),
    [
        (128, 32, 39, 1, 96),  # floor(39 / 32) = 1 of 4 from each norm group
        (256, 32, 77, 1, 192),
        (256, 1, 77, 1, 179),
        (128, 32, 6, 1, 128),  # less than one a group
        (320, 32, 160, 16, 160),  # where torch-pruning's own round_to removes nothing
        (320, 32, 160, 8, 160),  # ... or four fifths
        (96, 4, 29, 8, 72),
        (10, 1, 10, 1, 1),  # one channel has to stay
        (20, 4, 10, 8, 16),
    ],
)
def test_counts_follow_the_published_rule_and_rounding_never_removes_more_than_asked(
    units, parts, requested, round_to, left
) -> None:
    assert kept(units, parts, requested, round_to) == left


def test_each_part_loses_its_own_lowest_channels() -> None:
    item = AskedGroup(group_of(6, 2), Request(), np.array([5.0, 1.0, 2.0, 8.0, 7.0, 9.0]))
    assert plan_group(item, 2, PlanOptions()).removed == (1, 4)


def test_paired_halves_go_together() -> None:
    assert group_of(4, 1, pairs=2).closed([1, 3]).tolist() == [1, 3, 5, 7]


def test_a_plan_made_twice_is_the_same_and_does_not_touch_the_model(unet) -> None:
    before = output_of(unet)
    first, again = (dp.make_plan(unet, "magnitude") for _ in range(2))
    assert first == again
    assert first.sha256 == again.sha256
    assert torch.equal(output_of(unet), before)
    assert type(unet).__name__ == "UNet2DModel"


def test_a_frozen_unet_is_pruned_like_any_other_and_stays_frozen(unet) -> None:
    expected = dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
    unet.requires_grad_(False)
    assert dp.make_plan(unet, "magnitude", pruning_ratio=0.5).sha256 == expected.sha256
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def test_params_and_macs_are_those_of_the_pruned_model(unet) -> None:
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
    dp.remove_(unet, plan)
    after = dp.make_plan(make_unet(), "magnitude", pruning_ratio=0.0)
    assert after.params[0] == after.params[1] == plan.params[0]
    assert sum(p.numel() for p in unet.parameters()) == plan.params[1]
    shrunk = {name: size.after for name, size in plan.layers.items()}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Conv2d) and name in shrunk:
            assert (module.in_channels, module.out_channels) == shrunk[name]


def test_ignored_layers_keep_their_group_and_say_why(unet) -> None:
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5, ignored_layers=["mid_block", "{re}time_embedding.*"])
    groups = {layer: group for group in plan.groups for layer in group.layers}
    assert not groups["mid_block.resnets.0.conv1"].removed
    assert groups["mid_block.resnets.0.conv1"].reason == "ignored_layers: mid_block"
    assert not groups["time_embedding.linear_1"].removed
    trunk = groups["mid_block.resnets.0.conv2"]
    assert "coupled to mid_block" in trunk.reason
    assert groups["conv_in"].removed


def test_a_ratio_by_pattern_replaces_the_common_one(unet) -> None:
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.25, pruning_ratio_dict={"*.resnets.*.conv1": 0.5})
    groups = {group.root: group for group in plan.groups}
    assert len(groups["mid_block.resnets.0.conv1"].removed) == 16
    assert len(groups["time_embedding.linear_1"].removed) == 16


def test_patterns_that_ask_different_things_of_one_group_are_refused(unet) -> None:
    with pytest.raises(BadInput, match="give it one ratio"):
        dp.make_plan(unet, "magnitude", pruning_ratio_dict={"conv_in": 0.5, "down_blocks.0.resnets.0.conv2": 0.2})


def test_global_pruning_ranks_all_groups_together(unet) -> None:
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight.mul_(1e-3)
        unet.mid_block.resnets[0].conv2.weight.mul_(1e-3)
        unet.mid_block.resnets[0].time_emb_proj.weight.mul_(1e-3)
    criterion = dp.importance("magnitude")
    criterion.normalizer = None
    plan = dp.make_plan(unet, criterion, pruning_ratio=0.2, global_pruning=True)
    groups = {group.root: len(group.removed) / group.units for group in plan.groups}
    assert groups["mid_block.resnets.0.conv1"] == 0.75  # one channel of each norm group has to stay
    assert groups["mid_block.resnets.1.conv1"] < 0.75
    asked = sum(g.requested for g in plan.groups)
    total = sum(g.units for g in plan.groups if g.requested or not g.reason)
    assert asked / total == pytest.approx(0.2, abs=0.05)


def test_what_could_not_go_is_reported_and_an_error_if_strict(unet) -> None:
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.1)
    (line, *_) = [line for line in plan.shortfalls() if line.startswith("conv_in")]
    assert line == "conv_in: 0 of 2 went: 8 norm groups or heads lose equally many: 8 at a time"
    with pytest.raises(CheckFailed, match=r"strict: .*conv_in: 0 of 2"):
        dp.make_plan(unet, "magnitude", pruning_ratio=0.1, strict=True)
    assert not dp.make_plan(unet, "magnitude", pruning_ratio=0.5, strict=True).shortfalls()
    assert not dp.make_plan(unet, "magnitude", pruning_ratio=0.6, round_to=8, strict=True).shortfalls()


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_outside_its_range_is_refused(unet, ratio) -> None:
    with pytest.raises(BadInput, match=r"outside \[0, 1\)"):
        dp.make_plan(unet, "magnitude", pruning_ratio=ratio)


def test_a_pattern_that_matches_nothing_offers_the_nearest_layer(unet) -> None:
    with pytest.raises(BadInput, match="did you mean 'conv_in'"):
        dp.make_plan(unet, "magnitude", ignored_layers=["conv_inn"])
    with pytest.raises(BadInput, match="no valid expression"):
        dp.make_plan(unet, "magnitude", ignored_layers=["{re}("])


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda group: torch.ones(3), r"shape \(3,\), not"),
        (lambda group: None, "shape None"),
        (lambda group: torch.full((len(group[0].idxs),), -1.0), "negative or not finite"),
        (lambda group: torch.full((len(group[0].idxs),), float("nan")), "negative or not finite"),
        (lambda group: torch.ones(len(group[0].idxs), dtype=torch.complex64), "complex"),
        (lambda group: [1.0] * len(group[0].idxs), "with a list, not a tensor"),
        (lambda group: np.ones(len(group[0].idxs)), "with a ndarray, not a tensor"),
        (lambda group: {}["two\nlines"], r"failed on \S+: KeyError: 'two.*lines'$"),
    ],
)
def test_a_criterion_that_scores_nonsense_is_named(unet, score, words) -> None:
    with pytest.raises(CheckFailed, match=words) as caught:
        dp.make_plan(unet, score)
    assert str(caught.value).startswith("test_plan.<lambda> ")
    assert "\n" not in str(caught.value)


def test_a_group_whose_norms_have_no_common_step_stays_and_the_rest_is_pruned(unet) -> None:
    """A norm of 3 groups over 48 channels, 32 and 16 of two groups that norms of 8 groups divide too."""
    unet.up_blocks[0].resnets[1].norm1 = torch.nn.GroupNorm(3, 48)
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
    stay = {group.units: group.reason for group in plan.groups if "up_blocks.0.resnets.1.norm1" in group.layers}
    assert stay == {n: f"its norm groups and heads call for 24 equal parts of {n} channels" for n in (16, 32)}
    assert sum(bool(group.removed) for group in plan.groups) > 10
    dp.remove_(unet, plan)
    assert output_of(unet).shape == (2, 1, 16, 16)


@pytest.mark.parametrize("given", ["prunning_ratio", "ratio"])  # a slip, and a word of the name
def test_an_unknown_option_offers_the_nearest(unet, given) -> None:
    with pytest.raises(BadInput, match=f"make_plan: unknown key '{given}'; did you mean 'pruning_ratio'"):
        dp.make_plan(unet, "magnitude", **{given: 0.5})


def test_what_a_criterion_asks_for_is_checked_like_an_option(unet) -> None:
    criterion = dp.importance("magnitude")
    criterion.round_to = 0
    with pytest.raises(BadInput, match=r"GroupMagnitudeImportance: round_to: 0 is outside \[1, 65536\]"):
        dp.make_plan(unet, criterion)


def test_the_plan_survives_json_and_alteration_is_noticed(unet, tmp_path) -> None:
    path = tmp_path / "plan.json"
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
    plan.write(path)
    assert PruningPlan.read(path) == plan
    content = json.loads(path.read_text())
    next(group for group in content["groups"] if group["removed"])["removed"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="altered since it was written"):
        PruningPlan.read(path)
    path.write_text('{"format": 1}')
    with pytest.raises(BadInput, match="not a pruning plan"):
        PruningPlan.read(path)
    with pytest.raises(BadInput, match="no such file"):
        PruningPlan.read(tmp_path / "nothing.json")


def test_a_meta_copy_has_the_structure_and_no_data(unet) -> None:
    copied = meta_copy(unet)
    assert {p.device.type for p in copied.parameters()} == {"meta"}
    assert {p.device.type for p in unet.parameters()} == {"cpu"}
    assert [p.shape for p in copied.parameters()] == [p.shape for p in unet.parameters()]


def test_example_inputs_are_seeded_and_of_the_asked_size(unet) -> None:
    first, again = (UNET_2D.example_inputs(unet, batch=3, size=(8, 4)) for _ in range(2))
    assert first["sample"].shape == (3, 1, 8, 4)
    assert torch.equal(first["sample"], again["sample"])
    assert first["timestep"].tolist() == [1, 2, 3]


def test_macs_are_counted_with_prompts_as_long_as_the_data_have() -> None:
    model = make_transformer("SD 3")
    adapter, prompts = find_adapter(model), {"encoder_hidden_states": torch.zeros(3, 5, 24)}
    usual, short = layer_costs(model, adapter), material_of(PlanOptions(), model, "magnitude", extra=prompts).costs
    of = {name: (usual[name].after(0, 0).macs, short[name].after(0, 0).macs) for name in usual}
    text, image = of["context_embedder"], of["pos_embed.proj"]
    assert 5 * text[0] == 333 * text[1] > 0
    assert image[0] == image[1] > 0
    wrong = {"encoder_hidden_states": torch.zeros(3, 5)}  # told later, by name
    assert layer_costs(model, adapter, wrong) == usual


def test_where_nothing_is_traced_the_plan_is_the_same_and_what_it_leaves_can_be_trained(unet) -> None:
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
    with torch.inference_mode():
        assert dp.make_plan(unet, "magnitude", pruning_ratio=0.5, strict=True) == plan
        dp.remove_(unet, plan)
    assert not any(parameter.is_inference() for parameter in unet.parameters())


def test_modes_and_what_is_frozen_are_left_as_they_were(unet) -> None:
    unet.train().requires_grad_(False)
    unet.mid_block.eval()
    unet.conv_out.requires_grad_(True)
    modes = {name: module.training for name, module in unet.named_modules()}
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
    assert {name: module.training for name, module in unet.named_modules()} == modes
    dp.remove_(unet, plan)
    assert [name for name, p in unet.named_parameters() if p.requires_grad] == ["conv_out.weight", "conv_out.bias"]


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (nn.BatchNorm2d(32), "channels of a BatchNorm2d cannot be removed"),
        (nn.ConvTranspose2d(32, 32, 1), "channels of a ConvTranspose2d cannot be removed"),
        (nn.Conv2d(32, 32, 3, padding=1, groups=4), "channels of a Conv2d with groups cannot be removed"),
        (nn.Conv2d(32, 32, 3, padding=1, groups=32), "channels of a Conv2d with groups cannot be removed"),
    ],
)
def test_a_layer_that_could_not_be_rebuilt_is_refused_unless_it_stays(unet, layer, told) -> None:
    unet.mid_block.resnets[0].norm2 = layer
    with pytest.raises(BadInput, match=rf"mid_block\.resnets\.0\.norm2: {told}; add '.*' to ignored_layers"):
        dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5, ignored_layers=["mid_block.resnets.0"])
    assert "mid_block.resnets.0.norm2" not in plan.layers


def test_a_pattern_without_weights_and_heads_that_are_not_there_are_refused() -> None:
    unet = make_unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False)
    with pytest.raises(BadInput, match="ignored_layers: 'conv_act' matches no layer with weights, only conv_act"):
        check_patterns(unet, PlanOptions(ignored_layers=("conv_act",)))
    with pytest.raises(BadInput, match=r"head_pruning_ratio: 0\.5 no attention of this UNet2DModel could lose a head"):
        dp.make_plan(unet, "magnitude", pruning_ratio=0.0, head_pruning_ratio=0.5)
