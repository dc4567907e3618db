"""Masks against removal, the oracle: a masked UNet computes, learns and becomes what the pruned one does."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from tiny import make_unet
from tiny_conditional import FAMILIES, RELATIVES
from tiny_conditional import make_unet as make_conditional

import diffprune_plugin as dp
from diffprune_plugin.diffusion.loss import noise_prediction_loss
from diffprune_plugin.errors import BadInput, MissingExtra
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.masked_layers import KEPT, STOCK
from diffprune_plugin.pruning.masks import keep_masks
from diffprune_plugin.pruning.removal import channels_to_go, remove_channels_
from diffprune_plugin.utils.files import LIST_FILE
from diffprune_plugin.utils.tensors import load_tensors, save_tensors

nncf = pytest.importorskip("nncf")
from nncf.torch.function_hook.pruning.magnitude.schedulers import MultiStepMagnitudePruningScheduler  # noqa: E402

MAKERS: dict[str, Callable[[], Any]] = {
    "UNet2DModel": make_unet,
    "scale and shift": lambda: make_unet(resnet_time_scale_shift="scale_shift"),
    "sd 1.5": lambda: make_conditional(FAMILIES["sd 1.5"]),
    "sdxl": lambda: make_conditional(FAMILIES["sdxl"]),
    "class labels": lambda: make_conditional(RELATIVES["class labels"]),
}
PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
SMALL = {  # attention in the middle only: half the time
    "UNet2DModel": lambda: make_unet(**PLAIN, sample_size=8),
    "UNet2DConditionModel": lambda: make_conditional({**FAMILIES["sd 1.5"], **PLAIN}),
}
BOTH = {"UNet2DModel": MAKERS["UNet2DModel"], "UNet2DConditionModel": MAKERS["sd 1.5"]}


def inputs_of(unet: torch.nn.Module, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    return find_adapter(unet).example_inputs(unet, batch=batch, seed=seed)


@torch.no_grad()
def output_of(unet: torch.nn.Module) -> torch.Tensor:
    return unet(**inputs_of(unet)).sample


def plan_for(unet: torch.nn.Module, ratio: float = 0.5) -> dp.PruningPlan:
    return dp.make_plan(unet, "magnitude", pruning_ratio=ratio)


def removed(make: Callable[[], Any], plan: dp.PruningPlan) -> Any:
    unet = make()
    dp.remove_(unet, plan)
    return unet


def masked(make: Callable[[], Any], plan: dp.PruningPlan, **options: Any) -> Any:
    unet = make()
    dp.mask_(unet, plan, **options)
    return unet


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_masked_folded_and_removed_compute_the_same_and_plain_masks_do_not(make) -> None:
    """GEGLU halves, heads, norms over concatenated skips, scale and shift: none of it may tell mask from removal."""
    plan = plan_for(make())
    expected = output_of(removed(make, plan))
    unet = masked(make, plan)
    assert distance(output_of(unet), expected) < 1e-5
    assert dp.fold_(unet).plan is plan
    assert distance(output_of(unet), expected) < 1e-5
    dp.remove_(unet, plan)
    assert distance(output_of(unet), expected) < 1e-5
    assert distance(output_of(masked(make, plan, exact_norms=False)), expected) > 0.01


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_attention_that_loses_whole_heads_keeps_its_scale(make) -> None:
    plan = dp.make_plan(make(), "magnitude", pruning_ratio=0.5, head_pruning_ratio=0.5)
    assert plan.heads
    unet, expected = masked(make, plan), output_of(removed(make, plan))
    assert distance(output_of(unet), expected) < 1e-5
    assert not any(isinstance(layer, KEPT[torch.nn.Linear]) for layer in unet.modules())
    dp.remove_(unet, dp.fold_(unet).plan)
    assert distance(output_of(unet), expected) < 1e-5


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_each_kind_of_exact_layer_is_needed(make) -> None:
    """Put the stock layer of one kind back and the outputs are not those of the removed UNet any more."""
    plan = plan_for(make())
    expected = output_of(removed(make, plan))
    kinds = {type(layer) for layer in masked(make, plan).modules()} & set(STOCK)
    assert kinds == set(KEPT.values()) - ({KEPT[torch.nn.LayerNorm]} if make is make_unet else set())
    for kind in kinds:
        unet = masked(make, plan)
        for layer in unet.modules():
            if type(layer) is kind:
                layer.__class__ = STOCK[kind]
        assert distance(output_of(unet), expected) > 1e-4, kind


def test_norms_over_concatenated_skips_keep_unequal_shares_of_their_groups() -> None:
    """The case that only the regrouped statistics cover: not the same number of channels is kept in each group."""
    unet = masked(make_unet, plan_for(make_unet()))
    norms = [layer for layer in unet.modules() if isinstance(layer, torch.nn.GroupNorm)]
    shares = [torch.bincount(norm.kept * norm.num_groups // norm.num_channels) for norm in norms]
    assert any(len(set(share.tolist())) > 1 for share in shares)


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_the_masks_are_where_removal_cuts(make) -> None:
    """Number every element, remove: what is left is what the masks keep, in its order."""
    unet = make()
    plan, adapter = plan_for(unet), find_adapter(unet)
    gone = channels_to_go(unet, plan, adapter)
    masks = keep_masks(unet, gone)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape))
    whole = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    remove_channels_(unet, gone)
    for name, left in unet.named_parameters():
        expected = whole[name][masks[name]] if name in masks else whole[name]
        assert torch.equal(left.flatten(), expected.flatten()), name


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_nncfs_statistic_is_exactly_the_plans_ratio(make) -> None:
    plan = plan_for(make(), 0.3)
    unet = masked(make, plan)
    before, after = plan.params
    statistic = nncf.pruning_statistic(unet)
    assert statistic.global_pruning_ratio == (before - after) / before
    names = {name for name, _ in unet.named_parameters()}
    assert len(statistic.pruned_tensors) == unet.mask_report.tensors
    assert {tensor.tensor_name for tensor in statistic.pruned_tensors} <= names  # no hook on a name that is not there
    assert type(unet) is type(make())  # and no wrapper around it


def loss_of(unet: torch.nn.Module, seed: int, batch: int = 2) -> torch.Tensor:
    """The noise-prediction loss of smooth random images at random timesteps."""
    inputs = inputs_of(unet, batch, seed)
    noise = inputs.pop("sample")
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(*noise.shape[:2], 4, 4, generator=generator)
    sample = torch.tanh(2 * torch.nn.functional.interpolate(coarse, noise.shape[2:], mode="bilinear"))
    timesteps = torch.randint(0, 100, (batch,), generator=generator)
    inputs.pop("timestep")
    return noise_prediction_loss(unet, DDPMScheduler(100), sample, noise, timesteps, inputs).mean()


def fine_tune(unet: torch.nn.Module, steps: int = 50) -> None:
    """AdamW with weight decay and momentum, the same data in the same order every time."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0.05)
    unet.train()
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(unet, seed).backward()
        optimizer.step()
    unet.eval()


