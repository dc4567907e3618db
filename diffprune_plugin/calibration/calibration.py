"""A calibration: the loss at each timestep, which timesteps count, and the gradients of their sum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from diffprune_plugin.calibration.timesteps import above_threshold
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.utils.files import new_directory
from diffprune_plugin.utils.hashes import json_hash
from diffprune_plugin.utils.reading import read_json
from diffprune_plugin.utils.tensors import HASH, load_tensors, save_tensors

Curve = npt.NDArray[np.float64]
FILE, GRADIENTS_FILE = "calibration.json", "gradients.safetensors"


@dataclass(frozen=True)
class Calibration:
    """The loss curve, the timesteps that count, and the gradients of the loss accumulated over them.

    timesteps, loss, stderr, counts: one entry a point of the curve, shape (points,); ``loss`` is the mean squared
        error per element, ``stderr`` the standard error of its mean over samples, ``counts`` whether it counts.
    gradients: d(sum over counting timesteps of weight_t L_t) / d(parameter), float32 on the CPU, by parameter name;
        where the sweep's ``accumulate`` says so, the sums of weight_t |d L_t / d(parameter)| ** p instead.
    forward, backward: samples that went through the UNet each way.
    weights, images: SHA-256 of the UNet's parameters and of the samples. autocast: computed in bfloat16.
    scale: what the loss is multiplied by before the threshold is applied, shape (points,); None for 1.
    rule: SHA-256 of the weights of all timesteps, empty in calibrations of older versions.
    scheduler: the noise and the prediction that the loss is of; points: of the curve, also those after the loop's end.
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
    autocast: bool = False
    scheduler: dict[str, Any] = field(default_factory=dict)
    points: int = 0
    scale: Curve | None = None
    rule: str = ""

    @property
    def compared(self) -> Curve:
        """What the threshold is applied to: the loss as that of the noise, shape (points,)."""
        return self.loss if self.scale is None else self.loss * self.scale

    def answers(self, sweep: Sweep) -> bool:
        """Whether it is what a sweep asks for; a dropout left open is answered by any."""
        if sweep.condition_dropout is None:
            sweep = replace(sweep, condition_dropout=self.sweep.condition_dropout)
        return self.sweep == sweep

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
        counts = above_threshold(self.compared, threshold)
        if not np.array_equal(counts, self.counts):
            raise BadInput(
                f"threshold {threshold} keeps {int(counts.sum())} of {len(counts)} points of the loss curve, "
                f"the stored gradients are of {int(self.counts.sum())}; calibrate again"
            )
        return replace(self, sweep=replace(self.sweep, threshold=threshold))

    def save(self, directory: Path, overwrite: bool = False) -> None:
        """As calibration.json and gradients.safetensors, both or nothing; the first has the hashes of both."""
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
            "autocast": self.autocast,
            "scheduler": self.scheduler,
            "points": self.points,
            "rule": self.rule,
            **({} if self.scale is None else {"scale": self.scale.tolist()}),
        }
        with new_directory(Path(directory), overwrite, "calibration") as temporary:
            content["gradients"] = save_tensors(self.gradients, temporary / GRADIENTS_FILE)
            content[HASH] = json_hash(content)
            (temporary / FILE).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Calibration:
        """What `save` wrote; raises BadInput if it is missing, damaged or altered, or its files are of two."""
        directory = Path(directory)
        try:
            content = read_json(directory / FILE, "calibrate again")
            check_whole(directory, content)
            gradients, metadata = load_tensors(directory / GRADIENTS_FILE)
            if metadata[HASH] != content.pop("gradients"):
                raise BadInput(f"{directory}: {GRADIENTS_FILE} is of another calibration than {FILE}; calibrate again")
            sweep = Sweep(**content.pop("sweep"))
            curves: dict[str, Any] = {
                key: np.asarray(content.pop(key))
                for key in ("timesteps", "loss", "stderr", "counts", "scale")
                if key in content or key != "scale"
            }
            return cls(sweep=sweep, gradients=gradients, **curves, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{directory}: not a calibration, or damaged: {first_line(error)}") from None


def check_whole(directory: Path, content: dict[str, Any]) -> None:
    """Take the hash out of what calibration.json says; raises BadInput if it is of something else, or missing."""
    stated = content.pop(HASH, None)
    if stated is None:
        raise BadInput(f"{directory / FILE}: without a {HASH}, of an older version; calibrate again")
    if stated != json_hash(content):
        raise BadInput(f"{directory / FILE}: altered since it was written (its {HASH} differs); calibrate again")
