"""The loops over batches: the loss curve, the ways of adding up gradients over it, and the authors' own loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rich.progress import Progress as Bar

from diffprune_plugin.calibration.batches import Batches
from diffprune_plugin.calibration.progress import Progress
from diffprune_plugin.calibration.settings import Settings
from diffprune_plugin.calibration.timesteps import counting, share
from diffprune_plugin.criteria.sweep import Accumulation
from diffprune_plugin.diffusion.batches import CURVE, GRADIENTS

Loop = Callable[[Settings, Progress, Batches, Bar], None]


def run_loops(settings: Settings, progress: Progress, bar: Bar) -> None:
    """Go on from the batch where ``progress`` is, to the end."""
    batches = Batches(settings, progress)
    if settings.stratified:
        measure_curve(settings, progress, batches, bar)
    while progress.part < len(settings.parts):
        progress.sums.wanted = settings.parts[progress.part]
        loop = SUMS[settings.sweep.accumulate] if settings.stratified else reference_loop
        loop(settings, progress, batches, bar)
        progress.sums.finish(progress.processes)
        progress.part, progress.done = progress.part + 1, 0
        progress.save()


def measure_curve(settings: Settings, progress: Progress, batches: Batches, bar: Bar) -> None:
    """Fill the losses (points, curve_samples): samples of random timesteps of each stratum, without gradients."""
    pairs = [(point, k) for k in range(settings.sweep.curve_samples) for point in range(len(settings.points))]
    task = bar.add_task("loss curve", total=len(pairs))
    if progress.stage != "curve":
        bar.update(task, completed=len(pairs))
        return
    while progress.done < len(pairs):
        bar.update(task, completed=progress.done)
        part = pairs[progress.done : progress.done + settings.batch_size]
        points = [settings.points[point] for point, _ in part]
        draws = [settings.draw(CURVE, progress.done + i, point) for i, point in enumerate(points)]
        progress.losses[tuple(zip(*part, strict=True))] = batches.measure(draws)
        progress.done += len(part)
        progress.save()
    bar.update(task, completed=len(pairs))
    progress.stage, progress.done = "gradients", 0


def sum_gradients(settings: Settings, progress: Progress, batches: Batches, bar: Bar) -> None:
    """Add up the gradients of batches that mix the timesteps that count, spread evenly over them."""
    timesteps = counting(settings.points, progress.losses, settings.sweep, settings.scale)
    count = settings.sweep.samples
    order = np.random.default_rng([settings.seed, 2]).permutation(count)
    task = bar.add_task(titled("gradients", settings, progress), total=count)
    while progress.done < count:
        bar.update(task, completed=progress.done)
        part = order[progress.done : progress.done + settings.batch_size]
        draws = [settings.draw(GRADIENTS, int(i), share(timesteps, int(i), count)) for i in part]
        batches.add(draws, len(timesteps) / count)
        progress.done += len(part)
        progress.save()
    bar.update(task, completed=count)


def sum_powers(settings: Settings, progress: Progress, batches: Batches, bar: Bar) -> None:
    """Add up |gradient| ** power of micro-batches, each of one timestep; these spread evenly over what counts.

    G = (timesteps that count / micro-batches) * sum over micro-batches b of weight_t(b) |g_b| ** power,
    g_b the gradient of the mean loss of fresh samples at the timestep t(b).
    """
    timesteps = counting(settings.points, progress.losses, settings.sweep, settings.scale)
    size, count = settings.sweep.micro_batch, settings.sweep.drawn
    task = bar.add_task(titled("gradients of micro-batches", settings, progress), total=count)
    while progress.done < count:
        bar.update(task, completed=progress.done)
        part = share(timesteps, progress.done // size, count // size)
        timestep = np.random.default_rng([settings.seed, GRADIENTS, progress.done, 3]).choice(part, 1)
        draws = [settings.draw(GRADIENTS, progress.done + i, timestep) for i in range(size)]
        with batches.one_gradient(int(timestep[0]), len(timesteps) * size / count):
            batches.add(draws, 1 / size)
        progress.done += size
        progress.save()
    bar.update(task, completed=count)


def titled(what: str, settings: Settings, progress: Progress) -> str:
    """With which part of the model it is, where there are several."""
    parts = len(settings.parts)
    return what if parts == 1 else f"{what}, part {progress.part + 1} of {parts}"


def reference_loop(settings: Settings, progress: Progress, batches: Batches, bar: Bar) -> None:
    """The authors' loop: one timestep a pass from 0 on, until the batch's loss falls below T times the largest."""
    points, sweep, size = settings.points, settings.sweep, settings.batch_size
    task = bar.add_task("gradients (reference loop)", total=len(points))
    while progress.done < len(points):
        bar.update(task, completed=progress.done)
        timestep = points[progress.done][:1]
        fresh = progress.done * size if sweep.sampling == "fresh" else 0
        draws = [settings.draw(GRADIENTS, fresh + i, timestep) for i in range(size)]
        progress.losses[progress.done], graph = batches.measure_with_graph(draws)
        scale = 1 if settings.scale is None else settings.scale[: progress.done + 1]
        means = progress.losses[: progress.done + 1].mean(axis=1) * scale
        below = means[-1] < sweep.threshold * means.max()
        if not below or sweep.include_last:
            with batches.one_gradient(int(timestep[0])):
                batches.add(draws, 1 / size, graph)
        progress.done = progress.done + 1 if not below else len(points)
        progress.save()
    bar.update(task, completed=len(points))


SUMS: dict[Accumulation, Loop] = {"sum": sum_gradients, "absolute": sum_powers, "square": sum_powers}
