"""Two published ways to repair a layer whose inputs lost channels, written anew from their papers, behind the hook.

Both look at each layer by itself, at the dense model's inputs to it. With their second moments G = E[x x^T] over
samples and positions, S the channels that stay and M those that go:

grail (arXiv 2602.23795): all channels are rebuilt from those that stay by ridge regression, B = (G_SS + r I)^-1 G_S:,
    and the map goes into the weights behind: W' = W B^T, of a convolution at each tap.
obs_linear (OBS-Diff, arXiv 2510.06751): the optimal brain surgeon's update, W'_S = W_S - W_M (K_MM)^-1 K_MS with
    K = (G + d I)^-1, where noisy timesteps weigh more in G. Of linear layers alone, as there; obs: of convolutions too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffprune_plugin import hookimpl
from diffprune_plugin.criteria.timestep_weights import alphas_of, log_decrease
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.diffusion.schedulers import training_scheduler
from diffprune_plugin.hookspecs import Compensation
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.removal import channels_to_go
from diffprune_plugin.recovery.compensate import SAMPLES, CompensationReport
from diffprune_plugin.recovery.draws import Draws, draw
from diffprune_plugin.recovery.ridge import Repair, by_position
from diffprune_plugin.recovery.systems import softmax_factors
from diffprune_plugin.utils.modes import evaluating

RIDGE, DAMPING = 1e-3, 1e-2  # as shares of the mean diagonal of G
Update = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_ridge(weight: Tensor, moments: Tensor, kept: Tensor) -> Tensor:
    """GRAIL's weights (outputs, kept, taps) of dense ones (outputs, channels, taps)."""
    inner = moments[kept][:, kept]
    ridge = RIDGE * inner.diagonal().mean() * torch.eye(len(kept), dtype=inner.dtype)
    rebuilt = torch.linalg.solve(inner + ridge, moments[kept])
    return torch.einsum("oct,sc->ost", weight, rebuilt)


def by_surgeon(weight: Tensor, moments: Tensor, kept: Tensor) -> Tensor:
    """OBS's weights (outputs, kept, taps) of dense ones (outputs, channels, taps)."""
    gone = torch.from_numpy(np.setdiff1d(np.arange(len(moments)), kept.numpy()))
    damping = DAMPING * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    inverse = torch.linalg.inv(moments + damping)
    moved = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
    return weight[:, kept] - torch.einsum("omt,ms->ost", weight[:, gone], moved)


def second_moments(dense: nn.Module, layers: list[str], draws: Draws, weights: Tensor, size: int) -> dict[str, Tensor]:
    """By layer the mean of x x^T, (channels, channels) in float64, over its inputs' positions and the samples."""
    sums = {name: torch.zeros((), dtype=torch.float64) for name in layers}

    def collector(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            rows = by_position(args[0]).double()
            part = torch.einsum("npc,npd,n->cd", rows, rows, weights[place[0]])
            sums[name] = sums[name] + part / rows.shape[1]

        return hook

    place = [slice(0)]
    hooks = [dense.get_submodule(name).register_forward_pre_hook(collector(name)) for name in layers]
    for place[0] in draws.batches(size):
        draws.forward(dense, place[0])
    for hook in hooks:
        hook.remove()
    return {name: total / weights.sum() for name, total in sums.items()}


@torch.no_grad()
def layer_by_layer(
    model: nn.Module,
    dense: nn.Module,
    plan: Any,
    scheduler: Any,
    images: Any,
    *,
    update: Update,
    kinds: tuple[type, ...],
    noisy: bool,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
    samples: int = SAMPLES,
) -> CompensationReport:
    """Refit the layers of these kinds behind the cuts, with as many noisy samples as `compensate_` takes.

    ``noisy``: timesteps weigh by `log_decrease`.
    """
    started, adapter = time.monotonic(), find_adapter(dense)
    data, scheduler = fitting(load_samples(images), dense, adapter, scheduler), training_scheduler(scheduler)
    rule = log_decrease(alphas_of(scheduler), "") if noisy else np.ones(len(alphas_of(scheduler)))
    gone = channels_to_go(dense, plan, adapter)
    behind = {name: channels for (name, side), channels in gone.items() if side == "in"}
    layers = [name for name in behind if isinstance(dense.get_submodule(name), kinds)]
    factors = {query: factor for query, factor in softmax_factors(model, dense, adapter).items() if query in layers}
    with evaluating(model, dense):
        draws = draw(data, scheduler, np.arange(len(rule)), samples, seed, next(dense.parameters()), adapter)
        weights = torch.from_numpy(rule)[draws.timesteps.long()]
        moments = second_moments(dense, layers, draws, weights, batch_size)
    repairs = []
    for name in layers:
        layer: Any = dense.get_submodule(name)
        outputs = np.setdiff1d(np.arange(len(layer.weight)), gone.get((name, "out"), []))
        weight = layer.weight[torch.from_numpy(outputs)].double().reshape(len(outputs), layer.weight.shape[1], -1)
        kept = torch.from_numpy(np.setdiff1d(np.arange(weight.shape[1]), behind[name]))
        new = update(weight, moments[name], kept)
        before, after = (error(weight, each, moments[name], kept) for each in (weight[:, kept], new))
        target: Any = model.get_submodule(name)
        target.weight.copy_((new * factors.get(name, 1.0)).reshape(target.weight.shape))
        repairs.append(Repair((name,), name, len(kept), samples, before, after, RIDGE))
    left = {name: "a layer of another kind" for name in behind if name not in layers}
    return CompensationReport(tuple(repairs), left, samples, time.monotonic() - started)


def error(weight: Tensor, new: Tensor, moments: Tensor, kept: Tensor) -> float:
    """What new weights get wrong of a layer's outputs, taps apart, as a share of the outputs' mean square."""
    difference = weight.clone()
    difference[:, kept] -= new
    wrong, whole = (torch.einsum("oct,cd,odt->", each, moments, each) for each in (difference, weight))
    return float(wrong / whole)


WAYS: dict[str, Compensation] = {
    "grail": partial(layer_by_layer, update=by_ridge, kinds=(nn.Linear, nn.Conv2d), noisy=False),
    "obs_linear": partial(layer_by_layer, update=by_surgeon, kinds=(nn.Linear,), noisy=True),
    "obs": partial(layer_by_layer, update=by_surgeon, kinds=(nn.Linear, nn.Conv2d), noisy=True),
}


@hookimpl
def diffprune_register_compensations(register: Callable[[str, Compensation], None]) -> None:
    for name, way in WAYS.items():
        register(name, way)