@torch.no_grad()
def held_out_loss(unet: torch.nn.Module) -> float:
    return loss_of(unet, seed=12345, batch=16).item()


@pytest.mark.slow
@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_masked_fine_tuned_then_removed_is_removed_then_fine_tuned(make) -> None:
    plan = plan_for(make())
    pruned = removed(make, plan)
    untrained = held_out_loss(pruned)
    fine_tune(pruned)
    expected = held_out_loss(pruned)
    assert expected < untrained - 0.1  # it learned: the comparison means something
    unet = masked(make, plan)
    fine_tune(unet)
    assert held_out_loss(unet) == pytest.approx(expected, abs=1e-5)
    dp.remove_(unet, dp.fold_(unet).plan)
    assert held_out_loss(unet) == pytest.approx(expected, abs=1e-5)
    for name, parameter in pruned.named_parameters():
        if name.endswith("to_q.weight"):  # trained at its own scale: nothing else tells from dense queries so clearly
            torch.testing.assert_close(unet.get_parameter(name), parameter, rtol=0, atol=1e-4)
    plain = masked(make, plan, exact_norms=False)  # negative control
    fine_tune(plain)
    dp.remove_(plain, dp.fold_(plain).plan)
    assert held_out_loss(plain) > expected + 0.01


@pytest.fixture
def nncfs_strip(monkeypatch: pytest.MonkeyPatch) -> Any:
    """nncf.strip; it imports torchao, which NNCF does not install, for quantizers alone: a stub will do."""
    if not importlib.util.find_spec("torchao"):
        for name in ("torchao", *(f"torchao.quantization.pt2e{part}" for part in ("", ".observer", ".utils"))):
            monkeypatch.setitem(sys.modules, name, MagicMock())
    return nncf.strip


