"""The checks for plugin authors: what is right passes, and each planted fault is named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffprune_example import GatedUNet
from diffprune_example.adapter import GATED_UNET
from tiny import make_unet

from diffprune_plugin.adapters.table import Heads, Mirror, Pairs, Port
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.testing.adapters import check_adapter
from diffprune_plugin.testing.criteria import check_criterion


def norms(group: Any) -> torch.Tensor:
    """Length of the root layer's filters: a criterion without a fault."""
    return group[0].dep.target.module.weight.detach().flatten(1).norm(dim=1)


def touching(change: Any) -> Any:
    """A criterion that does something to the root layer first."""

    def score(group: Any) -> torch.Tensor:
        change(group[0].dep.target.module)
        return norms(group)

    return score


@pytest.mark.parametrize("name", ["diff_taylor", "magnitude", "fisher", "taylor_absolute"])
def test_the_built_in_criteria_pass(name) -> None:
    check_criterion(name)


def test_a_criterion_that_does_not_look_at_the_weights_passes_without_equivariance() -> None:
    check_criterion("random", equivariant=False)
    with pytest.raises(CheckFailed, match="RandomImportance is not permutation-equivariant"):
        check_criterion("random")


FAULTS: dict[str, tuple[Any, str]] = {
    "type": (lambda group: [1.0], "with a list, not a tensor"),
    "nothing": (lambda group: None, "with a NoneType, not a tensor"),
    "shape": (lambda group: norms(group)[1:], r"conv_out with shape \(2,\), not \(3,\)"),
    "finite": (lambda group: norms(group) / 0, "not finite"),
    "negative": (lambda group: norms(group) - 1, "with a negative value"),
    "device": (lambda group: norms(group).to("meta"), "on meta, but its weights are on cpu"),
    "whole numbers": (lambda group: norms(group).long(), "in torch.int64"),
    "dtype": (lambda group: norms(group).half(), "in torch.float16, but its weights are torch.float32"),
    "another dtype": (lambda group: torch.from_numpy(norms(group).numpy()), "in torch.bfloat16: TypeError"),
    "permutation": (lambda group: torch.arange(len(group[0].idxs)).float(), "is not permutation-equivariant"),
    "random": (lambda group: torch.rand(len(group[0].idxs)), "differently the second time"),
    "weights": (touching(lambda layer: layer.weight.data.mul_(2)), "changed the model: .*weight"),
    "gradients": (touching(lambda layer: layer.weight.grad.zero_()), "changed the model: gradient of"),
    "frozen": (touching(lambda layer: layer.requires_grad_(False)), "changed the model: requires_grad of"),
    "mode": (touching(lambda layer: layer.train()), "changed the model: training mode of"),
}


@pytest.mark.parametrize(("criterion", "words"), FAULTS.values(), ids=FAULTS)
def test_each_fault_of_a_criterion_is_named(criterion, words) -> None:
    with pytest.raises(CheckFailed, match=words):
        check_criterion(criterion)


def test_a_criterion_without_a_fault_passes_and_the_users_unet_is_left_alone() -> None:
    unet = make_unet()
    check_criterion(norms, unet)
    check_criterion("taylor", unet)
    assert all(p.grad is None for p in unet.parameters())


# Adapters: GatedUNet's table, which its own tests show to be right, with one row wrong at a time.


def gated() -> GatedUNet:
    return GatedUNet(sample_size=8, in_channels=2, out_channels=3)


