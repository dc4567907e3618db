"""Compensation: exact where the answer is known, never worse, the same every time."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from tiny import make_unet, output_of
from tiny_transformers import make as make_transformer
from tiny_transformers import samples_for
from torch import Tensor, nn

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.config.criterion import dropout_of
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import Samples, drawn_hash
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.recovery import compensate, ridge
from diffprune_plugin.recovery import systems as finding
from diffprune_plugin.recovery.compensate import CompensationReport, compensate_
from diffprune_plugin.recovery.draws import draw
from diffprune_plugin.recovery.refit import Refit
from diffprune_plugin.recovery.residual import residual_sum, trace
from diffprune_plugin.recovery.ridge import Part, System, features_at, matrix_of, weight_of
from diffprune_plugin.recovery.systems import find_systems
from diffprune_plugin.utils.tensors import weights_hash

PLAIN: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "add_attention": False,
}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "ROWS", 4096)


def pruned(unet: nn.Module, criterion: Any = "magnitude", ratio: float = 0.5) -> tuple[Any, PruningPlan]:
    plan = dp.make_plan(unet, criterion, pruning_ratio=ratio)
    smaller = copy.deepcopy(unet)
    dp.remove_(smaller, plan)
    return smaller, plan


def repair(unet: Any, dense: Any, plan: PruningPlan, images: Any, **options: Any) -> CompensationReport:
    options = {"samples": 64, "batch_size": 16, "progress": False, **options}
    return compensate_(unet, dense, plan, DDPMScheduler(num_train_timesteps=100), images, **options)


def relative(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).norm() / expected.norm())


@torch.no_grad()
def error(unet: Any, dense: Any, images: Any) -> float:
    """Relative error of the UNet's output against the dense one's, on noisy samples drawn anew."""
    scheduler = DDPMScheduler(num_train_timesteps=100)
    draws = draw(load_samples(images), scheduler, np.arange(100), 32, 99, next(dense.parameters()), UNET_2D)
    outputs = [model(draws.noisy, draws.timesteps, **draws.extra).sample for model in (unet, dense)]
    return relative(*outputs)


# rows of inputs and outputs


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, 3, stride=2),
        nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
        nn.Conv2d(3, 5, 1),
        nn.Linear(3, 5),
    ],
)
def test_features_times_weights_are_the_layers_output(layer: Any) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 7, 3) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 9, 8)
    output = layer(inputs) if isinstance(layer, nn.Linear) else layer(inputs).flatten(2).transpose(1, 2)
    positions = torch.stack([torch.randperm(output.shape[1])[:6] for _ in range(2)])
    rows = features_at(layer, inputs, positions) @ matrix_of(layer.weight) + layer.bias
    assert torch.equal(weight_of(matrix_of(layer.weight), layer.weight), layer.weight)
    expected = torch.stack([output[i, positions[i]] for i in range(2)]).flatten(0, 1)
    torch.testing.assert_close(rows, expected)


# one layer of each type, whose removed input channels are linear combinations of the kept ones


def shrunk(layer: Any, kept_in: Tensor, kept_out: Tensor) -> Any:
    small = copy.deepcopy(layer)
    small.weight = nn.Parameter(layer.weight[kept_out][:, kept_in].clone())
    if layer.bias is not None:
        small.bias = nn.Parameter(layer.bias[kept_out].clone())
    return small


@pytest.mark.parametrize("factor", [1.0, 0.7], ids=["plain", "query"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 6, 3, padding=1),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.Conv2d(8, 6, 1),
        nn.Conv2d(8, 6, 3, padding=1, bias=False),
        nn.Linear(8, 6),
        nn.Linear(8, 6, bias=False),
    ],
    ids=["3x3", "downsampler", "shortcut", "3x3 without bias", "linear", "projection without bias"],
)
@torch.no_grad()
def test_linearly_predictable_channels_are_repaired_exactly(layer: Any, factor: float) -> None:
    torch.manual_seed(0)
    kept_in, kept_out = torch.tensor([0, 2, 3, 5, 6]), torch.tensor([0, 1, 4])
    linear = isinstance(layer, nn.Linear)
    visible = torch.randn(24, 9, 5) if linear else torch.randn(24, 5, 9, 9)
    mixing = torch.randn(8, 5)
    mixing[kept_in] = torch.eye(5)
    everything = torch.einsum("oi,bni->bno" if linear else "oi,bihw->bohw", mixing, visible)
    small = shrunk(layer, kept_in, kept_out)
    system = System("layer", [Part("layer", small, 0, 5)], kept_out, 1.0, factor)
    batch, held_out = slice(0, 24), torch.arange(24) % 8 == 7
    expected = layer(everything)
    wanted = (expected[..., kept_out] if linear else expected[:, kept_out]) * factor
    system.keep_target(expected, batch, 24, seed=0)
    assert relative(small(visible), wanted) > 0.1
    system.inputs["layer"] = visible
    system.collect(small(visible), batch, held_out, (1e-12,))
    result = system.solve((1e-12,), held_out)
    assert relative(small(visible), wanted) < 1e-5
    assert result.after < 1e-9 < 0.1 < result.before


class Twins:
    """A criterion that wants the second channel of every pair gone."""

    def __call__(self, group: Any) -> Tensor:
        return (torch.arange(len(group[0].idxs)) % 2 == 0).float()


@torch.no_grad()
def unet_of_twins(**changes: Any) -> UNet2DModel:
    """A UNet whose channels 2i and 2i + 1 are equal everywhere: what goes is known exactly from what stays."""
    unet = make_unet(**PLAIN, **changes)
    for name, parameter in unet.named_parameters():
        if not name.startswith("conv_out"):
            parameter[1::2] = parameter[::2]
    return unet


@pytest.mark.parametrize("passes", ["one", "layer"])
def test_a_unet_of_twins_is_repaired_exactly(images: np.ndarray, passes: Any) -> None:
    dense = unet_of_twins()
    unet, plan = pruned(dense, Twins())
    damaged = relative(output_of(unet), output_of(dense))
    report = repair(unet, dense, plan, images, strengths=(1e-9,), passes=passes)
    assert damaged > 0.1
    assert relative(output_of(unet), output_of(dense)) < 1e-4
    assert all(result.after < 1e-6 for result in report.repairs)


# a whole UNet


def test_no_repair_is_worse_on_held_out_images_and_the_output_comes_nearer(images: np.ndarray) -> None:
    dense = make_unet()
    unet, plan = pruned(dense)
    before = error(unet, dense, images)
    report = repair(unet, dense, plan, images)
    assert all(result.after <= result.before for result in report.repairs)
    assert sum(result.refitted for result in report.repairs) > 0.9 * len(report.repairs)
    assert error(unet, dense, images) < 0.7 * before


def test_in_bfloat16_the_same_sums_are_refitted_and_the_output_comes_nearer(images: np.ndarray) -> None:
    reports = []
    for dtype in (torch.float32, torch.bfloat16):
        dense = make_unet().to(dtype)
        unet, plan = pruned(dense)
        before = error(unet, dense, images)
        reports.append(repair(unet, dense, plan, images, samples=32))
        assert error(unet, dense, images) < 0.75 * before
    first, second = ([(r.layers, r.block, r.unknowns) for r in report.repairs] for report in reports)
    assert first == second


@pytest.mark.parametrize("bias", [True, False])
def test_in_half_precision_the_update_that_is_judged_is_the_one_that_is_written(bias: bool) -> None:
    """The oracle: what the layers compute afterwards less what they computed before."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 3, bias=bias).bfloat16(), torch.nn.Conv2d(2, 3, 3, bias=False).bfloat16()]
    parts = [Part("linear", layers[0], 1, 4), Part("conv", layers[1], 0, 2)]
    system = System("block", parts, torch.arange(3), 1.0, 1.0)
    update = torch.randn(system.unknowns + bias, 3, dtype=torch.float64) * 1e-3
    before = [parameter.detach().double() for layer in layers for parameter in layer.parameters()]
    written = system.written(update)
    with torch.no_grad():
        system.apply_(update)
    after = [parameter.detach().double() for layer in layers for parameter in layer.parameters()]
    moved = [new - old for new, old in zip(after, before, strict=True)]
    expected = [moved[0][:, 1:].T, moved[-1].permute(2, 3, 1, 0).flatten(0, 2), *([moved[1][None]] if bias else [])]
    assert torch.equal(written, torch.cat(expected))
    assert not torch.equal(written, update)
    single = System("block", [Part("linear", torch.nn.Linear(4, 3), 0, 4)], torch.arange(3), 1.0, 1.0)
    assert single.written(update) is update


