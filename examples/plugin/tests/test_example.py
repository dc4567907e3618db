"""How a plugin's author tests it: with the checks of diffprune_plugin.testing."""

import pytest
import torch
from diffprune_example import GatedUNet
from diffprune_example.adapter import GATED_UNET
from diffprune_example.fisher import Fisher

import diffprune_plugin as dp
from diffprune_plugin.errors import MissingGradients
from diffprune_plugin.testing.adapters import check_adapter
from diffprune_plugin.testing.criteria import check_criterion


def test_the_criterion_keeps_its_promises():
    check_criterion("fisher_example")
    check_criterion(Fisher(), GatedUNet())


def test_the_table_holds_all_that_the_unet_needs_and_no_more():
    check_adapter(GATED_UNET, GatedUNet(sample_size=8, in_channels=2, out_channels=3))


def test_the_score_is_the_squared_derivative_by_a_mask_on_the_channel():
    unet = GatedUNet().eval()
    mask = torch.ones(32, requires_grad=True)
    unet.middle.conv1.register_forward_hook(lambda _, __, out: out * mask[:, None, None])
    unet.middle.time.register_forward_hook(lambda _, __, out: out * mask)
    unet(**GATED_UNET.example_inputs(unet)).sample.square().mean().backward()
    seen = {}

    def spy(group):
        seen[group._DG._module2name[group[0].dep.target.module]] = score = Fisher()(group)
        return score

    for module in (unet.middle.conv1, unet.middle.time):
        module._forward_hooks.clear()
    dp.make_plan(unet, spy)
    torch.testing.assert_close(seen["middle.conv1"], mask.grad.square(), rtol=1e-3, atol=1e-9)


def test_without_gradients_the_layer_is_named():
    with pytest.raises(MissingGradients, match="has no gradient of its shape; calibrate"):
        dp.make_plan(GatedUNet(), "fisher_example")