@pytest.mark.parametrize("exact_norms", [True, False])
def test_after_training_folding_is_nncfs_strip_and_the_zeros_are_zeros(exact_norms, nncfs_strip) -> None:
    plan = plan_for(make_unet())
    unet = masked(make_unet, plan, exact_norms=exact_norms)
    masks = keep_masks(make_unet(), channels_to_go(make_unet(), plan, find_adapter(unet)))
    fine_tune(unet, steps=3)
    weight = unet.conv_in.weight
    assert weight[~masks["conv_in.weight"]].abs().min() > 0  # zero in the forward, not in the parameter
    before = output_of(unet)
    theirs = nncfs_strip(unet, strip_format=nncf.StripFormat.IN_PLACE)
    dp.fold_(unet)
    assert torch.equal(output_of(unet), before)
    assert unet.conv_in.weight is weight  # what the optimizer holds
    for name, parameter in unet.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name
        assert (parameter[~masks[name]] == 0).all() if name in masks else True, name
    assert {p.requires_grad for p in unet.parameters()} == {True}
    assert not theirs.conv_in.weight.requires_grad  # the trap in nncf.strip
    left = nncfs_strip(masked(make_unet, plan), example_input=inputs_of(unet))  # ... and the other: its default format
    assert nncf.pruning_statistic(left).global_pruning_ratio > 0.5


def test_folding_leaves_nothing_of_nncf_behind() -> None:
    unet, dense = masked(make_unet, plan_for(make_unet()), exact_norms=False), make_unet()
    dp.fold_(unet)
    assert set(unet.state_dict()) == set(dense.state_dict())
    assert set(vars(unet)) == set(vars(dense))
    with pytest.raises(AttributeError, match="__nncf_hooks"):
        nncf.pruning_statistic(unet)
    with pytest.raises(BadInput, match="not masked"):
        dp.fold_(unet)


def test_a_removal_that_is_refused_leaves_a_folded_model_as_it_was() -> None:
    plan = plan_for(make_unet())
    unet = masked(make_unet, plan)
    dp.fold_(unet)
    before = output_of(unet)
    wrong = plan.groups[0].model_copy(update={"removed": (999,)})
    with pytest.raises(BadInput, match="removes unit 999"):
        dp.remove_(unet, plan.model_copy(update={"groups": (wrong, *plan.groups[1:])}))
    torch.testing.assert_close(output_of(unet), before, rtol=0, atol=1e-5)
    dp.remove_(unet, plan)
    torch.testing.assert_close(output_of(unet), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("exact_norms", [True, False])
def test_nncfs_config_and_the_state_dict_bring_the_masks_back(exact_norms) -> None:
    plan = plan_for(make_unet())
    unet = masked(make_unet, plan, exact_norms=exact_norms)
    fine_tune(unet, steps=2)
    config = json.loads(json.dumps(nncf.torch.get_config(unet)))
    again = make_unet(seed=1)
    if exact_norms:  # which NNCF knows nothing of: the state dict does not load into stock norms in silence
        restored = nncf.torch.load_from_config(make_unet(seed=1), config)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*kept"):
            restored.load_state_dict(unet.state_dict())
    dp.mask_(again, plan, exact_norms=exact_norms, register=False)
    nncf.torch.load_from_config(again, config).load_state_dict(unet.state_dict())
    assert torch.equal(output_of(again), output_of(unet))
    assert nncf.pruning_statistic(again) == nncf.pruning_statistic(unet)
    dp.remove_(again, dp.fold_(again).plan)
    dp.remove_(unet, dp.fold_(unet).plan)
    assert torch.equal(output_of(again), output_of(unet))


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_a_masked_unet_is_saved_and_goes_on_training_as_if_nothing_had_happened(make, tmp_path) -> None:
    unet = masked(make, plan_for(make()))
    fine_tune(unet, steps=2)
    folder = dp.save_masked(unet, tmp_path / "masked")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        LIST_FILE,
        "masked.safetensors",
        "pruning_plan.json",
    ]
    again = make()
    assert dp.load_masked_(again, folder) == unet.mask_report
    assert torch.equal(output_of(again), output_of(unet))
    for model in (unet, again):
        fine_tune(model, steps=2)
    assert torch.equal(output_of(again), output_of(unet))
    with pytest.raises(BadInput, match="exists"):
        dp.save_masked(unet, folder)
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        type(unet).from_pretrained(folder)


