"""A training's loss as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np

from diffprune_plugin.utils.optional import need_pyplot


def loss_plot(curve: Mapping[str, Sequence[float]]) -> bytes:
    """A training's loss and its terms at each step, and their running means, as PNG.

    Raises MissingExtra without matplotlib.
    """
    pyplot = need_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for colour, (name, values) in enumerate(curve.items()):
        steps = np.arange(1, len(values) + 1)
        window = max(len(values) // 20, 1)
        means = np.convolve(values, np.ones(window) / window, "valid")
        axes.plot(steps, values, color=f"C{colour}", alpha=0.25, lw=0.6)
        axes.plot(steps[window - 1 :], means, color=f"C{colour}", lw=1.2, label=f"{name}, mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    pyplot.close(figure)
    return image.getvalue()
