"""The criterion that a config names."""

from __future__ import annotations

from typing import Any

from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.errors import BadInput
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.plugins import importance


def criterion_of(config: PruningConfig) -> Criterion:
    """The criterion that a config names; raises BadInput if it cannot be made."""
    name, options = config.criterion()
    for key in {"plugins", "calibration"} & set(options):
        raise BadInput(f"importance: unknown option {key!r}; 'calibration' is a key of its own")
    if name == "random":
        options.setdefault("seed", config.seed)
    return importance(name, **options)


def describe(criterion: Criterion, config: PruningConfig) -> dict[str, Any]:
    """The criterion as asked for, with what its sweep filled in: the plan's provenance."""
    sweep = getattr(getattr(criterion, "calibration", None) or criterion, "sweep", None)
    filled = sweep.as_dict() if sweep is not None else {}
    return {"seed": config.seed, **filled, **config.importance}