def test_damaged_files_of_a_masked_unet_are_refused(tmp_path) -> None:
    plan = plan_for(make_unet())
    first = dp.save_masked(masked(make_unet, plan), tmp_path / "first")
    second = dp.save_masked(masked(make_unet, plan_for(make_unet(), 0.3)), tmp_path / "second")
    with pytest.raises(BadInput, match="another architecture"):
        dp.load_masked_(make_unet(block_out_channels=(16, 48)), first)
    (first / "masked.safetensors").write_bytes((second / "masked.safetensors").read_bytes())
    with pytest.raises(BadInput, match="belongs to another plan"):
        dp.load_masked_(make_unet(), first)
    state, stamp = load_tensors(second / "masked.safetensors")
    save_tensors({k: v for k, v in state.items() if k != "conv_in.bias"}, second / "masked.safetensors", stamp)
    unet = make_unet()
    expected, types = output_of(unet), [type(module) for module in unet.modules()]
    with pytest.raises(BadInput, match=r"does not fit the UNet: conv_in\.bias"):
        dp.load_masked_(unet, second)
    torch.testing.assert_close(output_of(unet), expected)  # queries were scaled and back
    assert [type(module) for module in unet.modules()] == types
    assert not hasattr(unet, "mask_report")
    (first / "masked.safetensors").unlink()
    with pytest.raises(BadInput, match="no such file"):
        dp.load_masked_(make_unet(), first)
    with pytest.raises(BadInput, match="not masked"):
        dp.save_masked(make_unet(), tmp_path / "third")


def test_what_would_silently_go_wrong_with_a_masked_unet_is_refused(unet, tmp_path) -> None:
    plan = plan_for(unet)
    dp.mask_(unet, plan)
    pipeline = DDPMPipeline(unet, DDPMScheduler(100))
    for action in (
        lambda: dp.remove_(unet, plan),
        lambda: dp.mask_(unet, plan),
        lambda: plan_for(unet),
        lambda: dp.save(unet, tmp_path / "saved"),
        lambda: dp.save(pipeline, tmp_path / "saved"),
    ):
        with pytest.raises(BadInput, match="call fold_"):
            action()
    dp.fold_(unet)
    for action in (lambda: plan_for(unet), lambda: dp.save(unet, tmp_path / "saved")):
        with pytest.raises(BadInput, match="call remove_"):
            action()
    before = output_of(unet)
    with pytest.raises(BadInput, match="another architecture"):
        dp.remove_(unet, plan_for(make_unet(block_out_channels=(16, 48))))
    assert torch.equal(output_of(unet), before)
    assert list(tmp_path.iterdir()) == []
    dp.remove_(unet, plan)
    dp.save(unet, tmp_path / "saved")
    with pytest.raises(BadInput, match="pruned already"):
        dp.mask_(unet, plan)


def test_a_norm_of_an_unknown_class_is_refused_before_anything_changes(unet) -> None:
    class OwnNorm(torch.nn.GroupNorm):
        pass

    plan = plan_for(unet)
    unet.conv_norm_out.__class__ = OwnNorm
    with pytest.raises(BadInput, match="conv_norm_out: masks cannot be exact through a OwnNorm"):
        dp.mask_(unet, plan)
    assert type(unet.mid_block.resnets[0].norm1) is torch.nn.GroupNorm


