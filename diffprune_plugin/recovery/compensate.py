"""Compensation: after a removal, refit the layers behind the cuts to what the dense UNet computed. No training step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.calibration.timesteps import share
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import CONDITION_DROPOUT, Samples, moved
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.diffusion.schedulers import training_scheduler
from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.groups import removed_channels, trace_groups
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.pruned_class import PrunedModelMixin, check_architecture
from diffprune_plugin.pruning.removal import check_groups
from diffprune_plugin.recovery.residual import residual_sum, trace, unpacked
from diffprune_plugin.recovery.ridge import Part, Repair, System, refusal
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.memory import free_memory
from diffprune_plugin.utils.modes import evaluating
from diffprune_plugin.utils.progress import progress_bar
from diffprune_plugin.utils.tensors import load_tensors, save_tensors, weights_hash

Passes = Literal["one", "layer"]
SAMPLES = 256
ALIVE = 8  # activations of the largest size that live at once
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLD = 8  # every eighth image is held out
UNKNOWNS = 4_608  # of one system; a layer with more is solved in blocks of input channels


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
    started = time.monotonic()
    adapter, data = adapter or find_adapter(dense), load_samples(images)
    check_models(model, dense, plan)
    data, scheduler = fitting(data, dense, adapter), training_scheduler(scheduler)
    if passes not in get_args(Passes) or batch_size < 1:
        raise BadInput(f"compensate: passes {passes!r} is not one or layer, or batch_size {batch_size} is below 1")
    total = int(scheduler.config.num_train_timesteps)
    timesteps = np.arange(total) if calibration is None else calibration.timesteps[calibration.counts]
    with evaluating(model, dense):
        draws = draw(data, scheduler, timesteps, samples, seed, next(model.parameters()), adapter)
        systems, left = find_systems(model, dense, plan, adapter)
        run = Run(model, dense, systems, draws, batch_size, seed, strengths, passes)
        if checkpoint is not None:
            contents = [plan.sha256, weights_hash(dense), weights_hash(model), data.sha256, dict(scheduler.config)]
            # Without passes: the memory that is free then may choose others for the call that goes on.
            settings = [samples, batch_size, timesteps.tolist(), seed, list(strengths)]
            run.resume(Path(checkpoint), [contents, settings])
        with progress_bar(progress) as bar:
            run.keep_targets(bar)
            run.refit(bar)
    run.forget_progress()
    return CompensationReport(tuple(run.repairs), left, samples, time.monotonic() - started)


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


@dataclass(frozen=True)
class Draws:
    """Noisy samples (count, channels, height, width), their timesteps and further inputs, and which are held out."""

    noisy: Tensor
    timesteps: Tensor
    extra: dict[str, Tensor]
    held_out: Tensor
    adapter: ModelAdapter

    def batches(self, size: int) -> list[slice]:
        return [slice(first, first + size) for first in range(0, len(self.noisy), size)]

    def forward(self, model: nn.Module, batch: slice) -> None:
        extra = {key: value[batch] for key, value in self.extra.items()}
        self.adapter.predict(model, self.noisy[batch], self.timesteps[batch], extra)


def draw(
    data: Samples, scheduler: Any, timesteps: Any, count: int, seed: int, like: Tensor, adapter: ModelAdapter
) -> Draws:
    """``count`` noisy samples, timesteps spread evenly, a tenth without their condition where the data knows what that
    is; held out are all samples of every eighth image.

    Raises BadInput for fewer than two images or samples.
    """
    if min(len(data), count) < 2:
        raise BadInput(f"compensate: {len(data)} images, {count} samples: it needs two of both, to hold one out")
    rng = np.random.default_rng(seed)
    image = np.arange(count) % len(data)
    fold = min(FOLD, len(data), count)
    rows = torch.from_numpy(rng.permutation(len(data))[image])
    chosen = torch.tensor([int(rng.choice(share(timesteps, int(i), count))) for i in rng.permutation(count)])
    noise = torch.randn((count, *data.shape), generator=torch.Generator().manual_seed(seed))
    noisy = scheduler.add_noise(data.sample(rows), noise, chosen).to(like)
    dropped = torch.from_numpy(np.random.default_rng([seed, 2]).random(count) < CONDITION_DROPOUT)
    extra = moved(data.inputs(rows, dropped), like)
    held_out = torch.from_numpy(image % fold == fold - 1).to(like.device)
    return Draws(noisy, chosen.to(like.device), extra, held_out, adapter)


def find_systems(
    model: nn.Module, dense: nn.Module, plan: PruningPlan, adapter: ModelAdapter
) -> tuple[list[System], dict[str, str]]:
    """The regressions in order of execution, and the layers behind a cut that none fits, with the reason."""
    groups = trace_groups(dense, adapter)
    check_groups(groups, plan)
    gone = removed_channels(groups, plan.removed_units())
    calls, repeated = trace(model, adapter)
    sums: dict[tuple[str, float], list[str]] = {}
    left: dict[str, str] = {}
    for name in (layer for layer, side in gone if side == "in"):
        reason = "called repeatedly" if name in repeated else "" if name in calls else "not called"
        reason = reason or refusal(model.get_submodule(name), calls[name].output)
        if reason:
            left[name] = reason
        else:
            sums.setdefault(residual_sum(model, calls, name), []).append(name)
    order = {name: place for place, name in enumerate(calls)}
    factors = softmax_factors(model, dense, adapter)
    systems = []
    for (block, coefficient), names in sorted(sums.items(), key=lambda item: order[item[0][0]]):
        channels = np.arange(len(dense.get_submodule(names[0]).weight))  # type: ignore[arg-type]
        kept = torch.from_numpy(np.setdiff1d(channels, gone.get((names[0], "out"), [])))
        for parts in split(model, sorted(names, key=order.__getitem__)):
            systems.append(System(block, parts, kept, coefficient, factors.get(block, 1.0)))
    return systems, left


def softmax_factors(model: nn.Module, dense: nn.Module, adapter: ModelAdapter) -> dict[str, float]:
    """What `remove_` multiplied each query projection with, to keep the dense softmax scale."""
    before, after = adapter.head_sizes(dense), adapter.head_sizes(model)
    return {query: math.sqrt(after[name] / before[name]) for query, name in adapter.queries(model).items()}


def split(model: nn.Module, names: list[str]) -> Iterator[list[Part]]:
    """The input channels of some layers, in systems of at most UNKNOWNS unknowns."""
    parts: list[Part] = []
    room = UNKNOWNS
    for name in names:
        layer: Any = model.get_submodule(name)
        channels, each = layer.weight.shape[1], layer.weight[0, 0].numel()
        pieces = -(-channels // max(UNKNOWNS // each, 1))
        size = -(-channels // pieces)
        for first in range(0, channels, size):
            part = Part(name, layer, first, min(first + size, channels))
            if parts and part.weight()[0].numel() > room:
                yield parts
                parts, room = [], UNKNOWNS
            parts.append(part)
            room -= part.weight()[0].numel()
    yield parts


class Stop(Exception):
    """Ends a forward pass that has gone far enough."""


@dataclass
class Run:
    """One compensation under way; everything that a resumed run needs is in ``repairs`` and the layers' weights."""

    model: nn.Module
    dense: nn.Module
    systems: list[System]
    draws: Draws
    batch_size: int
    seed: int
    strengths: Sequence[float]
    passes: Passes
    repairs: list[Repair] = field(default_factory=list)
    folder: Path | None = None
    rerunning: bool = False

    def keep_targets(self, bar: Progress) -> None:
        """One pass of the dense UNet over all samples, which keeps what each open system is fitted to."""
        batches = self.draws.batches(self.batch_size)
        for batch in bar.track(batches, description="dense activations"):
            with contextlib.ExitStack() as hooks:
                for number, system in self.open():
                    module = self.dense.get_submodule(system.block)
                    hooks.enter_context(module.register_forward_hook(self.keeper(number, system, batch)))
                self.draws.forward(self.dense, batch)

    def keeper(self, number: int, system: System, batch: slice) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            system.keep_target(unpacked(output), batch, len(self.draws.noisy), (self.seed * 1_000_003 + number) % 2**63)

        return hook

    def open(self) -> list[tuple[int, System]]:
        """The systems that are not solved yet, with their places."""
        return list(enumerate(self.systems))[len(self.repairs) :]

    def refit(self, bar: Progress) -> None:
        """Solve the open systems: all of them in one pass of the pruned UNet, or each in a pass of its own."""
        task = bar.add_task("compensate", total=len(self.systems), completed=len(self.repairs))
        waves = [self.open()] if self.passes == "one" else [[one] for one in self.open()]
        for wave in waves:
            for batch in self.draws.batches(len(self.draws.noisy) if self.passes == "one" else self.batch_size):
                with contextlib.ExitStack() as hooks, contextlib.suppress(Stop):
                    for _, system in wave:
                        self.watch(system, batch, hooks, bar, task)
                    self.draws.forward(self.model, batch)
            if self.passes == "layer":
                self.finish(wave[0][1], bar, task)

    def watch(self, system: System, batch: slice, hooks: contextlib.ExitStack, bar: Progress, task: Any) -> None:
        """Hooks that collect a system's rows when its block ends; in a single pass they also solve it there."""

        def remember(part: Part) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                if not self.rerunning:
                    system.inputs[part.name] = args[0]

            return hook

        def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.rerunning:
                return output
            system.collect(unpacked(output), batch, self.draws.held_out)
            if self.passes == "layer":
                raise Stop
            self.finish(system, bar, task)
            return self.rerun(module, args, kwargs)

        for part in system.parts:
            hooks.enter_context(part.layer.register_forward_pre_hook(remember(part)))
        block = self.model.get_submodule(system.block)
        hooks.enter_context(block.register_forward_hook(end, with_kwargs=True))

    def rerun(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's output with its new weights, which the pass goes on with."""
        self.rerunning = True
        try:
            return module(*args, **kwargs)
        finally:
            self.rerunning = False

    def finish(self, system: System, bar: Progress, task: Any) -> None:
        """Solve a system and store what came out."""
        self.repairs.append(system.solve(self.strengths, self.draws.held_out))
        if self.folder is not None:
            tensors = {
                f"{part.name}.{key}": value for part in system.parts for key, value in part.layer.named_parameters()
            }
            with new_file(self.folder / f"{len(self.repairs) - 1:04d}.safetensors") as path:
                save_tensors(tensors, path, {"repair": json.dumps(asdict(self.repairs[-1]))})
        bar.advance(task)

    def resume(self, directory: Path, facts: Any) -> None:
        """Take up the repairs stored in ``directory`` by a run of the same facts, and store those to come."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        self.folder = directory / f"compensate-{digest[:16]}"
        while (file := self.folder / f"{len(self.repairs):04d}.safetensors").exists():
            tensors, metadata = load_tensors(file)
            self.model.load_state_dict(tensors, strict=False)
            stored = json.loads(metadata["repair"])
            self.repairs.append(Repair(**{**stored, "layers": tuple(stored["layers"])}))

    def forget_progress(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
