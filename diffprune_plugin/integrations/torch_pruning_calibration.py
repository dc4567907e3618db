"""The importance that a pruner was given, and its calibration before each step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.calibration.run import calibrate
from diffprune_plugin.errors import BadInput
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.plugins import importance, with_calibration
from diffprune_plugin.utils.tensors import weights_hash

# What makes a calibration: one, the arguments of `calibrate` after the UNet, or a function of the UNet.
Calibrations = Calibration | Mapping[str, Any] | Callable[[nn.Module], Calibration]


def named(wanted: Any) -> tuple[str | None, dict[str, Any]]:
    """Name and options of an importance given by name; no name for an object."""
    if isinstance(wanted, str):
        return wanted, {}
    if isinstance(wanted, Mapping):
        options = dict(wanted)
        return options.pop("name", ""), options
    return None, {}


def importance_of(wanted: Any, calibration: Calibration | None = None) -> Criterion:
    """The importance that was asked for by name, or as an object."""
    name, options = named(wanted)
    if "calibration" in options:
        raise BadInput("importance: 'calibration' is an argument of its own: Pruner(..., calibration=...)")
    if name is not None:
        return importance(name, calibration=calibration, **options)
    return wanted if calibration is None else with_calibration(wanted, calibration)


def check_calibration(wanted: Any, calibration: Calibrations | None, steps: int) -> None:
    """Raises BadInput for a calibration that cannot be used, before anything is traced."""
    criterion = importance_of(wanted)
    if calibration is None:
        return
    if getattr(criterion, "sweep", None) is None:
        raise BadInput(f"calibration: {type(criterion).__name__} takes none; leave it out")
    if isinstance(calibration, Calibration):
        if steps > 1:
            raise BadInput(
                f"calibration: after a removal it is stale, and iterative_steps is {steps}; give the arguments that "
                "make one: calibration={'scheduler': ..., 'images': ...}"
            )
    elif isinstance(calibration, Mapping):
        known = set(inspect.signature(calibrate).parameters) - {"model", "sweep"}
        for key in (*sorted(set(calibration) - known), *sorted({"scheduler", "images"} - set(calibration))):
            state = "unknown argument" if key in calibration else "missing argument"
            raise BadInput(f"calibration: {state} {key!r}; it holds those of diffprune_plugin.calibrate")
    elif not callable(calibration):
        raise BadInput(f"calibration: a {type(calibration).__name__} is no Calibration, mapping or function")


def calibrated(wanted: Any, calibration: Calibrations | None, model: nn.Module) -> Criterion:
    """The importance, calibrated for the UNet as it is now.

    Raises BadInput for a calibration of other weights.
    """
    criterion: Any = importance_of(wanted)
    if calibration is None:
        return criterion  # type: ignore[no-any-return]
    made = calibration
    if isinstance(made, Mapping):
        made = calibrate(model, sweep=criterion.sweep, **made)
    elif not isinstance(made, Calibration):
        made = made(model)
    if not isinstance(made, Calibration):
        raise BadInput(f"calibration: the function returned a {type(made).__name__}, not a Calibration")
    if made.weights != weights_hash(model):
        raise BadInput("calibration: made for other weights than the model's; calibrate again")
    return importance_of(wanted, made)
