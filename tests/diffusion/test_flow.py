"""Flow matching: noisy samples, targets and times by hand, the threshold in terms of noise, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from tiny_transformers import make

import diffprune_plugin as dp
from diffprune_plugin.adapters.flux import FLUX, pack
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.criteria.timestep_weights import alphas_of, min_snr
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.loss import noise_prediction_loss, noised
from diffprune_plugin.diffusion.schedulers import noise_form, training_scheduler
from diffprune_plugin.errors import BadInput
from diffprune_plugin.plugins import find_adapter

FAST: dict[str, Any] = {"batch_size": 4, "timesteps": 5, "progress": False}


def latents(count: int = 4, channels: int = 4) -> torch.Tensor:
    return torch.randn((count, channels, 8, 8), generator=torch.Generator().manual_seed(0))


def given(name: str, count: int = 4) -> Samples:
    """Latents with conditions, as a .safetensors has them."""
    generator, model = torch.Generator().manual_seed(1), make(name)
    adapter = find_adapter(model)
    extra = {
        port.name: torch.randn((count, *sizes), generator=generator)
        for port in adapter.further_ports(model)
        for sizes in [[5 if isinstance(axis, str) else axis for axis in port.shape(model.config)[1:]]]
    }
    return Samples(latents(count), extra=extra)


def test_noisy_samples_targets_and_times_are_those_of_the_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sample, noise, places = latents(), latents().flip(0), torch.tensor([0, 499, 700, 999])
    noisy, target, times = noised(scheduler, sample, noise, places, find_adapter(make("SD 3")))
    assert times[1] == pytest.approx(1000 * 3 * 0.5 / (1 + 2 * 0.5))
    own = scheduler.timesteps.flip(0)[places]
    torch.testing.assert_close(times, own)
    torch.testing.assert_close(noisy, scheduler.scale_noise(sample, own, noise))
    torch.testing.assert_close(target, noise - sample)


def test_the_training_sigmas_come_back_after_a_scheduler_was_set_to_few_steps() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = alphas_of(scheduler)
    scheduler.set_timesteps(4)
    np.testing.assert_array_equal(alphas_of(training_scheduler(scheduler)), expected)


def test_the_threshold_is_applied_to_the_loss_of_the_noise_that_a_velocity_implies() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    sample, noise, places = latents(), latents().flip(0), torch.tensor([10, 300, 600, 990])
    noisy, target, times = noised(scheduler, sample, noise, places, find_adapter(make("SD 3")))
    wrong = target + 0.1 * latents().roll(1, 0)  # a velocity that misses
    sigma = (times / 1000).reshape(-1, 1, 1, 1)
    implied = noisy + (1 - sigma) * wrong
    expected = (implied - noise).square().flatten(1).mean(1) / (wrong - target).square().flatten(1).mean(1)
    torch.testing.assert_close(expected, torch.from_numpy(noise_form(scheduler)[places]).float(), rtol=1e-4, atol=1e-9)


def test_min_snr_of_a_velocity_weighs_the_predicted_sample_by_the_clamped_ratio() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=10)
    sigma = np.arange(1, 11) / 10
    snr = ((1 - sigma) / sigma) ** 2
    expected = np.minimum(snr, 5.0) * sigma**2  # the sample's error is sigma times the velocity's
    np.testing.assert_allclose(min_snr(alphas_of(scheduler), "flow_prediction"), expected, rtol=1e-6, atol=1e-12)


def test_flux_is_fed_as_its_pipeline_feeds_it() -> None:
    model, samples, scheduler = make("Flux"), given("Flux", 2), FlowMatchEulerDiscreteScheduler()
    noise, places = latents(2).flip(0), torch.tensor([99, 799])
    loss = noise_prediction_loss(model, scheduler, samples.values, noise, places, samples.extra, FLUX)
    sigma = torch.tensor([0.1, 0.8])
    share = sigma.reshape(-1, 1, 1, 1)
    noisy = (1 - share) * samples.values + share * noise
    packed = FluxPipeline._pack_latents(noisy, 2, 4, 8, 8)
    assert torch.equal(packed, pack(noisy))
    states = model(
        hidden_states=packed,
        timestep=sigma,  # the pipeline divides 1000 sigma by 1000
        guidance=torch.full((2,), 3.5),
        img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32),
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
        **samples.extra,
    )[0]
    velocity = FluxPipeline._unpack_latents(states, 64, 64, 8)
    expected = (velocity - (noise - samples.values)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["SD 3", "Flux"])
def test_calibration_counts_timesteps_by_the_loss_of_the_noise(name: str, tmp_path: Any) -> None:
    model, scheduler = make(name), FlowMatchEulerDiscreteScheduler()
    found = dp.calibrate(model, scheduler, given(name), dp.Sweep(samples=4, curve_samples=2), **FAST)
    assert found.scale is not None
    np.testing.assert_allclose(found.scale, (1 - (found.timesteps + 1) / 1000) ** 2, rtol=1e-5)
    relative = found.loss * found.scale / (found.loss * found.scale).max()
    np.testing.assert_array_equal(found.counts, relative > 0.05)
    assert not found.counts.all()
    assert all(bool(g.isfinite().all()) for g in found.gradients.values())
    found.save(tmp_path / "calibration")
    loaded = Calibration.load(tmp_path / "calibration")
    np.testing.assert_array_equal(loaded.scale, found.scale)
    assert loaded.with_threshold(0.06).counts.tolist() == found.counts.tolist()


def test_a_scheduler_of_the_other_objective_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"DDIMScheduler .* noise prediction, and a SD3Transformer2DModel is"):
        dp.calibrate(make("SD 3"), DDIMScheduler(), given("SD 3"), **FAST)


def test_samples_with_more_patches_than_the_model_has_places_are_one_line() -> None:
    model, samples = make("SD 3"), given("SD 3")  # 8 places of 2 pixels
    large = replace(samples, values=torch.zeros(4, 4, 18, 18))
    with pytest.raises(BadInput, match="data: samples are 18 x 18, the model takes 16 a side; make them smaller"):
        dp.calibrate(model, FlowMatchEulerDiscreteScheduler(), large, **FAST)