def test_all_samples_go_at_once_only_where_half_of_the_free_memory_is_enough(monkeypatch, capsys) -> None:
    dense = make_unet()
    largest = 4 * max(output[0].numel() for output in outputs_of_layers(dense))  # bytes, of one sample
    needed = 256 * 8 * largest
    for free, expected in ((2 * needed, "one"), (2 * needed - 1, "layer")):
        monkeypatch.setattr(compensate, "free_memory", lambda device, free=free: free)
        assert compensate.passes_that_fit(dense) == expected
        assert ("a pass for each layer instead, slower" in capsys.readouterr().err) == (expected == "layer")


def outputs_of_layers(unet: UNet2DModel) -> list[Tensor]:
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: seen.append(output))
        for module in unet.modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    output_of(unet)
    for hook in hooks:
        hook.remove()
    return seen


def test_every_layer_behind_a_cut_is_in_one_repair(images: np.ndarray) -> None:
    dense = make_unet()
    unet, plan = pruned(dense)
    report = repair(unet, dense, plan, images)
    cut = {name for name, size in plan.layers.items() if size.before[0] > size.after[0]}
    repaired = [name for result in report.repairs for name in result.layers]
    assert sorted(repaired) == sorted(cut)
    assert report.left == {}


def test_where_no_strength_helps_the_weights_stay(images: np.ndarray) -> None:
    dense = make_unet()
    unet, plan = pruned(dense)
    before = weights_hash(unet)
    report = repair(unet, dense, plan, images, strengths=())
    assert not any(result.refitted or result.strength for result in report.repairs)
    assert weights_hash(unet) == before


