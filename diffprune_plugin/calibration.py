"""Calibration: the loss at each timestep, which timesteps count, and the gradients of their sum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DDPMScheduler
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from diffprune_plugin.adapters.table import UNetAdapter
from diffprune_plugin.data import Samples, load_samples
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.files import new_directory, new_file
from diffprune_plugin.groups import differentiable
from diffprune_plugin.plan import first_line
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.tensors import load_tensors, save_tensors, weights_hash
from diffprune_plugin.timesteps import Sweep, above_threshold, share, strata

Curve = npt.NDArray[np.float64]
STAGES = {"curve": 0, "gradients": 1}


@dataclass(frozen=True)
class Calibration:
    """The loss curve, the timesteps that count, and the gradients of the loss summed over them.

    timesteps, loss, stderr, counts: one entry a point of the curve, shape (points,); ``loss`` is the mean squared
        error per element, ``stderr`` the standard error of its mean over samples, ``counts`` whether it counts.
    gradients: d(sum over counting timesteps of L_t) / d(parameter), float32 on the CPU, by parameter name.
    forward, backward: samples that went through the UNet each way.
    weights, images: SHA-256 of the UNet's parameters and of the samples.
    """

    sweep: Sweep
    timesteps: npt.NDArray[np.int64]
    loss: Curve
    stderr: Curve
    counts: npt.NDArray[np.bool_]
    gradients: dict[str, Tensor] = field(repr=False)
    forward: int
    backward: int
    seed: int
    batch_size: int
    weights: str
    images: str

    def matching(self, options: Mapping[str, Any]) -> Calibration:
        """The same for these options of a sweep; raises BadInput if its gradients are not what they ask for."""
        for key, value in options.items():
            stated = getattr(self.sweep, key)
            if key != "threshold" and value != stated:
                raise BadInput(f"importance: {key} {value!r}, but calibrated with {stated!r}; calibrate again")
        return self.with_threshold(options.get("threshold", self.sweep.threshold))

    def with_threshold(self, threshold: float) -> Calibration:
        """The same for another threshold, if the stored gradients are those of the timesteps that it keeps.

        Raises BadInput if it keeps other timesteps, or for the authors' loop, which the threshold ended.
        """
        if threshold == self.sweep.threshold:
            return self
        if self.sweep.sampling != "stratified":
            raise BadInput(f"the loop ended at threshold {self.sweep.threshold}, not {threshold}; calibrate again")
        counts = above_threshold(self.loss, threshold)
        if not np.array_equal(counts, self.counts):
            raise BadInput(
                f"threshold {threshold} keeps {int(counts.sum())} of {len(counts)} points of the loss curve, "
                f"the stored gradients are of {int(self.counts.sum())}; calibrate again"
            )
        return replace(self, sweep=replace(self.sweep, threshold=threshold))

    def save(self, directory: Path, overwrite: bool = False) -> None:
        """As calibration.json and gradients.safetensors, both or nothing."""
        content = {
            "sweep": self.sweep.as_dict(),
            "timesteps": self.timesteps.tolist(),
            "loss": self.loss.tolist(),
            "stderr": self.stderr.tolist(),
            "counts": self.counts.tolist(),
            "forward": self.forward,
            "backward": self.backward,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "weights": self.weights,
            "images": self.images,
        }
        with new_directory(Path(directory), overwrite) as temporary:
            save_tensors(self.gradients, temporary / "gradients.safetensors")
            (temporary / "calibration.json").write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Calibration:
        """What `save` wrote; raises BadInput if it is missing or damaged."""
        directory = Path(directory)
        try:
            content = json.loads((directory / "calibration.json").read_text())
            gradients, _ = load_tensors(directory / "gradients.safetensors")
            sweep = Sweep(**content.pop("sweep"))
            curves: dict[str, Any] = {
                key: np.asarray(content.pop(key)) for key in ("timesteps", "loss", "stderr", "counts")
            }
            return cls(sweep=sweep, gradients=gradients, **curves, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{directory}: not a calibration, or damaged: {first_line(error)}") from None


def calibrate(
    unet: nn.Module,
    scheduler: Any,
    images: Any,
    sweep: Sweep | None = None,
    *,
    batch_size: int = 32,
    timesteps: int | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 15.0,
    keep_progress: bool = False,
    progress: bool = True,
    adapter: UNetAdapter | None = None,
) -> Calibration:
    """Measure the UNet's noise-prediction loss over timesteps and sum its gradients over those that count.

    ``scheduler`` is the pipeline's own (epsilon, v_prediction or sample); ``images`` whatever `load_samples` takes.
    ``timesteps`` is the number of points of the loss curve, spread evenly (100; all of them for ``reference``).
    With stratified sampling each sample has its own seed, so that ``batch_size`` changes no result beyond float
    rounding. With ``checkpoint`` (a directory) an interrupted call goes on where it was and gives identical bits; its
    progress is cleared at the end unless ``keep_progress``.
    The UNet is left as it was.

    Raises BadInput for images that do not fit the UNet or an unknown prediction type, CheckFailed for a loss that is
    not finite.
    """
    adapter, sweep, samples = adapter or find_adapter(unet), sweep or Sweep(), load_samples(images)
    samples, scheduler = fitting(samples, unet, adapter), training_scheduler(scheduler)
    total = int(scheduler.config.num_train_timesteps)
    points = timesteps if timesteps is not None else default_points(sweep, total)
    if not 1 <= points <= total:
        raise BadInput(f"timesteps: {points} is outside 1..{total}, the scheduler's num_train_timesteps")
    if batch_size < 1:
        raise BadInput(f"batch_size: {batch_size} is below 1")
    run = Run(unet, scheduler, samples, sweep, batch_size, strata(total, points), seed, adapter)
    if checkpoint is not None:
        run.resume(Path(checkpoint), checkpoint_seconds)
    with gradients_of(unet), progress_bar(progress) as bar:
        if sweep.sampling == "stratified":
            run.measure_curve(bar)
            run.sum_gradients(bar)
        else:
            run.reference_loop(bar)
        calibration = run.result()
        run.checkpoint(now=keep_progress)
    if not keep_progress:
        run.forget_progress()
    return calibration


def default_points(sweep: Sweep, total: int) -> int:
    """A hundred points of the loss curve, or every timestep for the authors' loop."""
    return min(100, total) if sweep.sampling == "stratified" else total


