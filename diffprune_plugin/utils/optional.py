"""Packages that an extra brings: here, or one line that says what to install."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from diffprune_plugin.errors import MissingExtra

# Extra by package; what is not listed comes with the extra cpu, as ONNX and its runtime do.
EXTRAS = {
    "markdown": "eval",
    "matplotlib": "eval",
    "mlflow": "mlflow",
    "nncf": "nncf",
    "peft": "train",
    "tensorboard": "train",
    "torch_fidelity": "fid",
    "torchmetrics": "eval",
    "transformers": "text",
    "wandb": "wandb",
}


def has(package: str) -> bool:
    """Whether a package is installed; it is not imported."""
    return importlib.util.find_spec(package) is not None


def missing(module: str) -> MissingExtra:
    """The error that says which extra brings a module."""
    return MissingExtra(module, EXTRAS.get(module.partition(".")[0], "cpu"))


def check_installed(*packages: str) -> None:
    """Raises MissingExtra for the first package that is not installed; nothing is imported."""
    for package in packages:
        if not has(package):
            raise missing(package)


def need(module: str) -> Any:
    """An optional module, imported; raises MissingExtra if its package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        raise missing(module) from None


def need_pyplot() -> Any:
    """matplotlib's pyplot, drawing into files; raises MissingExtra without it."""
    need("matplotlib").use("Agg")
    return need("matplotlib.pyplot")