@pytest.mark.parametrize("overwrite", ["nncf.prune", "scheduler", "state dict"])
def test_masks_that_nncf_overwrote_are_not_folded(unet, overwrite) -> None:
    plan = plan_for(unet)
    dp.mask_(unet, plan)
    mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
    if overwrite == "nncf.prune":
        nncf.prune(unet, mode, ratio=0.1, examples_inputs=inputs_of(unet))
    elif overwrite == "scheduler":
        MultiStepMagnitudePruningScheduler(unet, mode=mode, steps={0: 0.3}).step()
    else:
        unet.load_state_dict(masked(make_unet, dp.make_plan(make_unet(), "random", pruning_ratio=0.5)).state_dict())
    with pytest.raises(BadInput, match="no longer those of mask_"):
        dp.fold_(unet)


def test_masks_beside_quantizers_are_not_folded(unet) -> None:
    dp.mask_(unet, plan_for(unet))

    class Quantizer(torch.nn.Module):
        def forward(self, x):
            return x

    nncf.torch.function_hook.register_pre_function_hook(unet, "conv_in/conv2d/0", 0, Quantizer())
    with pytest.raises(BadInput, match="other NNCF hooks than masks"):
        dp.fold_(unet)


def test_gradient_checkpointing_is_refused_and_fails_aloud_when_switched_on_later(unet) -> None:
    plan = plan_for(unet)
    unet.enable_gradient_checkpointing()
    with pytest.raises(BadInput, match="disable_gradient_checkpointing"):
        dp.mask_(unet, plan)
    unet.disable_gradient_checkpointing()
    dp.mask_(unet, plan)
    unet.enable_gradient_checkpointing()
    unet.train()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss_of(unet, 0).backward()


def test_a_submodule_called_directly_does_not_see_the_masks(unet) -> None:
    plan = plan_for(unet)
    x = torch.randn(1, 1, 16, 16)
    dense = unet.conv_in(x)
    dp.mask_(unet, plan)
    assert torch.equal(unet.conv_in(x), dense)
    dp.fold_(unet)
    assert not torch.equal(unet.conv_in(x), dense)


def test_a_masked_unet_is_copied_cast_and_sampled_from_like_any_other(unet) -> None:
    dp.mask_(unet, plan_for(unet))
    before = output_of(unet)
    twin = copy.deepcopy(unet)
    fine_tune(twin, steps=1)
    assert torch.equal(output_of(unet), before)
    dp.fold_(twin)
    pipeline = DDPMPipeline(unet, DDPMScheduler(100))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=1, num_inference_steps=2, output_type="np", generator=torch.manual_seed(0)).images
    assert images.shape == (1, 16, 16, 1)
    half = unet.to(torch.bfloat16)
    assert distance(output_of(half).float(), before) < 0.1
    assert nncf.pruning_statistic(half).global_pruning_ratio > 0.5
    assert dp.fold_(half).exact_norms


def test_a_wrapper_that_was_there_before_the_masks_is_there_after_folding(unet) -> None:
    plan, calls = plan_for(unet), []
    inner = unet.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    unet.forward = forward
    dp.mask_(unet, plan)
    dp.fold_(unet)
    output_of(unet)
    assert calls
    assert unet.forward is forward


def test_without_nncf_or_with_another_version_one_line_says_what_to_install(unet, monkeypatch) -> None:
    plan = plan_for(unet)
    for version in ("3.1.0", "2.14.1", "4.0.0"):
        monkeypatch.setattr(nncf, "__version__", version)
        with pytest.raises(BadInput, match=f"nncf {version} is installed, but masks need nncf>=3.2,<4"):
            dp.mask_(unet, plan)
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingExtra, match=r"pip install 'diffprune-plugin\[nncf\]'"):
        dp.mask_(unet, plan)
    dp.remove_(unet, plan)  # needs no NNCF
