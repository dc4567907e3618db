"""The training objective: what is predicted from what, and the loss of the prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.criteria.timestep_weights import alphas_of, min_snr, sigmas_of
from diffprune_plugin.diffusion.schedulers import prediction_type
from diffprune_plugin.errors import BadInput


class Noised(NamedTuple):
    """Noisy samples and what to predict from them, (batch, channels, ...), and the model's timesteps (batch,)."""

    sample: Tensor
    target: Tensor
    timesteps: Tensor


Objective = Callable[[Any, Tensor, Tensor, Tensor], Noised]


def noise_prediction_loss(
    model: nn.Module,
    scheduler: Any,
    sample: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    extra: Mapping[str, Any],
    adapter: ModelAdapter | None = None,
) -> Tensor:
    """Mean squared error of the model's prediction for each sample, shape (batch,), in float32.

    sample: (batch, channels, height, width); noise: likewise, or for the first channels only: those behind are a
    condition, clean; timesteps: (batch,); extra: further inputs by port name. What is predicted is the scheduler's
    prediction_type: the noise, the velocity, or the sample; the velocity noise - sample where the adapter says flow
    matching, whose training timesteps count from the cleanest. Learned variances, behind the prediction, are left out.
    Without an ``adapter`` the model takes noisy samples and timesteps by position.

    Raises BadInput where fewer channels are predicted than are noised.
    """
    return squared_error(*predicted(model, scheduler, sample, noise, timesteps, extra, adapter))


def predicted(
    model: nn.Module,
    scheduler: Any,
    sample: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    extra: Mapping[str, Any],
    adapter: ModelAdapter | None = None,
) -> tuple[Tensor, Tensor]:
    """The model's prediction for noisy samples and what it should be, both of the shape of ``noise``."""
    noisy, target, times = noised(scheduler, sample, noise, timesteps, adapter)
    if adapter is None:
        prediction = model(noisy, times, **extra, return_dict=False)[0]
    else:
        prediction = adapter.predict(model, noisy.to(next(model.parameters()).dtype), times, extra)
    if prediction.shape[1] < noise.shape[1]:
        raise BadInput(
            f"noise: {noise.shape[1]} channels, the model predicts {prediction.shape[1]}; give noise for these alone"
        )
    return prediction[:, : noise.shape[1]], target


def noised(scheduler: Any, sample: Tensor, noise: Tensor, timesteps: Tensor, adapter: ModelAdapter | None) -> Noised:
    """Samples with noise in as many of their first channels as there are in ``noise``, and what is to be predicted."""
    channels = noise.shape[1]
    noisy, target, times = objective_of(adapter)(scheduler, sample[:, :channels], noise, timesteps)
    if adapter is not None and adapter.model_time != 1:
        times = times * adapter.model_time
    return Noised(torch.cat([noisy, sample[:, channels:]], 1), target, times)


def noise_prediction(scheduler: Any, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
    """Noisy samples and what is to be predicted from them: the noise, or what it and the sample give."""
    noisy = scheduler.add_noise(sample, noise, timesteps)
    return Noised(noisy, target_of(scheduler, sample, noise, timesteps), timesteps)


def flow_matching(scheduler: Any, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
    """(1 - sigma) sample + sigma noise, the velocity noise - sample, and sigma times num_train_timesteps.

    sigma: the scheduler's own, ``timesteps`` the place among them, the cleanest first. arXiv 2403.03206, section 2.
    """
    table = torch.from_numpy(sigmas_of(scheduler)).float().to(timesteps.device)
    sigmas = table[timesteps]
    share = sigmas.reshape(-1, *[1] * (sample.dim() - 1)).to(sample)
    return Noised((1 - share) * sample + share * noise, noise - sample, sigmas * len(table))


# By `ModelAdapter.objective`, of a scheduler, samples, noise and training timesteps.
OBJECTIVES: dict[str, Objective] = {"noise_prediction": noise_prediction, "flow_matching": flow_matching}


def objective_of(adapter: ModelAdapter | None) -> Objective:
    """What the adapter's model was trained for; raises BadInput for an objective that is not known here."""
    name = "noise_prediction" if adapter is None else adapter.objective
    if name not in OBJECTIVES:
        raise BadInput(f"adapter {adapter and adapter.model_class}: objective {name!r}: known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def target_of(scheduler: Any, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the scheduler's prediction_type says is predicted; raises BadInput for one that is unknown."""
    kind = prediction_type(scheduler)
    if kind == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(sample, noise, timesteps)
        return velocity
    return noise if kind == "epsilon" else sample


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, shape (batch,), in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def min_snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Weight of each sample's loss by `min_snr`, shape (batch,), float32, on the device of ``timesteps`` (batch,)."""
    weights = min_snr(alphas_of(scheduler), prediction_type(scheduler), gamma)
    return torch.from_numpy(weights).float().to(timesteps.device)[timesteps]