class Run:
    """One calibration under way; ``losses``, ``stage``, ``done`` and the gradients are all that a resumed run needs."""

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,
        samples: Samples,
        sweep: Sweep,
        batch_size: int,
        points: list[npt.NDArray[np.int64]],
        seed: int,
        adapter: UNetAdapter,
    ) -> None:
        self.unet, self.scheduler, self.samples, self.sweep = unet, scheduler, samples, sweep
        self.batch_size, self.points, self.seed, self.adapter = batch_size, points, seed, adapter
        self.parameter = next(unet.parameters())
        self.weights = weights_hash(unet)
        stratified = sweep.sampling == "stratified"
        self.losses = np.full((len(points), sweep.curve_samples if stratified else batch_size), np.nan)
        self.stage, self.done = ("curve" if stratified else "gradients"), 0
        self.file: Path | None = None
        self.saved_at, self.every = time.monotonic(), 0.0
        self.saved_gradients: dict[str, Tensor] = {}

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
            draws = [self.draw("curve", self.done + i, self.points[point]) for i, (point, _) in enumerate(part)]
            with torch.no_grad():
                loss = self.loss(draws)
            self.losses[tuple(zip(*part, strict=True))] = loss.cpu().numpy()
            self.done += len(part)
            self.checkpoint()
        bar.update(task, completed=len(pairs))
        self.stage, self.done = "gradients", 0

    def sum_gradients(self, bar: Progress) -> None:
        """Accumulate the gradients of batches that mix the timesteps that count, spread evenly over them."""
        counting = np.concatenate([p for p, counts in zip(self.points, self.counts(), strict=True) if counts])
        self.restore_gradients()
        count = self.sweep.samples
        order = np.random.default_rng([self.seed, 2]).permutation(count)
        task = bar.add_task("gradients", total=count)
        while self.done < count:
            bar.update(task, completed=self.done)
            part = order[self.done : self.done + self.batch_size]
            draws = [self.draw("gradients", int(i), share(counting, int(i), count)) for i in part]
            torch.autograd.backward(self.loss(draws).sum() * (len(counting) / count))
            self.done += len(part)
            self.checkpoint()
        bar.update(task, completed=count)

    def reference_loop(self, bar: Progress) -> None:
        """The authors' loop: one timestep a pass from 0 on, until the batch's loss falls below T times the largest."""
        self.restore_gradients()
        task = bar.add_task("gradients (reference loop)", total=len(self.points))
        while self.done < len(self.points):
            bar.update(task, completed=self.done)
            timestep = self.points[self.done][:1]
            fresh = self.done * self.batch_size if self.sweep.sampling == "fresh" else 0
            loss = self.loss([self.draw("gradients", fresh + i, timestep) for i in range(self.batch_size)])
            self.losses[self.done] = loss.detach().cpu().numpy()
            means = self.losses[: self.done + 1].mean(axis=1)
            below = means[-1] < self.sweep.threshold * means.max()
            if not below or self.sweep.include_last:
                torch.autograd.backward(loss.mean())
            self.done = self.done + 1 if not below else len(self.points)
            self.checkpoint()
        bar.update(task, completed=len(self.points))

    def counts(self) -> npt.NDArray[np.bool_]:
        """Which points of the curve count."""
        loss = self.losses.mean(axis=1)
        if self.sweep.sampling == "stratified":
            return above_threshold(loss, self.sweep.threshold)
        measured = ~np.isnan(loss)
        largest = np.fmax.accumulate(loss)
        counts: npt.NDArray[np.bool_] = measured & ((loss >= self.sweep.threshold * largest) | self.sweep.include_last)
        return counts

    def draw(self, stage: str, index: int, timesteps: npt.NDArray[np.int64]) -> tuple[int, int, Tensor]:
        """Image row, timestep and noise of one sample; they depend on the seed, the stage and its index alone."""
        epoch, position = divmod(index, len(self.samples))
        rows = np.random.default_rng([self.seed, STAGES[stage], epoch]).permutation(len(self.samples))
        source = np.random.default_rng([self.seed, STAGES[stage], index, 1])
        generator = torch.Generator().manual_seed(int(source.integers(2**62)))
        noise = torch.randn(self.samples.shape, generator=generator)
        return int(rows[position]), int(source.choice(timesteps)), noise

    def loss(self, draws: list[tuple[int, int, Tensor]]) -> Tensor:
        """Loss of each sample, shape (len(draws),); raises CheckFailed if one is not finite."""
        rows, timesteps = torch.tensor([d[0] for d in draws]), torch.tensor([d[1] for d in draws])
        sample = self.samples.sample(rows).to(self.parameter)
        noise = torch.stack([d[2] for d in draws]).to(self.parameter)
        rest = {key: value[rows].to(self.parameter.device) for key, value in self.samples.extra.items()}
        extra = self.adapter.nested(rest)
        loss = noise_prediction_loss(self.unet, self.scheduler, sample, noise, timesteps.to(sample.device), extra)
        finite = torch.isfinite(loss)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0])
            place = f"batch at sample {self.done} of stage {self.stage}"
            raise CheckFailed(
                f"calibration: the loss is {loss[bad].item()} at timestep {timesteps[bad].item()}, "
                f"image {rows[bad].item()} ({place}); check the model's weights and the images"
            )
        return loss

    def result(self) -> Calibration:
        parameters = dict(self.unet.named_parameters())
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
            gradients={name: p.grad.float().cpu().contiguous() for name, p in parameters.items() if p.grad is not None},
            forward=int(losses.size) + (self.sweep.samples if self.sweep.sampling == "stratified" else 0),
            backward=self.sweep.samples
            if self.sweep.sampling == "stratified"
            else int(self.counts().sum()) * self.batch_size,
            seed=self.seed,
            batch_size=self.batch_size,
            weights=self.weights,
            images=self.samples.sha256,
        )

    def fingerprint(self) -> str:
        """Of everything that the result depends on: progress of other settings is never taken up."""
        scheduler = {k: v for k, v in dict(self.scheduler.config).items() if not k.startswith("_")}
        facts = [
            [str(self.parameter.device), str(self.parameter.dtype), torch.__version__],
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
        if self.file.exists():
            tensors, _ = load_tensors(self.file)
            self.losses = tensors.pop("losses").numpy()
            stage, done = tensors.pop("position").tolist()
            self.stage, self.done = list(STAGES)[stage], done
            self.saved_gradients = {name.removeprefix("grad."): tensor for name, tensor in tensors.items()}

    def restore_gradients(self) -> None:
        for name, parameter in self.unet.named_parameters():
            if name in self.saved_gradients:
                parameter.grad = self.saved_gradients[name].to(parameter)

    def checkpoint(self, now: bool = False) -> None:
        """Store the progress, if the last time is long enough ago, or ``now``."""
        if self.file is None or (time.monotonic() - self.saved_at < self.every and not now):
            return
        tensors = {f"grad.{n}": p.grad.cpu() for n, p in self.unet.named_parameters() if p.grad is not None}
        tensors["losses"] = torch.from_numpy(self.losses)
        tensors["position"] = torch.tensor([STAGES[self.stage], self.done])
        with new_file(self.file) as temporary:
            save_tensors(tensors, temporary)
        self.saved_at = time.monotonic()

    def forget_progress(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def noise_prediction_loss(
    unet: nn.Module, scheduler: Any, sample: Tensor, noise: Tensor, timesteps: Tensor, extra: Mapping[str, Any]
) -> Tensor:
    """Mean squared error of the UNet's prediction for each sample, shape (batch,), in float32.

    sample, noise: (batch, channels, height, width); timesteps: (batch,). What is predicted is the scheduler's
    prediction_type: the noise, the velocity, or the sample. Learned variances (twice the channels) are left out.
    """
    noisy = scheduler.add_noise(sample, noise, timesteps)
    prediction = unet(noisy, timesteps, **extra, return_dict=False)[0][:, : sample.shape[1]]
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        target = noise
    elif kind == "sample":
        target = sample
    elif kind == "v_prediction":
        target = scheduler.get_velocity(sample, noise, timesteps)
    else:
        raise BadInput(f"scheduler: prediction_type {kind!r} is none of epsilon, v_prediction, sample")
    loss: Tensor = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return loss


def training_scheduler(scheduler: Any) -> Any:
    """The scheduler whose add_noise is the training objective's: sqrt(alpha) sample + sqrt(1 - alpha) noise.

    Samplers that work in sigmas (Euler, DPM) share their betas with the DDPM scheduler and are replaced by it.

    Raises BadInput for a scheduler without alphas (variance exploding, flow matching).
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise BadInput(
            f"scheduler: {type(scheduler).__name__} has no alphas_cumprod; save the pipeline with a DDPM or DDIM"
        )
    return DDPMScheduler.from_config(scheduler.config) if hasattr(scheduler, "sigmas") else scheduler


def fitting(samples: Samples, unet: nn.Module, adapter: UNetAdapter) -> Samples:
    """The samples with just the further inputs that the UNet takes.

    Raises BadInput for samples of another size than the UNet takes, or without an input that it needs.
    """
    example = adapter.flat_inputs(unet)
    expected = tuple(example["sample"].shape[1:])
    if samples.shape != expected:
        raise BadInput(
            f"data: samples are {samples.shape} (channels, height, width), the UNet takes {expected}; convert them"
        )
    needed = set(example) - {"sample", "timestep"}
    if needed - set(samples.extra):
        raise BadInput(
            f"data: the UNet needs {sorted(needed - set(samples.extra))}; add an array of that name to the .npz"
        )
    return replace(samples, extra={key: samples.extra[key] for key in needed})


@contextlib.contextmanager
def gradients_of(unet: nn.Module) -> Iterator[None]:
    """Every parameter collects gradients, from none on, in eval mode; afterwards all is as it was."""
    before = [(parameter, parameter.grad) for parameter in unet.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        with differentiable(unet):
            yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def progress_bar(show: bool) -> Progress:
    """A bar on standard error with what is done and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show)
