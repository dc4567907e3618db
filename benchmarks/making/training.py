"""A training that survives being killed: model, moving average and optimizer, and their checkpoint."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffprune_plugin.utils.progress import progress_bar

Schedule = Callable[[Optimizer], LambdaLR]
EVERY, RECENT = 250, 500  # steps between checkpoints; losses that one is told of


class Training:
    """Model, moving average and optimizer, and their checkpoint as safetensors (no pickle).

    ``schedule``: the learning rate's, of an optimizer. Every step draws from a generator seeded with (seed, step), so
    a resumed run sees what an unbroken one would.
    """

    def __init__(
        self, make: Callable[[], nn.Module], schedule: Schedule, lr: float, seed: int, decay: float = 0.9995
    ) -> None:
        torch.manual_seed(seed)
        self.seed, self.step = seed, 0
        self.unet = make()
        self.ema = EMAModel(self.unet.parameters(), decay=decay, use_ema_warmup=True, power=0.8)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=lr, weight_decay=1e-4)
        self.schedule = schedule(self.optimizer)

    def run_step(self, loss_of: Callable[[int], Tensor]) -> float:
        """One step down the loss, which is made from the seed of the step."""
        loss = loss_of(self.seed * 1_000_003 + self.step)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        tensors = {f"unet.{name}": tensor.contiguous() for name, tensor in self.unet.state_dict().items()}
        tensors |= {f"ema.{i}": tensor.contiguous() for i, tensor in enumerate(self.ema.shadow_params)}
        for i, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{key}": slots[key].contiguous() for key in ("exp_avg", "exp_avg_sq")}
        save_file(tensors, path.with_suffix(".tmp"), metadata={"step": str(self.step)})
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.step = int(file.metadata()["step"])
        tensors = load_file(path)
        self.unet.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("unet.")})
        self.ema.shadow_params = [tensors[f"ema.{i}"] for i in range(len(self.ema.shadow_params))]
        self.ema.optimization_step = self.step
        state = self.optimizer.state_dict()
        state["state"] = {
            i: {"step": torch.tensor(float(self.step))}
            | {key: tensors[f"adam.{i}.{key}"] for key in ("exp_avg", "exp_avg_sq")}
            for i in range(len(self.ema.shadow_params))
        }
        self.optimizer.load_state_dict(state)
        self.schedule.last_epoch = self.step
        rates = [
            base * rate(self.step) for base, rate in zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        ]
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr

    def go_on(
        self, steps: int, loss_of: Callable[[int], Tensor], checkpoint: Path, told: Callable[[int], None] | None = None
    ) -> float | None:
        """Train until so many steps are done, from the checkpoint if there is one: the mean of the last losses.

        ``told``: called with the step after each checkpoint. SIGTERM ends it, after a checkpoint, with exit code 143.
        """
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())  # after the step that is under way
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if checkpoint.exists():
            self.load(checkpoint)
        recent: list[float] = []
        with progress_bar(True) as bar:
            task = bar.add_task("train", total=steps, completed=self.step)
            while self.step < steps and not stopped.is_set():
                recent = [*recent[1 - RECENT :], self.run_step(loss_of)]
                bar.advance(task)
                if self.step % EVERY == 0:
                    self.save(checkpoint)
                    bar.console.print(f"step {self.step} loss {np.mean(recent):.4f}")
                    if told is not None:
                        told(self.step)
        self.save(checkpoint)
        if self.step < steps:
            sys.exit(143)
        return float(np.mean(recent)) if recent else None


def averaged(run: Training, model: nn.Module) -> Any:
    """A new model of the same shape with the moving average of a run's weights, in eval mode."""
    model.load_state_dict(run.unet.state_dict())
    run.ema.copy_to(model.parameters())
    return model.eval()


def is_there(written: Path, asked: dict[str, Any]) -> bool:
    """Whether a training with these settings has ended: what it wrote down says so."""
    there = written.exists() and asked.items() <= json.loads(written.read_text()).items()
    if there:
        print(f"{written} says that this model is there")
    return there


def write_down(written: Path, asked: dict[str, Any], trained: float | None, weights: Path, images: str) -> None:
    """The settings, the loss, the hash of the weights, and what of."""
    facts = {
        **asked,
        "train_loss": trained,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "images": images,
    }
    written.write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))
