"""Sums of gradients: in float32, and the same however often memory runs out."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from tiny import make_unet

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.calibration.gradients import GradientSums
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.diffusion.loss import noise_prediction_loss
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.utils import device
from diffprune_plugin.utils.memory import Passes, checkpointing, free_memory, of_container
from diffprune_plugin.utils.out_of_memory import out_of_memory

SWEEPS = {
    "stratified": Sweep(samples=12, curve_samples=2, threshold=0.0),
    "reference": Sweep(sampling="reference", threshold=0.9),
    "fresh": Sweep(sampling="fresh", threshold=0.9, include_last=True),
}
FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


class Short(torch.autograd.Function):
    """Passes on what it gets; the backward pass runs out of memory for more than ``limit`` samples."""

    limit = 2

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if len(gradient) > Short.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return gradient


def short_of_memory(unet: UNet2DModel, where: str, limit: int = 2) -> UNet2DModel:
    """For more than ``limit`` samples, memory runs out in the forward pass, or half-way through the backward one."""
    Short.limit = limit

    def forward(_: Any, __: Any, output: torch.Tensor) -> None:
        if len(output) > limit:
            raise RuntimeError(FULL)

    def backward(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return Short.apply(output)

    unet.mid_block.register_forward_hook({"forward": forward, "backward": backward}[where])
    return unet


def calibrated(unet: UNet2DModel, images: Any, sampling: str = "stratified", **changes: Any) -> Calibration:
    settings = {"batch_size": 8, "timesteps": 4, "progress": False, **changes}
    return dp.calibrate(unet, DDPMScheduler(num_train_timesteps=20), images, SWEEPS[sampling], **settings)


def assert_close(first: Calibration, second: Calibration, rtol: float = 1e-3, atol: float = 1e-5) -> None:
    assert first.gradients.keys() == second.gradients.keys()
    assert first.backward == second.backward
    for name, gradient in first.gradients.items():
        torch.testing.assert_close(gradient, second.gradients[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("sampling", SWEEPS)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_where_memory_runs_out_half_as_many_samples_go_at_once_with_the_same_result(
    where, sampling, images, capsys
) -> None:
    expected = calibrated(make_unet(), images, sampling)
    assert capsys.readouterr().err == ""
    assert_close(calibrated(short_of_memory(make_unet(), where), images, sampling), expected)
    said = capsys.readouterr().err
    assert "out of memory at batch size 8: going on with 4" in said
    assert "out of memory at batch size 4: going on with 2" in said
    assert said.count("out of memory") == 2


def test_memory_that_runs_out_after_a_pass_that_fitted_costs_no_gradients(images) -> None:
    """The second batch fails before it has any; those of the first are not taken for its own."""
    unet, calls = make_unet(), []

    def forward(_: Any, __: Any, output: torch.Tensor) -> None:
        calls.append(len(output) if torch.is_grad_enabled() else 0)
        if calls.count(8) == 2 and len(output) == 8:
            raise RuntimeError(FULL)

    unet.mid_block.register_forward_hook(forward)
    settings = {"batch_size": 8, "timesteps": 4, "progress": False}
    sweep, scheduler = replace(SWEEPS["stratified"], samples=24), DDPMScheduler(num_train_timesteps=20)
    found = dp.calibrate(unet, scheduler, images, sweep, **settings)
    expected = dp.calibrate(make_unet(), scheduler, images, sweep, **settings)
    assert [count for count in calls if count] == [8, 8, 4, 4, 4, 4]
    assert_close(found, expected)


def test_without_the_account_of_what_was_counted_a_failed_pass_counts_twice(images, monkeypatch) -> None:
    """The fault planted: layers behind the failure had their gradients already."""
    expected = calibrated(make_unet(), images)
    monkeypatch.setattr(GradientSums, "repeating", lambda self: contextlib.nullcontext())
    wrong = calibrated(short_of_memory(make_unet(), "backward"), images)
    torch.testing.assert_close(wrong.gradients["conv_in.weight"], expected.gradients["conv_in.weight"])
    assert not torch.allclose(wrong.gradients["conv_out.weight"], expected.gradients["conv_out.weight"], rtol=0.1)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_too_little_memory_for_one_sample_is_one_line_with_the_remedy(where, images) -> None:
    unet = short_of_memory(make_unet(), where, limit=0)
    with pytest.raises(BadInput, match=r"out of memory at batch size 1 \(\w+: .*\); set gradient_checkpointing: true"):
        calibrated(unet, images)
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_only_what_says_that_memory_ran_out_is_taken_for_it() -> None:
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError(FULL))
    assert out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. not enough memory: you tried"))
    assert out_of_memory(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        Passes(4).over([1, 2], lambda _: (_ for _ in ()).throw(RuntimeError("shapes")))


def test_every_item_is_run_once_in_order_at_every_size() -> None:
    for limit in (1, 2, 3, 7):

        def run(part: Any, limit: int = limit) -> list[int]:
            if len(part) > limit:
                raise MemoryError
            return list(part)

        assert [item for part in Passes(7).over(range(20), run) for item in part] == list(range(20))


def test_half_precision_weights_have_their_gradients_summed_in_float32(images) -> None:
    """Pass by pass by hand; a sum in bfloat16, which keeps 8 bits, would be another one."""
    unet = make_unet().to(torch.bfloat16)
    scheduler = DDPMScheduler(num_train_timesteps=20)
    seen, add_noise = [], scheduler.add_noise
    scheduler.add_noise = lambda *a: (seen.append(a) if torch.is_grad_enabled() else None) or add_noise(*a)
    sweep = SWEEPS["stratified"]
    calibration = dp.calibrate(unet, scheduler, images, sweep, batch_size=2, timesteps=4, progress=False)
    scheduler.add_noise = add_noise
    exact, rounded = {}, {}
    for clean, noise, timesteps in seen:
        (noise_prediction_loss(unet, scheduler, clean, noise, timesteps, {}, UNET_2D).sum() * (20 / 12)).backward()
        for name, parameter in unet.named_parameters():
            exact[name] = exact.get(name, 0) + parameter.grad.float()
            rounded[name] = rounded.get(name, 0) + parameter.grad
            parameter.grad = None
    assert len(seen) == 6
    assert all(torch.equal(calibration.gradients[name], gradient) for name, gradient in exact.items())
    assert not torch.equal(calibration.gradients["conv_in.weight"], rounded["conv_in.weight"].float())


def test_the_noise_of_half_precision_weights_is_added_in_float32(images) -> None:
    """In bfloat16 alpha_t of a DDPM is 1 at the first ten timesteps: there would be none."""
    seen: list[torch.Tensor] = []
    scheduler, unet = DDPMScheduler(), make_unet()
    unet.register_forward_pre_hook(lambda _, args, given: seen.append(given["sample"]), with_kwargs=True)
    for dtype in (torch.float32, torch.bfloat16):
        given = {"batch_size": 2, "timesteps": 1000, "progress": False}
        dp.calibrate(unet.to(dtype), scheduler, images, Sweep(sampling="reference", threshold=1.0), **given)
    full, half = seen[0], seen[len(seen) // 2]
    assert half.dtype is torch.bfloat16
    assert torch.equal(half, full.bfloat16())


def test_gradients_of_float16_do_not_round_to_nothing(images) -> None:
    """Of a mean over many numbers: some below 6e-8, the smallest that float16 has."""
    sums, exact = {}, {}
    for dtype, found in ((torch.float16, sums), (torch.float64, exact)):
        model = torch.nn.Linear(2, 1, bias=False).to(dtype)
        torch.nn.init.constant_(model.weight, 0.5)
        collected = GradientSums(model)
        with collected.collecting():
            for _ in range(2):
                loss = (
                    model(torch.tensor([[1.0, 2.0]], dtype=dtype)).sum().to(torch.promote_types(dtype, torch.float32))
                )
                (loss * 3e-8 * collected.scale).backward()
        found.update(collected.totals)
    torch.testing.assert_close(sums["weight"], exact["weight"].float(), rtol=1e-2, atol=0)


def test_a_gradient_that_is_not_finite_is_named(images) -> None:
    unet = make_unet()
    unet.conv_out.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(CheckFailed, match=r"the gradient of conv_out\.weight is not finite; .* dtype: bfloat16"):
        calibrated(unet, images)


def test_gradient_checkpointing_changes_nothing_but_the_memory_and_is_switched_off_again(images) -> None:
    unet = make_unet()
    seen = []
    unet.mid_block.resnets[1].register_forward_pre_hook(lambda *_: seen.append(unet.is_gradient_checkpointing))
    expected = calibrated(unet, images)
    count = len(seen)
    assert_close(calibrated(unet, images, gradient_checkpointing=True), expected, rtol=1e-5, atol=1e-6)
    assert not unet.is_gradient_checkpointing
    assert len(seen) - count > count, "activations are computed again"
    assert all(seen[count:])
    with checkpointing(unet, True), checkpointing(unet, True):
        pass
    assert not unet.is_gradient_checkpointing
    with pytest.raises(BadInput, match="gradient_checkpointing: SiLU has none"), checkpointing(unet.conv_act, True):
        pass


@pytest.mark.parametrize(("capability", "said"), [("AVX2", True), ("DEFAULT", True), ("AVX512", False)])
def test_bfloat16_that_the_cpu_would_emulate_is_said_on_standard_error(capability, said, monkeypatch, capsys) -> None:
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    device.say_if_emulated("cpu", "autocast: true")
    line = "autocast: true: this CPU has no AVX-512, so bfloat16 is emulated"
    assert (line in capsys.readouterr().err) is said
    device.say_if_emulated("cuda", "autocast: true")
    monkeypatch.setattr(device.platform, "machine", lambda: "aarch64")
    device.say_if_emulated("cpu", "autocast: true")
    assert capsys.readouterr().err == ""


def test_autocast_computes_in_bfloat16_and_sums_in_float32(images, monkeypatch, capsys) -> None:
    unet = make_unet()
    seen = set()
    unet.mid_block.resnets[0].conv1.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(device.platform, "machine", lambda: "AMD64")
    calibration = calibrated(unet, images, autocast=True)
    assert capsys.readouterr().err.count("autocast: true: this CPU has no AVX-512") == 1
    assert seen == {torch.bfloat16}
    assert calibration.autocast
    assert {gradient.dtype for gradient in calibration.gradients.values()} == {torch.float32}
    exact = calibrated(unet, images)
    for name in ("conv_in.weight", "mid_block.resnets.0.conv1.weight"):
        first, second = calibration.gradients[name], exact.gradients[name]
        assert torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0) > 0.99
        assert not torch.equal(first, second)


def test_the_gradients_of_the_weights_are_never_held_twice(images) -> None:
    """When the next pass begins, no parameter holds a gradient beside the sums; its own is freed as soon as added."""
    unet = make_unet()
    held = []
    unet.conv_in.register_forward_hook(lambda *_: held.append(sum(p.grad is not None for p in unet.parameters())))
    unet.conv_in.weight.register_hook(lambda g: held.append(sum(p.grad is not None for p in unet.parameters())))
    calibrated(unet, images)
    assert set(held) == {0}


def test_a_container_leaves_what_its_limit_leaves(tmp_path: Path) -> None:
    assert of_container(tmp_path) is None
    (tmp_path / "memory.current").write_text("1000\n")
    for limit, left in (("max\n", None), ("1500\n", 500), ("900\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert of_container(tmp_path) == left
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 300\nactive_file 20\n")
    assert of_container(tmp_path) == 220, "what it holds of files is given up"
    assert 1e8 < free_memory(torch.device("cpu")) < 1e14
