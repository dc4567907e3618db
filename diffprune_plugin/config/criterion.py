"""The criterion that a config names."""

from __future__ import annotations

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
