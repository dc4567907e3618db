"""How a calibration is made: the sweep over timesteps, resumable to identical bits."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import Tensor, nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.calibration.gradients import GradientSums, gradients_of
from diffprune_plugin.calibration.timesteps import above_threshold, share, strata
from diffprune_plugin.criteria.sweep import POWERS, Sweep
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.batches import CURVE, GRADIENTS, Draw, batch_of, draw, settled_dropout
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.diffusion.loss import noise_prediction_loss
from diffprune_plugin.diffusion.schedulers import trained_for, training_scheduler
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.plugins import find_adapter, weights_of_timesteps
from diffprune_plugin.utils.distributed import Processes
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.memory import Passes, checkpointing
from diffprune_plugin.utils.progress import progress_bar
from diffprune_plugin.utils.tensors import load_tensors, save_tensors, weights_hash

Result = TypeVar("Result")
STAGES = {"curve": CURVE, "gradients": GRADIENTS}


def calibrate(
    model: nn.Module,
    scheduler: Any,
    images: Any,
    sweep: Sweep | None = None,
    *,
    batch_size: int = 32,
    timesteps: int | None = None,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    autocast: bool = False,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 15.0,
    keep_progress: bool = False,
    progress: bool = True,
    adapter: ModelAdapter | None = None,
) -> Calibration:
    """Measure the UNet's noise-prediction loss over timesteps and sum its gradients over those that count.

    What is summed, and with which weights, the sweep says: `Sweep.accumulate`, `Sweep.timestep_weights`.

    ``scheduler`` is the pipeline's own (epsilon, v_prediction or sample); ``images`` whatever `load_samples` takes.
    ``timesteps`` is the number of points of the loss curve, spread evenly (100; all of them for ``reference``).
    With stratified sampling each sample has its own seed, so that ``batch_size`` changes no result beyond float
    rounding; gradients add up in float32. Where memory runs out, half as many samples go through the UNet at once, with
    the same result. ``gradient_checkpointing`` trades time for memory; ``autocast`` computes in bfloat16.
    With ``checkpoint`` (a directory) an interrupted call goes on where it was and gives identical bits; its
    progress is cleared at the end unless ``keep_progress``. Where torch.distributed is initialized (by Accelerate, say)
    all processes have to make the same call: each takes its part of every batch, and all get the whole result. What
    fails on one of them fails on all. The UNet is left as it was.

    Raises BadInput for images that do not fit the UNet, an unknown prediction type, too little memory for a single
    sample, or processes that were not given the same; CheckFailed for a loss that is not finite.
    """

    def begun() -> Run:
        given = model, scheduler, load_samples(images), sweep or Sweep()
        return begin(*given, batch_size, timesteps, seed, adapter or find_adapter(model), autocast)

    processes = Processes(next(model.parameters()).device)
    run = processes.on_all(begun)
    sweep = run.sweep
    if not processes.same(int(run.fingerprint()[:15], 16)):
        raise BadInput("calibration: the model, the data or the settings are not the same for all processes")
    if checkpoint is not None:
        run.resume(Path(checkpoint), checkpoint_seconds)
    with (
        gradients_of(model),
        run.sums.collecting(),
        checkpointing(model, gradient_checkpointing),
        progress_bar(progress and processes.is_first) as bar,
    ):
        if sweep.sampling == "stratified":
            run.measure_curve(bar)
            (run.sum_gradients if sweep.accumulate == "sum" else run.sum_powers)(bar)
        else:
            run.reference_loop(bar)
        calibration = run.result()
        run.checkpoint(now=keep_progress)
    if not keep_progress:
        run.forget_progress()
    return calibration


def begin(
    model: nn.Module,
    scheduler: Any,
    samples: Samples,
    sweep: Sweep,
    batch_size: int,
    timesteps: int | None,
    seed: int,
    adapter: ModelAdapter,
    autocast: bool,
) -> Run:
    """A calibration at its first batch; raises BadInput for what does not fit together."""
    samples, scheduler = fitting(samples, model, adapter), training_scheduler(scheduler)
    sweep = replace(sweep, condition_dropout=settled_dropout(sweep.condition_dropout, samples, "importance"))
    total = int(scheduler.config.num_train_timesteps)
    points = timesteps if timesteps is not None else default_points(sweep, total)
    if not 1 <= points <= total:
        raise BadInput(f"timesteps: {points} is outside 1..{total}, the scheduler's num_train_timesteps")
    if batch_size < 1:
        raise BadInput(f"batch_size: {batch_size} is below 1")
    return Run(model, scheduler, samples, sweep, batch_size, strata(total, points), seed, adapter, autocast)


def default_points(sweep: Sweep, total: int) -> int:
    """A hundred points of the loss curve, or every timestep for the authors' loop."""
    return min(100, total) if sweep.sampling == "stratified" else total


