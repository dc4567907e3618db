"""The native config: frozen, checked when made, unknown keys are errors."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from diffprune_plugin.config.base import Config, Number, Place, Seed, read_as

if sys.version_info >= (3, 11):
    pass
else:
    pass


class PruningConfig(Config):
    """What to prune and how. Paths are relative to the working directory.

    model, output: directories of the dense model (a pipeline or a UNet) and of the result.
    importance: a criterion's name, or a mapping of ``name`` and its options.
    pruning_ratio (0.3), or macs_target or params_target: the share of the dense UNet's that is to be left.
    data: images for calibration, a folder or an .npz with ``images``, or a .safetensors with ``latents``; needed by
        criteria that use gradients. resolution: image files are resized and cropped to it, never otherwise.
    calibration: a directory; read if it exists, else written, so that another ratio needs no new gradients.
    compensate: refit the layers behind the cuts (no training); by default if there is ``data`` and a scheduler.
    timesteps: points of the loss curve; batch_size: samples a pass. gradient_checkpointing: less memory, more time;
        autocast: compute in bfloat16 while weights and sums of gradients keep their dtype.
    device: ``cpu``, ``cuda``, ``cuda:1`` ...; dtype: of the weights while calibrating and saving.
    """

    model: Place
    output: Place = "pruned"
    importance: dict[str, Any] = Field(default_factory=lambda: {"name": "diff_taylor"})
    pruning_ratio: Number | None = Field(default=None, ge=0, lt=1)
    pruning_ratio_dict: dict[str, Annotated[Number, Field(ge=0, lt=1)]] = Field(default_factory=dict)
    macs_target: Number | None = Field(default=None, gt=0, le=1)
    params_target: Number | None = Field(default=None, gt=0, le=1)
    max_pruning_ratio: Number = Field(default=1.0, gt=0, le=1)
    head_pruning_ratio: Number | None = Field(default=None, ge=0, lt=1)
    ignored_layers: tuple[str, ...] = ()
    target_layers: tuple[str, ...] = ()
    global_pruning: bool = False
    isomorphic: bool = False
    round_to: int | None = Field(default=None, ge=1)
    halves: Literal["together", "apart"] | None = None
    strict: bool = False
    compensate: bool | None = None
    data: Place | None = None
    resolution: int | None = Field(default=None, ge=1)
    calibration: Place | None = None
    batch_size: int = Field(default=32, ge=1)
    timesteps: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool = False
    autocast: bool = False
    seed: Seed = 0
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _ratio(cls, values: Any) -> Any:
        sized = {"pruning_ratio", "macs_target", "params_target"} & {k for k, v in values.items() if v is not None}
        return values if sized else {**values, "pruning_ratio": 0.3}

    @field_validator("importance", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ValueError("is neither a criterion's name nor a mapping with a 'name'")
        return dict(value)

    @field_validator("ignored_layers", "target_layers", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def criterion(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the importance criterion."""
        options = dict(self.importance)
        return options.pop("name"), options


def read_config(path: Path, settings: Sequence[str] = (), **overrides: str | None) -> PruningConfig:
    """How to prune, from a file; see `read_as`."""
    return read_as(PruningConfig, path, settings, **overrides)
