"""Was the home of what saves and loads models."""

import warnings

from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.pruning.loading import load, load_pipeline
from diffprune_plugin.pruning.saving import save

__all__ = ["load", "load_pipeline", "read_plan", "save"]
warnings.warn("diffprune_plugin.checkpoint is now diffprune_plugin.pruning", DeprecationWarning, stacklevel=2)