def test_what_runs_on_the_numbers_of_a_sample_is_left_and_what_is_the_same_for_all_is_measured_by_its_size() -> None:
    """PixArt alpha is told height and width, as one batch, and the aspect ratio, here the same for all."""
    dense = make_transformer("PixArt alpha")
    samples, scheduler = samples_for(dense)
    samples.extra["aspect_ratio"] = torch.ones_like(samples.extra["aspect_ratio"])
    smaller, plan = pruned(dense)
    report = compensate_(smaller, dense, plan, scheduler, samples, samples=16, progress=False)
    embedder = "adaln_single.emb.{}_embedder.linear_2"
    assert report.left == {embedder.format("resolution"): "run on 2 values of a sample as if they were samples"}
    repairs = {one.layers[0]: one for one in report.repairs}
    assert 0 <= repairs[embedder.format("aspect_ratio")].after < repairs[embedder.format("aspect_ratio")].before < 10
    assert len(repairs) > 3


def test_the_dense_unet_is_left_untouched(images: np.ndarray) -> None:
    dense = make_unet()
    unet, plan = pruned(dense)
    dense.train()
    before = weights_hash(dense)
    repair(unet, dense, plan, images)
    assert weights_hash(dense) == before
    assert dense.training
    assert not unet.training
    assert not any(module._forward_hooks for model in (unet, dense) for module in model.modules())


