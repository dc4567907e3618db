"""Was the home of `Sweep`, which plugins import."""

import warnings

from diffprune_plugin.criteria.sweep import Sweep

__all__ = ["Sweep"]
warnings.warn("diffprune_plugin.timesteps.Sweep is now diffprune_plugin.Sweep", DeprecationWarning, stacklevel=2)