ROW = {field: getattr(GATED_UNET, field) for field in ("inputs", "outputs", "keep", "heads", "pairs", "mirrors")}
LABELS = Port("labels", "batch", torch.int64)
TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"heads": ()}, "change places: those of attention"),
    "another query": ({"heads": (dataclasses.replace(ROW["heads"][0], query="value"),)}, "removal of dead channels"),
    "no pairs": ({"pairs": ()}, "live and die together"),
    "no mirror": ({"mirrors": ()}, "AssertionError"),
    "nothing kept": ({"keep": ()}, "those of conv_out have an effect"),
    "nothing to keep": ({"keep": ("conv_last",)}, "matches no layer"),
    "no timestep": ({"inputs": ROW["inputs"][:1]}, "a forward pass: TypeError"),
    "an input too many": ({"inputs": (*ROW["inputs"], LABELS)}, "a forward pass: TypeError"),
    "another output": ({"outputs": (Port("out", "batch {in_channels} height width"),)}, r"not \(2, 2, 8, 8\)"),
    "a superfluous mirror": ({"mirrors": (*ROW["mirrors"], Mirror("Gated", "width", "proj.in_channels"))}, "'width'"),
    "superfluous pairs": ({"pairs": (*ROW["pairs"], Pairs("GEGLU", "proj", 2))}, "nothing fails without Pairs"),
    "superfluous heads": ({"heads": (*ROW["heads"], Heads("Attention", "heads", ("q",), "q", "s"))}, "fails without H"),
    "a superfluous word": ({"words": (("sequence", 4),)}, "nothing fails without .*sequence"),
}


@pytest.mark.parametrize(("changes", "words"), TABLES.values(), ids=TABLES)
def test_each_fault_of_a_table_is_named(changes, words, monkeypatch) -> None:
    table = dataclasses.replace(GATED_UNET, **changes)
    monkeypatch.setattr("diffprune_plugin.testing.adapters.check_reload", lambda adapter, unet: None)
    with pytest.raises(CheckFailed, match=f"GatedUNet: .*{words}"):
        check_adapter(table, gated(), export=False)


def test_a_table_that_is_not_the_registered_one_is_named(monkeypatch) -> None:
    other = dataclasses.replace(GATED_UNET, processors=("Mine",))
    with pytest.raises(CheckFailed, match="another adapter is registered for GatedUNet"):
        check_adapter(other, gated(), export=False)
    monkeypatch.setattr("diffprune_plugin.plugins.adapters", lambda plugins: {})
    with pytest.raises(CheckFailed, match="GatedUNet is not registered: no adapter for GatedUNet"):
        check_adapter(GATED_UNET, gated(), export=False)


def test_a_unet_that_forgets_something_when_saved_is_named(monkeypatch) -> None:
    class Sub(GatedUNet):
        """No adapter of its own: its base class's fits, but nobody can find it by name."""

    with pytest.raises(CheckFailed, match=r"saved, but not loaded: .*Sub is a class of your own"):
        check_adapter(GATED_UNET, Sub(sample_size=8), export=False)
    forward = GatedUNet.forward
    monkeypatch.setattr(
        GatedUNet, "forward", lambda self, *a, **k: (forward(self, *a, **k)[0] * getattr(self, "gain", 1),)
    )
    unet = gated()
    unet.gain = 2
    with pytest.raises(CheckFailed, match="the reloaded model gives other outputs"):
        check_adapter(GATED_UNET, unet, export=False)


@pytest.mark.slow
def test_a_model_that_exports_differently_is_named(monkeypatch) -> None:
    forward = GatedUNet.forward
    monkeypatch.setattr(
        GatedUNet,
        "forward",
        lambda self, *a, **k: (forward(self, *a, **k)[0] * (2 if torch.compiler.is_compiling() else 1),),
    )
    with pytest.raises(CheckFailed, match="GatedUNet: the ONNX file misses"):
        check_adapter(GATED_UNET, gated())


def test_no_unet_at_all_is_refused() -> None:
    with pytest.raises(BadInput, match="give at least one"):
        check_adapter(GATED_UNET)


@pytest.mark.slow
def test_the_built_in_table_passes_on_unets_that_use_all_of_it() -> None:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")}
    blocks |= {"up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
    resampling = {"downsample_type": "resnet", "upsample_type": "resnet", "block_out_channels": (16, 32, 32), **blocks}
    plain = make_unet(sample_size=8, out_channels=4)
    special = make_unet(sample_size=8, num_class_embeds=10, resnet_time_scale_shift="scale_shift", **resampling)
    others = ({"time_embedding_type": "fourier"}, {"class_embed_type": "timestep"}, {"class_embed_type": "identity"})
    check_adapter(UNET_2D, plain, special, *(make_unet(sample_size=8, **changes) for changes in others))
    with pytest.raises(CheckFailed, match="nothing fails without"):
        check_adapter(UNET_2D, plain, export=False)
