"""The criterion that a config names."""

from __future__ import annotations

from typing import Any

from rich.console import Console

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


def dropout_of(criterion: Any) -> float | None:
    """The ``condition_dropout`` that a criterion's calibration was asked for."""
    found: float | None = getattr(getattr(criterion, "sweep", None), "condition_dropout", None)
    return found


def tell_unused(config: PruningConfig, criterion: Criterion, allocated: bool) -> None:
    """A line on standard error with the keys that a config gives and nothing in it asks for."""
    idle = set()
    if getattr(criterion, "sweep", None) is None:
        idle |= {"calibration", "timesteps", "blocks_at_once", "autocast"}
    if not allocated and not hasattr(criterion, "sensitivity"):
        idle |= {"sensitivity", "sensitivity_samples", "sensitivity_probes"}
    if not config.timed and config.round_to is None:
        idle.add("latency")
    if config.data is None:
        idle.add("resolution")
    if given := [k for k, of in PruningConfig.model_fields.items() if k in idle and getattr(config, k) != of.default]:
        line = f"config: nothing here uses {', '.join(given)}"
        Console(stderr=True).print(line, soft_wrap=True, markup=False, highlight=False)


def describe(criterion: Criterion, config: PruningConfig) -> dict[str, Any]:
    """The criterion as asked for, with what its sweep filled in: the plan's provenance."""
    sweep = getattr(getattr(criterion, "calibration", None) or criterion, "sweep", None)
    filled = sweep.as_dict() if sweep is not None else {}
    return {"seed": config.seed, **filled, **config.importance}
