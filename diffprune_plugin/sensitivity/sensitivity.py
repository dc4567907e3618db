"""A sensitivity: for each unit of each coupled group, how far its removal moves the model's output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.utils.files import write_text
from diffprune_plugin.utils.reading import read_json

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sensitivity:
    """By root layer the error of removing each unit alone, to first order, after what a bias can mend; by name that of
    each whole block that may go.

    scores: shape (units,), >= 0: the mean squared change of a value of the model's output. power: the mean square of
        such a value, to compare with. samples, probes, seed: what it was measured with.
    weights, images: SHA-256 of the model's parameters and of the samples; scheduler: the noise and the prediction.
    """

    scores: dict[str, tuple[float, ...]]
    power: float
    samples: int
    probes: int
    seed: int
    weights: str
    images: str
    scheduler: dict[str, Any]
    blocks: dict[str, float] = field(default_factory=dict)

    @property
    def most(self) -> float:
        """The largest share of a group for which it holds: what is left matters more, the more is gone."""
        return 0.75

    def error(self, root: str, units: Collection[int]) -> float:
        """The error of removing these units together: their own added up."""
        return float(np.asarray(self.scores[root])[list(units)].sum())

    def knows(self, root: str, count: int) -> bool:
        """Whether it says anything of so many units: of any."""
        return True

    @property
    def sha256(self) -> str:
        content = {key: value for key, value in asdict(self).items() if key != "blocks" or value}  # not in older ones
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """As JSON with its hash, atomically."""
        write_text(Path(path), json.dumps({**asdict(self), "sha256": self.sha256}) + "\n")

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """What `save` wrote; raises BadInput if it is missing, damaged or was altered."""
        try:
            content = read_json(Path(path), "measure again")
            stated = content.pop("sha256")
            content["scores"] = {root: tuple(map(float, values)) for root, values in content["scores"].items()}
            found = cls(**content)
            same = found.sha256 == stated
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path}: not a sensitivity, or damaged: {first_line(error)}; measure again") from None
        if not same:
            raise BadInput(f"{path}: altered since it was written (its sha256 differs); measure again")
        return found