class Run:
    """One calibration under way; ``losses``, ``stage``, ``done`` and the gradients are all that a resumed run needs."""

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        samples: Samples,
        sweep: Sweep,
        batch_size: int,
        points: list[npt.NDArray[np.int64]],
        seed: int,
        adapter: ModelAdapter,
        autocast: bool = False,
    ) -> None:
        self.model, self.scheduler, self.samples, self.sweep = model, scheduler, samples, sweep
        self.batch_size, self.points, self.seed, self.adapter = batch_size, points, seed, adapter
        self.autocast, self.passes, self.sums = autocast, Passes(batch_size), GradientSums(model)
        self.parameter = next(model.parameters())
        self.processes = Processes(self.parameter.device)
        self.timestep_weights = torch.from_numpy(weights_of_timesteps(sweep.timestep_weights, scheduler)).float()
        self.weights = weights_hash(model)
        stratified = sweep.sampling == "stratified"
        self.losses = np.full((len(points), sweep.curve_samples if stratified else batch_size), np.nan)
        self.stage, self.done = ("curve" if stratified else "gradients"), 0
        self.file: Path | None = None
        self.saved_at, self.every = time.monotonic(), 0.0

    def measure_curve(self, bar: Progress) -> None:
        """Fill ``losses`` (points, curve_samples): samples of random timesteps of each stratum, without gradients."""
        pairs = [(point, k) for k in range(self.sweep.curve_samples) for point in range(len(self.points))]
        task = bar.add_task("loss curve", total=len(pairs))
        if self.stage != "curve":
            bar.update(task, completed=len(pairs))
            return
        while self.done < len(pairs):
            bar.update(task, completed=self.done)
            part = pairs[self.done : self.done + self.batch_size]
            draws = [self.draw(CURVE, self.done + i, self.points[point]) for i, (point, _) in enumerate(part)]
            with torch.no_grad():
                loss = self.alike(self.passes.over, self.processes.part_of(draws), self.loss)
            self.losses[tuple(zip(*part, strict=True))] = self.together(loss, draws)
            self.done += len(part)
            self.checkpoint()
        bar.update(task, completed=len(pairs))
        self.stage, self.done = "gradients", 0

    def sum_gradients(self, bar: Progress) -> None:
        """Accumulate the gradients of batches that mix the timesteps that count, spread evenly over them."""
        counting = self.counting()
        count = self.sweep.samples
        order = np.random.default_rng([self.seed, 2]).permutation(count)
        task = bar.add_task("gradients", total=count)
        while self.done < count:
            bar.update(task, completed=self.done)
            part = order[self.done : self.done + self.batch_size]
            draws = [self.draw(GRADIENTS, int(i), share(counting, int(i), count)) for i in part]
            losses = self.alike(self.add_gradients, self.processes.part_of(draws), len(counting) / count)
            self.together(losses, draws)
            self.done += len(part)
            self.checkpoint()
        bar.update(task, completed=count)

    def sum_powers(self, bar: Progress) -> None:
        """Accumulate |gradient| ** power of micro-batches, each of one timestep; these spread evenly over what counts.

        G = (timesteps that count / micro-batches) * sum over micro-batches b of weight_t(b) |g_b| ** power,
        g_b the gradient of the mean loss of fresh samples at the timestep t(b).
        """
        counting = self.counting()
        size, count = self.sweep.micro_batch, self.sweep.drawn
        task = bar.add_task("gradients of micro-batches", total=count)
        while self.done < count:
            bar.update(task, completed=self.done)
            part = share(counting, self.done // size, count // size)
            timestep = np.random.default_rng([self.seed, GRADIENTS, self.done, 3]).choice(part, 1)
            draws = [self.draw(GRADIENTS, self.done + i, timestep) for i in range(size)]
            with self.one_gradient(int(timestep[0]), len(counting) * size / count):
                self.together(self.alike(self.add_gradients, self.processes.part_of(draws), 1 / size), draws)
            self.done += size
            self.checkpoint()
        bar.update(task, completed=count)

    def reference_loop(self, bar: Progress) -> None:
        """The authors' loop: one timestep a pass from 0 on, until the batch's loss falls below T times the largest."""
        task = bar.add_task("gradients (reference loop)", total=len(self.points))
        while self.done < len(self.points):
            bar.update(task, completed=self.done)
            timestep = self.points[self.done][:1]
            fresh = self.done * self.batch_size if self.sweep.sampling == "fresh" else 0
            draws = [self.draw(GRADIENTS, fresh + i, timestep) for i in range(self.batch_size)]
            own = self.processes.part_of(draws)
            graph = self.alike(self.passes.over, own, functools.partial(self.kept_loss, len(own)))
            self.losses[self.done] = self.together(graph, draws)
            means = self.losses[: self.done + 1].mean(axis=1)
            below = means[-1] < self.sweep.threshold * means.max()
            if not below or self.sweep.include_last:
                with self.one_gradient(int(timestep[0])):
                    known = graph if len(graph) == 1 else None
                    self.alike(self.add_gradients, own, 1 / self.batch_size, known)
            self.done = self.done + 1 if not below else len(self.points)
            self.checkpoint()
        bar.update(task, completed=len(self.points))

    def alike(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """What this process's part of the work returns; work that fails on one process, for want of memory say, fails
        on all.
        """
        return self.processes.on_all(functools.partial(work, *arguments))

    def kept_loss(self, whole: int, draws: Sequence[Draw]) -> Tensor:
        """The loss with its graph if all ``whole`` samples fit in one pass, else without."""
        loss = self.loss(draws)
        return loss if len(draws) == whole else loss.detach()

    def add_gradients(self, draws: Sequence[Draw], scale: float, known: list[Tensor] | None = None) -> list[Tensor]:
        """Add the gradients of the samples' losses times ``scale``; ``known``: the losses of all, used up.

        Where gradients are summed, each is weighted by its timestep. Returns the losses of each pass.
        """
        plain = self.sweep.accumulate == "sum"

        def run(part: Sequence[Draw]) -> Tensor:
            self.sums.begin()
            loss = known.pop() if known else self.loss(part)
            weights = self.timestep_weights[[draw.timestep for draw in part]].to(loss) if plain else 1.0
            torch.autograd.backward((loss * weights).sum() * scale)
            return loss.detach()

        return self.passes.over(draws, run, self.sums.repeating)

    @contextlib.contextmanager
    def one_gradient(self, timestep: int, scale: float = 1.0) -> Iterator[None]:
        """Where powers are accumulated, what all processes add inside is one gradient g of this timestep.

        The sums grow by scale * weight_t * |g| ** power, on the first process.
        """
        if self.sweep.accumulate == "sum":
            yield
            return
        totals, self.sums.totals = self.sums.totals, {}
        yield
        factor = scale * float(self.timestep_weights[timestep])
        gradients = self.gradients()  # every process takes part in the sum
        for name, gradient in gradients.items() if self.processes.is_first else ():
            grown = factor * gradient.abs() ** POWERS[self.sweep.accumulate]
            totals[name] = totals[name] + grown if name in totals else grown
        self.sums.totals = totals

    def counting(self) -> npt.NDArray[np.int64]:
        """The timesteps that count."""
        return np.concatenate([part for part, counts in zip(self.points, self.counts(), strict=True) if counts])

    def counts(self) -> npt.NDArray[np.bool_]:
        """Which points of the curve count."""
        loss = self.losses.mean(axis=1)
        if self.sweep.sampling == "stratified":
            return above_threshold(loss, self.sweep.threshold)
        measured = ~np.isnan(loss)
        largest = np.fmax.accumulate(loss)
        counts: npt.NDArray[np.bool_] = measured & ((loss >= self.sweep.threshold * largest) | self.sweep.include_last)
        return counts

    def draw(self, stage: int, index: int, timesteps: npt.NDArray[np.int64]) -> Draw:
        return draw(self.samples, self.seed, stage, index, timesteps, self.sweep.condition_dropout or 0.0)

    def loss(self, draws: Sequence[Draw]) -> Tensor:
        """Loss of each sample, shape (len(draws),)."""
        batch = batch_of(self.samples, draws).to(self.parameter)
        with torch.autocast(self.parameter.device.type, torch.bfloat16, enabled=self.autocast):
            given = self.scheduler, batch.sample, batch.noise, batch.timesteps, batch.extra, self.adapter
            return noise_prediction_loss(self.model, *given)

    def together(self, losses: Sequence[Tensor], draws: Sequence[Draw]) -> npt.NDArray[np.float64]:
        """The losses of all draws, of which each process has those of its own passes, shape (len(draws),).

        Raises CheckFailed, on every process, if one is not finite.
        """
        own = torch.cat([part.detach() for part in losses]) if losses else self.parameter.new_zeros(0)
        values = self.processes.gather(own.float(), len(draws)).cpu()
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0])
            raise CheckFailed(
                f"calibration: the loss is {values[bad].item()} at timestep {draws[bad].timestep}, "
                f"image {draws[bad].row} (batch at sample {self.done} of stage {self.stage}); "
                "check the model's weights and the images"
            )
        found: npt.NDArray[np.float64] = values.double().numpy()
        return found

    def result(self) -> Calibration:
        measured = ~np.isnan(self.losses).any(axis=1)
        losses = self.losses[measured]
        stderr = (
            losses.std(axis=1, ddof=1) / math.sqrt(losses.shape[1])
            if losses.shape[1] > 1
            else np.full(len(losses), np.nan)
        )
        return Calibration(
            sweep=self.sweep,
            timesteps=np.array(
                [part[len(part) // 2] if self.sweep.sampling == "stratified" else part[0] for part in self.points]
            )[measured],
            loss=losses.mean(axis=1),
            stderr=stderr,
            counts=self.counts()[measured],
            gradients={name: total.cpu().contiguous() for name, total in self.gradients().items()},
            forward=int(losses.size) + (self.sweep.drawn if self.sweep.sampling == "stratified" else 0),
            backward=self.sweep.drawn
            if self.sweep.sampling == "stratified"
            else int(self.counts().sum()) * self.batch_size,
            seed=self.seed,
            batch_size=self.batch_size,
            autocast=self.autocast,
            scheduler=trained_for(self.scheduler),
            points=len(self.points),
            weights=self.weights,
            images=self.samples.sha256,
        )

    def fingerprint(self) -> str:
        """Of everything that the result depends on: progress of other settings is never taken up."""
        scheduler = {k: v for k, v in dict(self.scheduler.config).items() if not k.startswith("_")}
        facts = [
            [self.parameter.device.type, str(self.parameter.dtype), self.autocast, torch.__version__],
            self.sweep.as_dict(),
            self.batch_size,
            self.seed,
            len(self.points),
            scheduler,
            self.weights,
            self.samples.sha256,
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def resume(self, directory: Path, every: float) -> None:
        """Take up the progress stored in ``directory``, if it is of these settings, and store progress there."""
        self.file, self.every = directory / f"progress-{self.fingerprint()[:16]}.safetensors", every
        tensors = self.alike(lambda file: load_tensors(file)[0] if file.exists() else None, self.file)
        if tensors is not None:
            self.losses = tensors.pop("losses").numpy()
            stage, done = tensors.pop("position").tolist()
            self.stage, self.done = list(STAGES)[stage], done
            if self.processes.is_first:  # what is stored is the sum over processes
                device = self.parameter.device
                self.sums.totals = {name.removeprefix("grad."): tensor.to(device) for name, tensor in tensors.items()}
        self.processes.check_same(self.done, self.file)

    def gradients(self) -> dict[str, Tensor]:
        """The sums so far over all processes, by parameter name; of those that have one on some process."""
        totals = self.sums.totals
        named = dict(self.model.named_parameters())
        has = self.processes.reduce(
            torch.tensor([name in totals for name in named], device=self.parameter.device).int()
        )
        return {
            name: self.processes.reduce(
                totals[name] if name in totals else torch.zeros_like(parameter, dtype=torch.float32)
            )
            for (name, parameter), some in zip(named.items(), has.tolist(), strict=True)
            if some
        }

    def checkpoint(self, now: bool = False) -> None:
        """Store the progress, if the last time is long enough ago, or ``now``; the first process writes."""
        if self.file is None:
            return
        if not self.processes.broadcast(time.monotonic() - self.saved_at >= self.every or now):
            return
        tensors = {f"grad.{name}": total.cpu() for name, total in self.gradients().items()}
        tensors["losses"] = torch.from_numpy(self.losses)
        tensors["position"] = torch.tensor([STAGES[self.stage], self.done])
        self.alike(self.write, tensors)
        self.saved_at = time.monotonic()

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Store the progress, by the first process."""
        if self.file is not None and self.processes.is_first:
            with new_file(self.file) as temporary:
                save_tensors(tensors, temporary)

    def forget_progress(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)
