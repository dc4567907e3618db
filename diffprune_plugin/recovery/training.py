"""The training loop: one step after another, resumable to identical bits, on as many processes as Accelerate has."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.calibration.timesteps import share
from diffprune_plugin.config.finetuning import FinetuneConfig
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.batches import FINETUNE, Batch, batch_of, draw, settled_dropout
from diffprune_plugin.diffusion.loss import min_snr_weights, predicted, squared_error
from diffprune_plugin.errors import CheckFailed
from diffprune_plugin.recovery.distillation import feature_error, watched
from diffprune_plugin.recovery.lora import LowRank
from diffprune_plugin.recovery.sharded import split_as, whole
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.tensors import load_tensors, save_tensors

GRADIENT_NORM = "grad_norm"


def deaf(_: int) -> None:
    """A process that loads data ends with the one that it works for, and not by itself on Ctrl-C; its own errors it
    sends there, and of a connection that is lost in the end its threads say nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *_: None


@dataclass(frozen=True)
class Teacher:
    """The dense UNet, and the blocks whose outputs are compared, with the channels that the pruned one kept."""

    model: nn.Module
    kept: Mapping[str, Tensor]


@dataclass(frozen=True)
class Shares(Dataset[Batch]):
    """The batches of one process, one a forward pass; a step has as many as gradients are accumulated over."""

    samples: Samples
    config: FinetuneConfig
    dropout: float
    timesteps: int
    process: int
    processes: int

    def __getitem__(self, number: int) -> Batch:
        """Batch ``number`` of this process, counted from the first step on."""
        config = self.config
        step, part = divmod(number, config.gradient_accumulation_steps)
        size = config.batch_size // (config.gradient_accumulation_steps * self.processes)
        first = (part * self.processes + self.process) * size
        every = np.arange(self.timesteps)
        draws = []
        for place in range(first, first + size):
            spread = config.timestep_sampling == "stratified"
            choice = share(every, place, config.batch_size) if spread else every
            index = step * config.batch_size + place
            draws.append(draw(self.samples, config.seed, FINETUNE, index, choice, self.dropout))
        return batch_of(self.samples, draws)


