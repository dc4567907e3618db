"""MACs against torch's own counter, before and after a removal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from tiny_transformers import MODELS, make
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffprune_plugin as dp
from diffprune_plugin.graph.costs import layer_costs, total_macs
from diffprune_plugin.plugins import find_adapter

ATTENTION = ("bmm", "baddbmm", "scaled_dot_product")


def counted(model: Any) -> int:
    """The MACs of all attention products in a forward of one sample."""
    inputs = find_adapter(model).example_inputs(model)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    flops = counter.get_flop_counts()["Global"]
    return sum(count for op, count in flops.items() if any(name in str(op) for name in ATTENTION)) // 2


def products(model: Any) -> int:
    costs = layer_costs(model, find_adapter(model)).values()
    return sum(cost.products * cost.channels_out for cost in costs)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_attention_products_of_transformers_are_those_that_torch_counts(name: str) -> None:
    model = make(name)
    dense = products(model)
    assert dense == counted(model) > 0
    plan = dp.make_plan(model, "magnitude", pruning_ratio=0.5)
    dp.remove_(model, plan)
    assert products(model) == counted(model)
    assert products(model) < dense or not any(plan.heads)
    # A norm that all heads share is applied once a head, which the plan does not know.
    assert plan.macs[1] == pytest.approx(total_macs(model, find_adapter(model)), rel=5e-3)


@pytest.mark.parametrize("name", ["DiT", "PixArt sigma"])
def test_attention_products_are_counted_without_torchs_own_attention_too(name: str) -> None:
    model = make(name)
    expected = products(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    assert products(model) == expected == counted(model)
