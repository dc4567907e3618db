"""Compensation: after a removal, refit the layers behind the cuts to what the dense UNet computed. No training step."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from torch import nn

from diffprune_plugin.adapters.depth import Shallower
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import drawn_hash
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.diffusion.schedulers import settings_of, training_scheduler
from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.pruned_class import PrunedModelMixin, check_architecture
from diffprune_plugin.recovery.depth import depth_systems
from diffprune_plugin.recovery.draws import draw
from diffprune_plugin.recovery.refit import Passes, Refit
from diffprune_plugin.recovery.repair_files import RepairFiles
from diffprune_plugin.recovery.ridge import Repair, System
from diffprune_plugin.recovery.systems import find_systems
from diffprune_plugin.utils.memory import free_memory
from diffprune_plugin.utils.modes import evaluating
from diffprune_plugin.utils.progress import progress_bar
from diffprune_plugin.utils.tensors import weights_hash

SAMPLES = 256
ALIVE = 8  # activations of the largest size that live at once
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class CompensationReport:
    """Every repair in the order of execution; layers behind a cut that no regression fits, and why; the cost."""

    repairs: tuple[Repair, ...]
    left: dict[str, str]
    samples: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def compensate_(
    model: nn.Module,
    dense: nn.Module,
    plan: PruningPlan,
    scheduler: Any,
    images: Any,
    *,
    samples: int = SAMPLES,
    batch_size: int = 32,
    calibration: Calibration | None = None,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
    passes: Passes = "one",
    checkpoint: Path | None = None,
    progress: bool = True,
    adapter: ModelAdapter | None = None,
) -> CompensationReport:
    """Refit in place each layer of ``model`` whose inputs lost channels, so that it computes what ``dense`` computes.

    ``model`` is as `remove_` left it, ``dense`` as it was before; ``images`` whatever `load_samples` takes. Layer by
    layer in the order of execution, a ridge regression from the pruned inputs to the dense outputs at the kept
    channels, pulled towards the current weights; where the layer's output is added to others (a residual sum), to the
    dense sum. ``samples`` noisy images at timesteps spread evenly, or over those that ``calibration`` kept.
    ``passes="one"`` holds all samples' activations at once and goes through the UNet once; ``"layer"`` goes through
    it again for each repair, ``batch_size`` samples at a time: slower, in memory that depends on the layers' widths
    alone. With ``checkpoint`` (a directory) an interrupted call, given the same UNets again, goes on and gives
    identical bits; whatever ends a call, the layers refitted so far stay so.

    Raises BadInput for another dense UNet, a UNet not pruned by this plan, or images that do not fit; CheckFailed for
    activations that are not finite.
    """
    check_models(model, dense, plan)
    adapter = adapter or find_adapter(dense)

    def find() -> tuple[list[System], dict[str, str]]:
        return find_systems(model, dense, plan, adapter)

    options: dict[str, Any] = {"samples": samples, "batch_size": batch_size, "calibration": calibration, "seed": seed}
    options |= {"strengths": strengths, "passes": passes, "checkpoint": checkpoint, "progress": progress}
    return refit_(model, dense, find, plan.sha256, scheduler, images, adapter, **options)


@torch.no_grad()
def compensate_depth_(
    model: nn.Module,
    dense: nn.Module,
    shallower: Shallower,
    scheduler: Any,
    images: Any,
    *,
    adapter: ModelAdapter | None = None,
    **options: Any,
) -> CompensationReport:
    """Refit in place the layers of ``model`` behind the blocks that ``dense`` has more, as `cut_out` says.

    The two share no tensor; the ``options`` are those of `compensate_`. A repair is kept where its error on held-out
    images falls. Where blocks before a gap write to the stream through gates, all is done with and without fitting
    these, and what has the lower error of the output on held-out images is kept. Raises what `compensate_` raises.
    """
    adapter = adapter or find_adapter(dense)

    def refitted(model: nn.Module, gates: bool) -> tuple[CompensationReport, float]:
        def find() -> tuple[list[System], dict[str, str]]:
            return depth_systems(model, dense, shallower, adapter, gates)

        report = refit_(model, dense, find, [list(shallower.gone), gates], scheduler, images, adapter, **options)
        return report, output_error(model, dense, scheduler, images, adapter, options)

    through = copy.deepcopy(model)
    report, error = refitted(model, False)
    with evaluating(through, dense):
        systems, _ = depth_systems(through, dense, shallower, adapter, True)
    if any(system.gated for system in systems):
        other, its_error = refitted(through, True)
        if its_error < error:
            model.load_state_dict(through.state_dict())
            report = replace(other, seconds=report.seconds + other.seconds)
    return report


def output_error(
    model: nn.Module, dense: nn.Module, scheduler: Any, images: Any, adapter: ModelAdapter, options: Mapping[str, Any]
) -> float:
    """The squared difference of the outputs on the held-out samples of a call with these options."""
    data, scheduler = fitting(load_samples(images), dense, adapter, scheduler), training_scheduler(scheduler)
    timesteps = np.arange(int(scheduler.config.num_train_timesteps))
    given = options.get("samples", SAMPLES), options.get("seed", 0), next(model.parameters()), adapter
    draws, total = draw(data, scheduler, timesteps, *given), 0.0
    with evaluating(model, dense):
        for rows in torch.split(draws.held_out.nonzero().flatten(), options.get("batch_size", 32)):
            extra = {key: value[rows] for key, value in draws.extra.items()}
            outputs = [
                adapter.predict(each, draws.noisy[rows], draws.timesteps[rows], extra) for each in (model, dense)
            ]
            total += float((outputs[0] - outputs[1]).double().square().sum())
    return total


def refit_(
    model: nn.Module,
    dense: nn.Module,
    find: Callable[[], tuple[list[System], dict[str, str]]],
    what: Any,
    scheduler: Any,
    images: Any,
    adapter: ModelAdapter,
    *,
    samples: int = SAMPLES,
    batch_size: int = 32,
    calibration: Calibration | None = None,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
    passes: Passes = "one",
    checkpoint: Path | None = None,
    progress: bool = True,
) -> CompensationReport:
    """The regressions that ``find`` returns, solved; ``what`` went, in plain values, tells one run from another."""
    started, data = time.monotonic(), load_samples(images)
    data, scheduler = fitting(data, dense, adapter, scheduler), training_scheduler(scheduler)
    if passes not in get_args(Passes) or batch_size < 1:
        raise BadInput(f"compensate: passes {passes!r} is not one or layer, or batch_size {batch_size} is below 1")
    total = int(scheduler.config.num_train_timesteps)
    timesteps = np.arange(total) if calibration is None else calibration.timesteps[calibration.counts]
    files = None
    if checkpoint is not None:
        contents = [what, weights_hash(dense), weights_hash(model), drawn_hash(data), settings_of(scheduler)]
        # Without passes: the memory that is free then may choose others for the call that goes on.
        settings = [samples, batch_size, timesteps.tolist(), seed, list(strengths)]
        files = RepairFiles(Path(checkpoint), [contents, settings])
    with evaluating(model, dense):
        draws = draw(data, scheduler, timesteps, samples, seed, next(model.parameters()), adapter)
        systems, left = find()
        run = Refit(model, dense, systems, draws, batch_size, seed, strengths, passes, files)
        with progress_bar(progress) as bar:
            run.keep_targets(bar)
            run.run(bar)
    if files is not None:
        files.forget()
    return CompensationReport(tuple(run.repairs), left, samples, time.monotonic() - started)


def joined(first: CompensationReport | None, second: CompensationReport | None) -> CompensationReport | None:
    """Two reports as one, in their order."""
    if first is None or second is None:
        return first or second
    left, seconds = first.left | second.left, first.seconds + second.seconds
    return CompensationReport(first.repairs + second.repairs, left, second.samples, seconds)


@torch.no_grad()
def passes_that_fit(dense: nn.Module, samples: int = SAMPLES, adapter: ModelAdapter | None = None) -> Passes:
    """``one``, if the activations of all samples take half of the free memory at most, by estimate; else ``layer``.

    As many as ALIVE activations of the size of the largest live at once: what a block computes with, and the skips.
    """
    sizes: list[int] = [0]
    with contextlib.ExitStack() as hooks, evaluating(dense):
        for module in dense.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                note = module.register_forward_hook(lambda _, __, out: sizes.append(out.numel() * out.element_size()))
                hooks.callback(note.remove)
        dense(**(adapter or find_adapter(dense)).example_inputs(dense))
    needed, free = samples * ALIVE * max(sizes), free_memory(next(dense.parameters()).device)
    if 2 * needed <= free:
        return "one"
    shown = f"{needed / 2**30:.1f} of {free / 2**30:.1f} GiB"
    Console(stderr=True).print(
        f"compensate: {samples} samples at once would take about {shown}: a pass for each layer instead, slower, with "
        "the same result",
        soft_wrap=True,
    )
    return "layer"


def check_models(model: nn.Module, dense: nn.Module, plan: PruningPlan) -> None:
    """Raises BadInput unless ``dense`` is the UNet that the plan was made for and ``model`` was pruned by it."""
    check_architecture(dense, plan, f"compensate: the dense {type(dense).__name__}")
    if not isinstance(model, PrunedModelMixin):
        raise BadInput(f"compensate: the {type(model).__name__} is not pruned; call remove_(unet, plan) first")
    if model.pruning_plan.sha256 != plan.sha256:
        given, stated = plan.sha256[:12], model.pruning_plan.sha256[:12]
        raise BadInput(f"compensate: the UNet was pruned by plan {stated}, not by {given}; give unet.pruning_plan")
