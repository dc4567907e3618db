"""The scheduler of what is exported: its own, and in DDIM's terms for the sampling run that is compared."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from diffprune_plugin.diffusion.schedulers import PREDICTION_TYPES, made_like
from diffprune_plugin.errors import BadInput, first_line


def scheduler_of(model: Any) -> Any:
    """The scheduler of a pipeline or its directory; None where there is none, or none that DDIM can follow."""
    return pipeline_scheduler(model) if isinstance(model, (str, Path)) else getattr(model, "scheduler", None)


def pipeline_scheduler(directory: str | Path) -> Any:
    """The scheduler of a pipeline directory in DDIM's terms, or None where there is none that DDIM can follow.

    Raises BadInput for a damaged one.
    """
    import diffusers
    from diffusers import DDIMScheduler

    folder = Path(directory) / "scheduler"
    if not (folder / "scheduler_config.json").is_file():
        return None
    try:
        config = DDIMScheduler.load_config(str(folder))
    except OSError as error:
        raise BadInput(f"{folder}: damaged scheduler_config.json: {first_line(error)}; restore it") from None
    known = config.get("prediction_type", "epsilon") in PREDICTION_TYPES
    if not known or not {"beta_start", "beta_end", "beta_schedule", "num_train_timesteps"} <= set(config):
        return None
    kind = getattr(diffusers, str(config.get("_class_name")), DDIMScheduler)
    if "clip_sample" not in inspect.signature(kind.__init__).parameters:  # it never did
        config = {"clip_sample": False, **config}
    try:
        return DDIMScheduler.from_config(config)
    except NotImplementedError:  # a schedule of betas that DDIM does not know
        return None


def ddim_of(scheduler: Any, steps: int) -> Any:
    """DDIM with a scheduler's settings, set to so many steps; raises BadInput if it has not as many."""
    from diffusers import DDIMScheduler

    ddim = made_like(scheduler, DDIMScheduler)
    try:
        ddim.set_timesteps(steps)
    except ValueError as error:
        raise BadInput(f"--steps {steps}: {first_line(error)}") from None
    first, total = int(ddim.timesteps.max()), ddim.config.num_train_timesteps
    if first >= total:
        raise BadInput(f"--steps {steps}: they would begin at timestep {first} of {total}; take fewer")
    return ddim
