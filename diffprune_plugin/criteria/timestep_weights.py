"""The built-in rules for the weight of each timestep that counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from diffprune_plugin.hookspecs import TimestepWeights, hookimpl

Weights = npt.NDArray[np.float64]


SNR_LIMIT = 5.0  # gamma of min-SNR, as in its paper


FLOW = "flow_prediction"  # diffusers' prediction_type of flow matching


LOG_RANGE = (0.8, 1.2)  # weights at the cleanest and the noisiest timestep


def sigmas_of(scheduler: Any) -> Weights:
    """The share of noise at each training timestep of flow matching, rising, shape (timesteps,).

    Of a scheduler as it is made, and as `training_scheduler` returns it: its sampling steps have others.
    """
    return np.sort(np.asarray(scheduler.sigmas, dtype=np.float64))


def alphas_of(scheduler: Any) -> Weights:
    """alphas_cumprod, shape (timesteps,); add_noise of diffusers leaves the tensor on the device of its samples.

    For flow matching, (1 - sigma) sample + sigma noise, those of the same ratio of signal and noise.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        sigmas = sigmas_of(scheduler)
        signal: Weights = (1 - sigmas) ** 2
        return signal / (signal + sigmas**2)
    alphas = scheduler.alphas_cumprod
    return np.asarray(alphas.cpu() if hasattr(alphas, "cpu") else alphas, dtype=np.float64)


def signal_to_noise(alphas_cumprod: Weights) -> Weights:
    """alpha / (1 - alpha) at each training timestep."""
    ratio: Weights = alphas_cumprod / np.maximum(1 - alphas_cumprod, 1e-12)
    return ratio


def uniform(alphas_cumprod: Weights, prediction_type: str) -> Weights:
    """Every timestep that counts weighs the same: alpha_t of arXiv 2305.10924 is 1 or 0."""
    return np.ones(len(alphas_cumprod))


def log_decrease(alphas_cumprod: Weights, prediction_type: str) -> Weights:
    """0.8 + 0.4 log(1 + t) / log(T): falls as sampling goes on, from the noisiest timestep to the cleanest.

    The idea of OBS-Diff (arXiv 2510.06751), where errors of early sampling steps accumulate.
    """
    low, high = LOG_RANGE
    position: Weights = np.log1p(np.arange(len(alphas_cumprod))) / max(np.log(len(alphas_cumprod)), 1.0)
    return low + (high - low) * position


def min_snr(alphas_cumprod: Weights, prediction_type: str, gamma: float = SNR_LIMIT) -> Weights:
    """min(SNR, gamma) as the weight of the predicted sample's loss, in terms of what is predicted (arXiv 2303.09556).

    SNR = alpha / (1 - alpha). The loss of the predicted noise is SNR times, that of the velocity SNR + 1 times the
    sample's, hence min(SNR, gamma) / SNR (1 at SNR = 0, where the quotient has no value) and / (SNR + 1). That of flow
    matching's velocity is 1 / sigma ** 2 = (1 + sqrt(SNR)) ** 2 times.
    """
    snr = signal_to_noise(alphas_cumprod)
    if prediction_type == "epsilon":
        return np.minimum(1.0, gamma / np.maximum(snr, 1e-12))
    if prediction_type == FLOW:
        weights: Weights = np.minimum(snr, gamma) / (1 + np.sqrt(snr)) ** 2
        return weights
    return np.minimum(snr, gamma) / (snr + 1 if prediction_type == "v_prediction" else 1)


@hookimpl
def diffprune_register_timestep_weights(register: Callable[[str, TimestepWeights], None]) -> None:
    for name, rule in {"uniform": uniform, "log_decrease": log_decrease, "min_snr": min_snr}.items():
        register(name, rule)