@pytest.mark.slow
def test_a_seed_gives_the_same_weights_and_another_others(images: np.ndarray) -> None:
    dense = make_unet()
    hashes = []
    for seed in (0, 0, 1):
        unet, plan = pruned(dense)
        repair(unet, dense, plan, images, seed=seed)
        hashes.append(weights_hash(unet))
    assert hashes[0] == hashes[1] != hashes[2]


def test_one_pass_and_a_pass_for_each_layer_agree(images: np.ndarray) -> None:
    dense = make_unet()
    outputs = []
    for passes in ("one", "layer"):
        unet, plan = pruned(dense)
        repair(unet, dense, plan, images, passes=passes)
        outputs.append(output_of(unet))
    assert relative(outputs[0], outputs[1]) < 1e-4


def test_a_single_pass_ends_at_the_last_regression(images: np.ndarray) -> None:
    dense, samples = make_unet(), dict[str, set[int]]()
    plan = dp.make_plan(dense, "magnitude", pruning_ratio=0.0, pruning_ratio_dict={"mid_block.resnets.0.conv1": 0.5})
    unet = copy.deepcopy(dense)
    dp.remove_(unet, plan)
    for name in ("mid_block.resnets.0", "mid_block.resnets.1", "conv_out"):
        counts = samples[name] = set()
        unet.get_submodule(name).register_forward_pre_hook(lambda _, args, counts=counts: counts.add(len(args[0])))
    assert repair(unet, dense, plan, images, passes="one").repairs
    # Fewer samples went through the whole of it, to see what its residual sums are.
    assert [64 in counts for counts in samples.values()] == [True, False, False]


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The blocks that are finished from now on; after so many there is an interrupt."""
    finish, finished = Refit.finish, []

    def interrupted(*args: Any) -> None:
        finish(*args)
        finished.append(args[1].block)
        if len(finished) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(Refit, "finish", interrupted)
    return finished


def test_it_goes_on_whatever_order_diffusers_notes_the_schedulers_defaults_in(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes them a set, whose order is another one in each process."""
    dense, schedulers = make_unet(), [DDPMScheduler(num_train_timesteps=100) for _ in range(2)]
    schedulers[1].config["_use_default_values"] = schedulers[0].config["_use_default_values"][::-1]
    assert dict(schedulers[0].config) != dict(schedulers[1].config)
    interrupt_after(3, monkeypatch)
    options = {"samples": 64, "batch_size": 16, "progress": False, "checkpoint": tmp_path}
    for scheduler, ends in zip(schedulers, (pytest.raises(KeyboardInterrupt), contextlib.nullcontext()), strict=True):
        unet, plan = pruned(dense)
        with ends:
            compensate_(unet, dense, plan, scheduler, images, **options)
        assert len(list(tmp_path.iterdir())) == (1 if scheduler is schedulers[0] else 0), "the one that was begun"


