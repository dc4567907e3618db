"""Was the home of pruna's algorithm."""

import warnings

from diffprune_plugin.integrations.pruna_algorithm import DiffPrune

__all__ = ["DiffPrune"]
warnings.warn(
    "diffprune_plugin.hosts.pruna_algorithm is now .integrations.pruna_algorithm", DeprecationWarning, stacklevel=2
)
