"""diffprune-plugin: structural pruning of diffusion models for the pipelines people already have."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffprune_plugin.utils.imports import when_imported

if not (Path(__file__).parent / "adapters").exists():
    # In a checkout the folders adapters/ and export/ lie beside the package, not in it.
    __path__.append(str(Path(__file__).parent.parent))
__path__.append(str(Path(__file__).parent / "renamed"))  # modules by their names of before

# A saved model's folder holds a loader for people without this package. Who has imported it needs neither that file nor
# trust_remote_code: diffusers looks for a component's library among its own pipeline modules first.
when_imported("diffusers.pipelines", lambda module: setattr(module, __name__, sys.modules[__name__]))

if TYPE_CHECKING:
    from diffprune_plugin.calibration.calibration import Calibration
    from diffprune_plugin.calibration.run import calibrate
    from diffprune_plugin.config.finetuning import FinetuneConfig
    from diffprune_plugin.config.pruning import PruningConfig
    from diffprune_plugin.criteria.sweep import Sweep
    from diffprune_plugin.data.encoding import encode
    from diffprune_plugin.hookspecs import hookimpl
    from diffprune_plugin.integrations.torch_pruning import Pruner
    from diffprune_plugin.planning.plan import PruningPlan
    from diffprune_plugin.planning.planner import make_plan
    from diffprune_plugin.plugins import importance, plugin_manager
    from diffprune_plugin.pruning.loading import load
    from diffprune_plugin.pruning.mask_schedule import MaskSchedule
    from diffprune_plugin.pruning.masks import fold_, load_masked_, mask_, nncf_prune, save_masked
    from diffprune_plugin.pruning.removal import remove_
    from diffprune_plugin.pruning.saving import save
    from diffprune_plugin.recovery.compensate import compensate_

# Public names and where they live; imported on first use, so that --help does not wait for torch.
_HOME = {
    "Calibration": "calibration.calibration",
    "FinetuneConfig": "config.finetuning",
    "MaskSchedule": "pruning.mask_schedule",
    "Pruner": "integrations.torch_pruning",
    "PruningConfig": "config.pruning",
    "PruningPlan": "planning.plan",
    "Sweep": "criteria.sweep",
    "calibrate": "calibration.run",
    "compensate_": "recovery.compensate",
    "encode": "data.encoding",
    "fold_": "pruning.masks",
    "hookimpl": "hookspecs",
    "importance": "plugins",
    "load": "pruning.loading",
    "load_masked_": "pruning.masks",
    "make_plan": "planning.planner",
    "mask_": "pruning.masks",
    "nncf_prune": "pruning.masks",
    "plugin_manager": "plugins",
    "remove_": "pruning.removal",
    "save": "pruning.saving",
    "save_masked": "pruning.masks",
}

__all__ = [
    "Calibration",
    "FinetuneConfig",
    "MaskSchedule",
    "Pruner",
    "PruningConfig",
    "PruningPlan",
    "Sweep",
    "calibrate",
    "compensate_",
    "encode",
    "fold_",
    "hookimpl",
    "importance",
    "load",
    "load_masked_",
    "make_plan",
    "mask_",
    "nncf_prune",
    "plugin_manager",
    "remove_",
    "save",
    "save_masked",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"diffprune_plugin.{_HOME[name]}"), name)
    if name == "ModelMixin":
        # DiffusionPipeline.from_pretrained asks a component's library for the base classes that it can load.
        return importlib.import_module("diffusers").ModelMixin
    if name.startswith("Pruned"):
        # ... and for the class that model_index.json names.
        from diffprune_plugin.pruning.pruned_class import pruned_class_named

        return pruned_class_named(name)
    if (Path(__file__).parent / "renamed" / f"{name}.py").exists():
        return importlib.import_module(f"diffprune_plugin.{name}")
    raise AttributeError(f"module 'diffprune_plugin' has no attribute {name!r}")