def test_an_interrupted_run_goes_on_and_gives_identical_weights(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_unet()
    whole, plan = pruned(dense)
    uninterrupted = repair(whole, dense, plan, images)
    finished = interrupt_after(7, monkeypatch)
    first, _ = pruned(dense)
    with pytest.raises(KeyboardInterrupt):
        repair(first, dense, plan, images, checkpoint=tmp_path)
    second, _ = pruned(dense)
    resumed = repair(second, dense, plan, images, checkpoint=tmp_path)
    assert len(finished) == len(resumed.repairs)
    assert resumed.repairs == uninterrupted.repairs
    assert weights_hash(second) == weights_hash(whole)
    assert list(tmp_path.iterdir()) == []


def test_a_stored_repair_of_another_layer_or_with_an_altered_report_is_refused(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_unet()
    unet, plan = pruned(dense)
    interrupt_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        repair(unet, dense, plan, images, checkpoint=tmp_path)
    first, _, third = sorted(tmp_path.rglob("*.safetensors"))
    was = third.read_bytes()
    third.write_bytes(was.replace(b"unknowns", b"unknownz"))
    with pytest.raises(BadInput, match=r"0002\.safetensors: altered since it was written"):
        repair(pruned(dense)[0], dense, plan, images, checkpoint=tmp_path)
    third.write_bytes(first.read_bytes())
    with pytest.raises(BadInput, match=r"0002\.safetensors: of another layer or another run than its name says"):
        repair(pruned(dense)[0], dense, plan, images, checkpoint=tmp_path)
    third.write_bytes(was)
    repair(pruned(dense)[0], dense, plan, images, checkpoint=tmp_path)


def test_a_layer_with_many_unknowns_is_solved_in_blocks(images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "UNKNOWNS", 60)
    dense = make_unet()
    unet, plan = pruned(dense)
    before = error(unet, dense, images)
    report = repair(unet, dense, plan, images)
    assert max(result.unknowns for result in report.repairs) <= 60
    assert len([r for r in report.repairs if r.layers == ("mid_block.resnets.0.conv1",)]) == 3
    assert error(unet, dense, images) < 0.7 * before


def test_further_inputs_come_with_the_samples(images: np.ndarray) -> None:
    dense = make_unet(num_class_embeds=3)
    unet, plan = pruned(dense)
    labelled = Samples(torch.from_numpy(images), {"class_labels": torch.arange(16) % 3})
    before = error(unet, dense, labelled)
    repair(unet, dense, plan, labelled)
    assert error(unet, dense, labelled) < 0.7 * before


# how it is found what to refit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_target_is_the_residual_sum_that_a_layers_output_goes_into(dtype: torch.dtype) -> None:
    unet = make_unet(resnet_time_scale_shift="default", mid_block_scale_factor=2.0).to(dtype)
    with torch.no_grad():
        calls, _ = trace(unet, UNET_2D)
        found = {
            layer: residual_sum(unet, calls, layer)
            for layer in (
                "down_blocks.0.resnets.0.conv1",
                "down_blocks.0.resnets.0.conv2",
                "down_blocks.1.resnets.0.conv2",
                "down_blocks.1.resnets.0.conv_shortcut",
                "down_blocks.1.attentions.0.to_q",
                "down_blocks.1.attentions.0.to_out.0",
                "mid_block.resnets.0.conv2",
                "down_blocks.0.downsamplers.0.conv",
                "conv_out",
            )
        }
    assert found == {
        "down_blocks.0.resnets.0.conv1": ("down_blocks.0.resnets.0.conv1", 1.0),
        "down_blocks.0.resnets.0.conv2": ("down_blocks.0.resnets.0", 1.0),
        "down_blocks.1.resnets.0.conv2": ("down_blocks.1.resnets.0", 1.0),
        "down_blocks.1.resnets.0.conv_shortcut": ("down_blocks.1.resnets.0", 1.0),
        "down_blocks.1.attentions.0.to_q": ("down_blocks.1.attentions.0.to_q", 1.0),
        "down_blocks.1.attentions.0.to_out.0": ("down_blocks.1.attentions.0", 1.0),
        "mid_block.resnets.0.conv2": ("mid_block.resnets.0", 0.5),
        "down_blocks.0.downsamplers.0.conv": ("down_blocks.0.downsamplers.0.conv", 1.0),
        "conv_out": ("conv_out", 1.0),
    }


@torch.no_grad()
def test_queries_are_refitted_with_the_factor_that_keeps_the_softmax_scale() -> None:
    dense = make_unet()
    unet, plan = pruned(dense)
    systems, _ = find_systems(unet, dense, plan, UNET_2D)
    factors = {system.block: system.factor for system in systems}
    before, after = UNET_2D.head_sizes(dense), UNET_2D.head_sizes(unet)
    for attention, size in before.items():
        assert factors[f"{attention}.to_q"] == pytest.approx((after[attention] / size) ** 0.5)
        assert factors[f"{attention}.to_k"] == 1.0


def test_no_held_out_sample_shares_its_image_with_the_others(images: np.ndarray) -> None:
    draws = draw(load_samples(images), DDPMScheduler(), np.arange(1000), 40, 0, torch.zeros(1), UNET_2D)
    drawn = sorted(draws.timesteps.tolist())
    assert int(draws.held_out.sum()) == 5
    assert drawn[0] < 25
    assert drawn[-1] >= 975
    clean = draw(load_samples(images), DDPMScheduler(), np.array([0]), 40, 0, torch.zeros(1), UNET_2D).noisy > 0
    held = {image.numpy().tobytes() for image in clean[draws.held_out]}
    assert not held & {image.numpy().tobytes() for image in clean[~draws.held_out]}


def test_timesteps_come_from_the_calibration_if_one_is_given(
    images: np.ndarray, scheduler: DDPMScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_unet()
    unet, plan = pruned(dense)
    sweep = dp.importance("diff_taylor", samples=4, curve_samples=1).sweep  # type: ignore[attr-defined]
    calibration = dp.calibrate(dense, scheduler, images, sweep, timesteps=10, progress=False)
    calibration.counts[:] = [True, True, *[False] * 8]
    seen: list[set[int]] = []
    original = compensate.draw

    def spy(*args: Any) -> Any:
        seen.append(set(args[2].tolist()))
        return original(*args)

    monkeypatch.setattr(compensate, "draw", spy)
    repair(unet, dense, plan, images, calibration=calibration, samples=16)
    assert seen == [set(calibration.timesteps[:2].tolist())]


# what cannot be used


def test_errors_name_the_place_and_the_remedy(images: np.ndarray) -> None:
    dense = make_unet()
    unet, plan = pruned(dense)
    with pytest.raises(BadInput, match="another architecture"):
        repair(unet, make_unet(block_out_channels=(16, 16)), plan, images)
    with pytest.raises(BadInput, match="is pruned already"):
        repair(unet, unet, plan, images)
    with pytest.raises(BadInput, match=r"not pruned; call remove_\(unet, plan\) first"):
        repair(copy.deepcopy(dense), dense, plan, images)
    with pytest.raises(BadInput, match=r"was pruned by plan .*, not by"):
        repair(unet, dense, dp.make_plan(dense, "magnitude", pruning_ratio=0.3), images)
    with pytest.raises(BadInput, match="it needs two of both"):
        repair(unet, dense, plan, images[:1])
    with pytest.raises(BadInput, match="passes 'all'"):
        repair(unet, dense, plan, images, passes="all")
    with pytest.raises(BadInput, match="the UNet takes"):
        repair(unet, dense, plan, images[:, :8, :8])


@pytest.mark.parametrize("which", ["dense", "pruned"])
def test_activations_that_are_not_finite_end_it_with_one_line(images: np.ndarray, which: str) -> None:
    dense = make_unet()
    unet, plan = pruned(dense)
    with torch.no_grad():
        (dense if which == "dense" else unet).mid_block.resnets[0].conv1.bias.fill_(float("nan"))
    with pytest.raises(CheckFailed, match=rf"the {which} UNet's output of mid_block\S* is not finite"):
        repair(unet, dense, plan, images)


def test_the_share_without_a_condition_is_the_one_that_was_asked_for() -> None:
    labels, like = torch.ones(16, dtype=torch.long), torch.zeros(1)
    samples = Samples(torch.zeros(16, 1, 8, 8), {"class_labels": labels}, {"class_labels": torch.tensor([0])})

    def conditions(share: float | None) -> float:
        data = samples.with_dropout(share)
        found = draw(data, DDPMScheduler(10), np.arange(10), 400, 0, like, UNET_2D).extra["class_labels"]
        return float((found == 0).float().mean())

    assert (conditions(0.0), conditions(1.0)) == (0, 1)
    assert conditions(None) == pytest.approx(0.1, abs=0.05)
    assert drawn_hash(samples.with_dropout(0.0)) != drawn_hash(samples) == samples.sha256
    assert dropout_of(dp.importance("diff_taylor", condition_dropout=0.0)) == 0
    assert dropout_of(dp.importance("diff_taylor")) is dropout_of(dp.importance("magnitude")) is None
