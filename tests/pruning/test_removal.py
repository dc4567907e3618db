"""Removal against two oracles: torch-pruning's own, and what the surviving weights must be."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from tiny import make_unet, output_of

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.groups import removed_channels, trace_groups


def replay_with_torch_pruning(unet, plan) -> None:
    """The same roots and channels through torch-pruning's groups, one after the other, as its history does."""
    graph = tp.DependencyGraph().build_dependency(unet, UNET_2D.example_inputs(unet))
    for group in trace_groups(copy.deepcopy(unet), UNET_2D):
        roots = group.closed(plan.removed_units()[group.root]).tolist()
        if roots:
            layer = unet.get_submodule(group.root)
            pruner = graph.get_pruner_of_module(layer)
            graph.get_pruning_group(layer, pruner.prune_out_channels, roots).prune()


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("changes", [{}, {"resnet_time_scale_shift": "scale_shift"}], ids=["default", "scale_shift"])
def test_removal_keeps_exactly_the_weights_that_torch_prunings_replay_keeps(ratio, changes) -> None:
    ours, theirs = make_unet(**changes), make_unet(**changes)
    plan = dp.make_plan(ours, "magnitude", pruning_ratio=ratio)
    dp.remove_(ours, plan)
    replay_with_torch_pruning(theirs, plan)
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        if "to_q" not in name:  # ours keeps the dense softmax scale
            assert torch.equal(tensor, expected[name]), name


def test_the_report_says_what_was_done(unet) -> None:
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
    report = dp.remove_(unet, plan)
    assert report.params == plan.params
    assert report.layers == len(plan.layers) > 10


def test_a_pruned_head_keeps_the_attention_logits_of_its_surviving_dimensions() -> None:
    """Zero the removed dimensions of the dense queries and keys: the logits have to be those of the pruned model."""
    unet = make_unet()
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
    name = "mid_block.attentions.0"
    dense = copy.deepcopy(unet.get_submodule(name))
    gone = removed_channels(trace_groups(unet, UNET_2D), plan.removed_units())
    dp.remove_(unet, plan)
    pruned = unet.get_submodule(name)
    inputs = torch.tensor([i for i in range(32) if i not in gone[(f"{name}.to_q", "in")]])
    hidden = torch.zeros(1, 5, 32)
    hidden[..., inputs] = torch.randn(1, 5, len(inputs))
    dimensions = torch.from_numpy(gone[(f"{name}.to_q", "out")])

    def logits(attention, x, removed=None):
        query, key = attention.to_q(x), attention.to_k(x)
        if removed is not None:
            query[..., removed] = 0
        size = query.shape[-1] // attention.heads
        split = [t.view(5, attention.heads, size).transpose(0, 1) for t in (query[0], key[0])]
        return split[0] @ split[1].transpose(1, 2) / size**0.5

    with torch.no_grad():
        expected, actual = logits(dense, hidden, dimensions), logits(pruned, hidden[..., inputs])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        for parameter in pruned.to_q.parameters():  # negative control: without the correction they differ
            parameter.div_((4 / 8) ** 0.5)
        assert (logits(pruned, hidden[..., inputs]) - expected).abs().max() > 0.01


def test_nothing_removed_leaves_the_output_as_it_was(unet) -> None:
    before = output_of(unet)
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.0))
    assert torch.equal(output_of(unet), before)


def test_a_plan_of_another_architecture_and_a_second_removal_are_refused(unet) -> None:
    plan = dp.make_plan(unet, "magnitude")
    with pytest.raises(BadInput, match="another architecture"):
        dp.remove_(make_unet(block_out_channels=(16, 48)), plan)
    dp.remove_(unet, plan)
    with pytest.raises(BadInput, match="pruned already"):
        dp.remove_(unet, plan)


def test_a_plan_that_names_channels_that_are_not_there_is_refused(unet) -> None:
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.5)
    first = plan.groups[0].model_copy(update={"removed": (999,)})
    with pytest.raises(BadInput, match="removes unit 999"):
        dp.remove_(unet, plan.model_copy(update={"groups": (first, *plan.groups[1:])}))
    other = plan.groups[0].model_copy(update={"units": 7})
    with pytest.raises(BadInput, match="the plan has 7 units"):
        dp.remove_(unet, plan.model_copy(update={"groups": (other, *plan.groups[1:])}))
