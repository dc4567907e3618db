"""How far a calibration is: all that an interrupted one needs to go on to identical bits, and its file."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffprune_plugin.calibration.calibration import Curve
from diffprune_plugin.calibration.gradients import GradientSums
from diffprune_plugin.calibration.settings import Settings
from diffprune_plugin.diffusion.batches import CURVE, GRADIENTS
from diffprune_plugin.utils.distributed import Processes
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.tensors import load_tensors, save_tensors

FINISHED = "finished."  # before the names of sums of finished parts
STAGES = {"curve": CURVE, "gradients": GRADIENTS}


@dataclass
class Progress:
    """The ``losses`` so far (points, samples), nan where not measured; the ``sums`` of gradients; the stage of STAGES
    and the samples or points ``done`` in it, of the gradients those of one ``part`` of the model.
    """

    losses: Curve
    sums: GradientSums
    processes: Processes
    stage: str
    done: int = 0
    part: int = 0
    file: Path | None = None
    every: float = 0.0
    saved_at: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, settings: Settings) -> Progress:
        """Before the first batch."""
        columns = settings.sweep.curve_samples if settings.stratified else settings.batch_size
        losses = np.full((len(settings.points), columns), np.nan)
        processes = Processes(settings.parameter.device)
        return cls(losses, GradientSums(settings.model), processes, "curve" if settings.stratified else "gradients")

    def resume(self, directory: Path, every: float, fingerprint: str) -> None:
        """Take up the progress stored in ``directory``, if it is of these settings, and store it there, at most once in
        ``every`` seconds.

        Raises BadInput, on every process, where it is damaged or not the same for all.
        """
        file = self.file = directory / f"progress-{fingerprint[:16]}.safetensors"
        self.every = every
        tensors = self.processes.on_all(lambda: load_tensors(file)[0] if file.exists() else None)
        if tensors is not None:
            self.losses = tensors.pop("losses").numpy()
            stage, self.done, self.part = tensors.pop("position").tolist()
            finished = [name for name in tensors if name.startswith(FINISHED)]
            self.sums.finished = {name.removeprefix(FINISHED): tensors.pop(name) for name in finished}
            self.stage = list(STAGES)[stage]
            if self.processes.is_first:  # what is stored is the sum over processes
                device = self.sums.device
                self.sums.totals = {name.removeprefix("grad."): tensor.to(device) for name, tensor in tensors.items()}
        self.processes.check_same(self.done, file)
        self.processes.check_same(self.part, file)

    def save(self, now: bool = False) -> None:
        """Store it, if the last time is long enough ago, or ``now``; the first process writes."""
        if self.file is None:
            return
        if not self.processes.broadcast(time.monotonic() - self.saved_at >= self.every or now):
            return
        tensors = {f"grad.{name}": total.cpu() for name, total in self.sums.over(self.processes).items()}
        tensors |= {f"{FINISHED}{name}": total for name, total in self.sums.finished.items()}
        tensors["losses"] = torch.from_numpy(self.losses)
        tensors["position"] = torch.tensor([STAGES[self.stage], self.done, self.part])
        self.processes.on_first(lambda: self.write(tensors))
        self.saved_at = time.monotonic()

    def write(self, tensors: dict[str, Tensor]) -> None:
        if self.file is not None:
            with new_file(self.file) as temporary:
                save_tensors(tensors, temporary)

    def forget(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)