@dataclass
class Training:
    """One training under way; what `save` stores is all that a resumed one needs, since every batch, and the random
    numbers inside the model, follow from the seed and the step.
    """

    model: nn.Module
    teacher: Teacher | None
    scheduler: Any
    samples: Samples
    config: FinetuneConfig
    adapter: ModelAdapter
    accelerator: Accelerator
    file: Path
    step: int = 0
    seconds: float = 0.0
    norm: float = 0.0  # of the gradients of the step under way, before they are clipped
    curve: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        self.low_rank = LowRank.add_(self.model, config.lora, config.seed) if config.lora else None
        # A model that came frozen is trained whole; of another what is frozen stays so, such as Fourier frequencies.
        if not self.low_rank and not any(parameter.requires_grad for parameter in self.model.parameters()):
            self.model.requires_grad_(True)
        self.model.train()
        for module in self.model.modules():
            if hasattr(module, "token_drop"):  # of DiT's labels, in each block by itself: condition_dropout does that
                module.eval()
        # Walking the modules takes milliseconds, every time.
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.plain_optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self.accelerator.scaler is None or None,  # with fp16's scaler a skipped step would not be noticed
        )
        warmup = config.warmup_steps if config.warmup_steps is not None else config.steps // 20
        name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
        self.rate = get_scheduler(name, self.plain_optimizer, num_warmup_steps=warmup, num_training_steps=config.steps)
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, self.plain_optimizer)
        # Where the model is split over the processes, parts have taken the place of its parameters.
        self.trained = {name: p for name, p in self.model.named_parameters() if name in self.trained}
        self.parameters = list(self.trained.values())
        self.ema = EMAModel(self.parameters, decay=config.ema_decay, foreach=True)
        self.terms = {name: weight for name, weight in config.weights().items() if weight}
        self.curve = {name: [] for name in ("loss", *self.terms, GRADIENT_NORM)}

    def run(self, bar: Progress) -> None:
        """Train to the last step, with a checkpoint every ``checkpoint_every`` steps.

        Raises CheckFailed, on every process, if the loss or a gradient is not finite.
        """
        config, accelerator = self.config, self.accelerator
        task = bar.add_task("fine-tune", total=config.steps, completed=self.step)
        passes, before = config.gradient_accumulation_steps, time.monotonic() - self.seconds
        rank, processes = accelerator.process_index, accelerator.num_processes
        dropout = settled_dropout(config.condition_dropout, self.samples, "fine-tune")
        total = int(self.scheduler.config.num_train_timesteps)
        data = Shares(self.samples, config, dropout, total, rank, processes)
        order = range(self.step * passes, config.steps * passes)
        sums: dict[str, float] = dict.fromkeys(("loss", *self.terms), 0.0)
        batches = DataLoader(data, None, sampler=order, num_workers=config.num_workers, worker_init_fn=deaf)
        for number, batch in zip(order, batches, strict=True):
            torch.manual_seed(int(np.random.SeedSequence([config.seed, number, rank]).generate_state(1)[0]))
            with accelerator.accumulate(self.prepared):
                means = self.run_pass(batch)
                sums = {name: total + means[name] / passes for name, total in sums.items()}
            if accelerator.sync_gradients:
                self.finish_step({**sums, GRADIENT_NORM: self.norm})
                sums = dict.fromkeys(sums, 0.0)
                self.seconds = time.monotonic() - before
                rate = self.plain_optimizer.param_groups[0]["lr"]
                bar.update(task, completed=self.step, description=f"loss {self.curve['loss'][-1]:.4f} lr {rate:.1e}")

    def run_pass(self, batch: Batch) -> dict[str, float]:
        """Gradients of one batch, at the end of a step also the optimizer's step; the mean of each term of the loss."""
        terms = self.losses(batch.to(next(self.model.parameters())))
        total = torch.stack([self.terms[name] * loss for name, loss in terms.items()]).sum(0)
        terms = {"loss": total, **terms}
        means = self.checked(terms, batch)
        self.accelerator.backward(terms["loss"].mean())
        if self.accelerator.sync_gradients:
            self.clip(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return means

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Each term of the loss for each sample, shape (batch,); those of predictions with the weights of min-SNR."""
        inputs = self.scheduler, batch.sample, batch.noise, batch.timesteps, batch.extra, self.adapter
        kept = self.teacher.kept if self.teacher else {}
        with watched(self.model, kept) as values:
            prediction, target = predicted(self.prepared, *inputs)
        terms = {"task": squared_error(prediction, target)}
        if self.teacher:
            with torch.no_grad(), self.accelerator.autocast(), watched(self.teacher.model, kept) as taught:
                teacher, _ = predicted(self.teacher.model, *inputs)
            terms["output"] = squared_error(prediction, teacher)
        if self.config.snr_gamma is not None:
            weights = min_snr_weights(self.scheduler, batch.timesteps, self.config.snr_gamma)
            terms = {name: loss * weights for name, loss in terms.items()}
        if kept:
            terms["features"] = feature_error(values, taught, kept)
            if self.accelerator.num_processes > 1:  # they wait for a gradient, if only of 0, of every layer
                terms["features"] = terms["features"] + 0.0 * prediction.float().flatten(1).sum(1)
        return {name: loss for name, loss in terms.items() if name in self.terms}

    def checked(self, terms: Mapping[str, Tensor], batch: Batch) -> dict[str, float]:
        """The mean of each term over all processes; raises CheckFailed on all of them if a loss is not finite."""
        everyone = self.accelerator.gather(torch.stack([loss.detach() for loss in terms.values()], 1))
        bad = ~torch.isfinite(everyone).all(1)
        if bool(bad.any()):
            self.stop(f"the loss is {everyone[bad][0, 0].item()}", batch, bad)
        return dict(zip(terms, everyone.mean(0).tolist(), strict=True))

    def clip(self, batch: Batch) -> None:
        """Clip the gradients; raises CheckFailed if they are not finite.

        With fp16 such a step is skipped and the loss scaled by half as much, until nothing is left to halve.
        """
        largest = self.config.max_grad_norm or float("inf")
        norm, scaler = self.accelerator.clip_grad_norm_(self.parameters, largest).item(), self.accelerator.scaler
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            self.stop(f"the norm of the gradients is {norm}", batch, None)
        self.norm = norm if math.isfinite(norm) else 0.0

    def stop(self, what: str, batch: Batch, bad: Tensor | None) -> None:
        """Raise CheckFailed with the samples of the batch that are at fault, or all of them."""
        places = torch.stack([batch.rows, batch.timesteps.cpu()], 1).to(self.accelerator.device)
        places = self.accelerator.gather(places)
        found = (places if bad is None else places[bad]).tolist()
        shown = ", ".join(f"image {row} at timestep {timestep}" for row, timestep in found[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        last = f"the last checkpoint is {self.file}" if self.file.exists() else "there is no checkpoint yet"
        raise CheckFailed(
            f"fine-tune: {what} in step {self.step + 1}: {shown}{more}; {last}; "
            "try a smaller learning_rate, and check the images"
        )

    def finish_step(self, means: Mapping[str, float]) -> None:
        """The rate of the next step, the moving average, the records."""
        if not self.accelerator.optimizer_step_was_skipped:
            self.rate.step()
            self.ema.step(self.parameters)
        for name, value in means.items():
            self.curve[name].append(value)
        self.step += 1
        self.accelerator.log({**means, "learning_rate": self.rate.get_last_lr()[0]}, step=self.step)
        if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
            self.save()

    def finish_(self) -> None:
        """The UNet with the moving average as its weights, in eval mode, and free of what training put around it."""
        self.accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False)
        self.ema.foreach = False  # torch copies no split tensors so
        self.ema.copy_to(self.parameters)
        self.model.eval()

    def save(self) -> None:
        """Store the state, by the first process, in place of the last one."""
        slots = self.plain_optimizer.state_dict()["state"]
        tensors = {f"model.{name}": tensor for name, tensor in self.changed().items()}
        tensors |= {f"ema.{i}": tensor for i, tensor in enumerate(self.ema.shadow_params)}
        tensors |= {f"optimizer.{i}.{key}": value for i, slot in slots.items() for key, value in slot.items()}
        tensors |= {f"curve.{name}": torch.tensor(v, dtype=torch.float64) for name, v in self.curve.items()}
        tensors = whole(tensors, self.accelerator.is_main_process)
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "rate": self.rate.state_dict(),
            "ema": self.ema.optimization_step,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        with new_file(self.file) as temporary:
            save_tensors(tensors, temporary, {"state": json.dumps(state)})

    def changed(self) -> dict[str, Tensor]:
        """What training changes of the model's state: all of it, or the adapter's factors."""
        state: dict[str, Tensor] = self.model.state_dict()
        return {name: state[name] for name in self.trained} if self.low_rank else state

    def resume(self) -> None:
        """Take up the stored state, if there is one; raises BadInput if it is damaged."""
        if self.file.exists():
            tensors, metadata = load_tensors(self.file, bound=True)
            of: dict[str, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                kind, _, rest = name.partition(".")
                of.setdefault(kind, {})[rest] = tensor.clone()  # as the file maps them they may lie unaligned
            self.restore(of, json.loads(metadata["state"]))

    def restore(self, of: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve = {name: of["curve"][name].tolist() for name in self.curve}
        now = self.model.state_dict()
        self.model.load_state_dict({**now, **{name: split_as(v, now[name]) for name, v in of["model"].items()}})
        self.ema.optimization_step = state["ema"]
        for i, shadow in enumerate(self.ema.shadow_params):
            shadow.copy_(split_as(of["ema"][str(i)], shadow))
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in of.get("optimizer", {}).items():  # none if fp16 has skipped every step so far
            number, _, key = name.partition(".")
            slots.setdefault(int(number), {})[key] = split_as(tensor, self.parameters[int(number)])
        self.rate.load_state_dict(state["rate"])
        groups = self.plain_optimizer.state_dict()["param_groups"]
        for group, rate in zip(groups, self.rate.get_last_lr(), strict=True):
            group["lr"] = rate
        self.plain_optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
