"""The loss curve as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.diffusion.schedulers import NOISE_FORMS
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.optional import need_pyplot


def plot_curve(calibration: Calibration, path: Path) -> None:
    """The loss at each timestep with its standard error, and the threshold that decides which timesteps count.

    Raises MissingExtra without matplotlib.
    """
    pyplot = need_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    errors = calibration.stderr if calibration.scale is None else calibration.stderr * calibration.scale
    factor = NOISE_FORMS[calibration.scheduler.get("prediction_type") or "epsilon"][0]
    named = "loss L_t" if calibration.scale is None else f"{factor} times the loss L_t"
    points = (calibration.timesteps, calibration.compared, errors)
    axes.errorbar(*points, fmt=".-", ms=3, lw=0.8, label=f"{named}, standard error")
    level = calibration.sweep.threshold * calibration.compared.max()
    label = f"threshold {calibration.sweep.threshold} x largest"
    axes.axhline(level, color="tab:red", lw=1, label=label)
    half = float(np.diff(calibration.timesteps).mean()) / 2 if len(calibration.timesteps) > 1 else 0.5
    for timestep in calibration.timesteps[calibration.counts]:
        axes.axvspan(timestep - half, timestep + half, color="tab:green", alpha=0.15, lw=0)
    axes.set(xlabel="timestep t", ylabel="noise-prediction loss", yscale="log")
    axes.set_title(f"{int(calibration.counts.sum())} of {len(calibration.counts)} points count (green)")
    axes.legend()
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
