"""The whole plugin contract.

A package joins by an entry point in the group ``diffprune`` that names a module or object with these hooks::

    [project.entry-points.diffprune]
    my_package = "my_package.plugin"
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from diffprune_plugin.adapters.table import ModelAdapter
    from diffprune_plugin.recovery.compensate import CompensationReport

ENTRY_POINT_GROUP = "diffprune"
hookspec = pluggy.HookspecMarker("diffprune")
hookimpl = pluggy.HookimplMarker("diffprune")


class Criterion(Protocol):
    """A ``torch_pruning`` Importance: any object that scores a coupled group.

    A criterion that needs gradients has two more attributes: ``sweep`` (a `diffprune_plugin.criteria.sweep.Sweep`,
    what to calibrate) and ``calibration`` (set to the `Calibration` before the first score).
    One with an attribute ``sensitivity`` gets the `Sensitivity` of the model there.
    """

    def __call__(self, group: Any) -> torch.Tensor | None:
        """Score of each channel of the group's root layer, shape (channels,), >= 0; larger is kept longer."""


CriterionFactory = Callable[..., Criterion]
# From alphas_cumprod, shape (timesteps,), and the prediction_type: the weight of each timestep's loss, >= 0.
TimestepWeights = Callable[["npt.NDArray[np.float64]", str], "npt.NDArray[np.float64]"]
# Of the pruned model, the dense one, plan, scheduler and samples, and by name batch_size, seed, progress: refits the
# pruned model in place and says what it did, as `recovery.compensate.compensate_`.
Compensation = Callable[..., "CompensationReport"]


@hookspec
def diffprune_register_criteria(register: Callable[[str, CriterionFactory], None]) -> None:
    """Call ``register(name, factory)`` once for each criterion; the config's options become its keyword arguments."""


@hookspec
def diffprune_register_timestep_weights(register: Callable[[str, TimestepWeights], None]) -> None:
    """Call ``register(name, function)`` once for each rule that criteria name in their option ``timestep_weights``."""


@hookspec
def diffprune_register_compensations(register: Callable[[str, Compensation], None]) -> None:
    """Call ``register(name, function)`` once for each way to repair a model that the config's ``compensate`` names."""


@hookspec
def diffprune_register_adapters(register: Callable[[ModelAdapter], None]) -> None:
    """Call ``register(adapter)`` once for each UNet class described."""
