"""A sensitivity: for each unit of each coupled group, how far its removal moves the model's output, refitted or not."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.utils.files import write_text
from diffprune_plugin.utils.reading import read_json

LATER = ("blocks", "alone", "norms", "norms_alone", "estimate", "unseen")  # what older files do not have
ESTIMATE = 2  # which formulas a linear one is by: 2 since queries count, and no variances that a model tells


@dataclass(frozen=True)
class Sensitivity:
    """By root layer what each unit adds to the output's error, to first order; by name that of each whole block.

    scores: shape (units,), >= 0: the mean squared change of a value of the model's output, when the unit goes in its
        turn, after those that add less, and the layers behind are refitted (`redundancy.in_turn`).
    alone: the same of its removal alone, after what a bias can mend: for what is not compensated.
    norms, norms_alone: what the units that stay add with them, since group norms run over fewer channels: with none of
        each part of the group gone, with one, two ..; shape (units of a part,), none where there is no such norm.
    power: the mean square of a value of the output, to compare with. samples, probes, seed: what it was measured with.
    weights, images: SHA-256 of the model's parameters and of the samples; scheduler: the noise and the prediction;
        estimate: by which formulas, `ESTIMATE` by today's.
    unseen: the groups whose inputs were the same for all samples, which says nothing of what they do for others.
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
    alone: dict[str, tuple[float, ...]] = field(default_factory=dict)
    norms: dict[str, tuple[float, ...]] = field(default_factory=dict)
    norms_alone: dict[str, tuple[float, ...]] = field(default_factory=dict)
    estimate: int = 0
    unseen: tuple[str, ...] = ()

    def unrefitted(self) -> Sensitivity:
        """The same for a model that is not compensated: each unit's error is that of its removal alone."""
        return replace(self, scores=self.alone, norms=self.norms_alone)

    @property
    def most(self) -> float:
        """The largest share of a group for which it holds: what is left matters more, the more is gone."""
        return 0.75

    def error(self, root: str, units: Collection[int]) -> float:
        """The error of removing these units together, in the units of ``power``: their own added up, and what norms do
        to those that stay, over the square root of the share of units that stays.

        The root is a rule found by trying, not derived: to first order single cuts were low by it (docs/figures.md).
        """
        if root not in self.scores:
            raise BadInput(f"sensitivity: it says nothing of {root}, as one of another version; measure again")
        scores, norms = np.asarray(self.scores[root]), self.norms.get(root, ())
        told = float(scores[list(units)].sum())
        if norms:
            told += float(np.interp(len(units) * len(norms) / len(scores), np.arange(len(norms)), norms))
        return told / math.sqrt(max(1 - len(units) / len(scores), 1 / len(scores)))

    def knows(self, root: str, count: int) -> bool:
        """Whether it says anything of so many units."""
        return not count or root not in self.unseen

    @property
    def sha256(self) -> str:
        content = {key: value for key, value in asdict(self).items() if key not in LATER or value}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """As JSON with its hash, atomically."""
        write_text(Path(path), json.dumps({**asdict(self), "sha256": self.sha256}) + "\n")

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """What `save` wrote; raises BadInput if it is missing, damaged or was altered."""
        try:
            content = dict(read_json(Path(path), "measure again"))
            stated = content.pop("sha256")
            for key in ("scores", "alone", "norms", "norms_alone"):
                content[key] = {root: tuple(map(float, values)) for root, values in content.get(key, {}).items()}
            content["unseen"] = tuple(map(str, content.get("unseen", ())))
            found = cls(**content)
            same = found.sha256 == stated
            every = [*found.scores.values(), *found.alone.values(), *found.norms.values(), *found.norms_alone.values()]
            if not (found.power > 0 and all(0 <= value < math.inf for values in every for value in values)):
                raise ValueError("an error in it is negative or not finite")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path}: not a sensitivity, or damaged: {first_line(error)}; measure again") from None
        if not same:
            raise BadInput(f"{path}: altered since it was written (its sha256 differs); measure again")
        return found
