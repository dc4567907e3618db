"""The native config: frozen, checked when made, unknown keys are errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diffprune_plugin.errors import BadInput, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class PruningConfig(BaseModel):
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

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str
    output: str = "pruned"
    importance: dict[str, Any] = Field(default_factory=lambda: {"name": "diff_taylor"})
    pruning_ratio: float | None = Field(default=None, ge=0, lt=1)
    pruning_ratio_dict: dict[str, float] = Field(default_factory=dict)
    macs_target: float | None = Field(default=None, gt=0, le=1)
    params_target: float | None = Field(default=None, gt=0, le=1)
    max_pruning_ratio: float = Field(default=1.0, gt=0, le=1)
    head_pruning_ratio: float | None = Field(default=None, ge=0, lt=1)
    ignored_layers: tuple[str, ...] = ()
    global_pruning: bool = False
    isomorphic: bool = False
    round_to: int | None = Field(default=None, ge=1)
    halves: Literal["together", "apart"] | None = None
    strict: bool = False
    compensate: bool | None = None
    data: str | None = None
    resolution: int | None = Field(default=None, ge=1)
    calibration: str | None = None
    batch_size: int = Field(default=32, ge=1)
    timesteps: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool = False
    autocast: bool = False
    seed: int = Field(default=0, ge=0)
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

    @field_validator("ignored_layers", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("pruning_ratio", "macs_target", "params_target", "max_pruning_ratio", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @classmethod
    def make(cls, values: Mapping[str, Any], where: str = "config") -> PruningConfig:
        """A config from a mapping; raises BadInput with the place, the value and the remedy for what is wrong."""
        for key in values:
            if key not in cls.model_fields:
                raise BadInput(f"{where}: unknown key {key!r}{nearest(str(key), cls.model_fields)}; {known_keys(cls)}")
        try:
            return cls(**values)
        except ValidationError as error:
            raise BadInput(f"{where}: {'; '.join(explain(item) for item in error.errors())}") from None

    def criterion(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the importance criterion."""
        options = dict(self.importance)
        return options.pop("name"), options


def known_keys(cls: type[BaseModel]) -> str:
    return f"known: {', '.join(cls.model_fields)}"


def explain(error: Any) -> str:
    """One pydantic error as key, value and what is expected."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{key} is missing; add '{key}: ...'"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {error['input']!r}: {message[0].lower()}{message[1:]}"


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML, JSON or TOML file; raises BadInput if there is none."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        if path.suffix == ".toml":
            content: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            content = json.loads(text)
        else:
            content = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise BadInput(
            f"{path}: not valid {path.suffix.lstrip('.') or 'YAML'}: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds {type(content).__name__}, not keys and values")
    return content


def read_config(path: Path, settings: Sequence[str] = (), **overrides: str | None) -> PruningConfig:
    """A config file with ``KEY=VALUE`` settings (values in YAML, dots reach into mappings) and overrides on top."""
    values = read_mapping(path)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise BadInput(f"--set {setting!r}: not KEY=VALUE")
        try:
            set_at(values, key.split("."), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise BadInput(f"--set {setting!r}: {' '.join(str(error).split())}") from None
    values |= {key: value for key, value in overrides.items() if value is not None}
    return PruningConfig.make(values, str(path))


def set_at(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """``values[a][b] = value`` for the path (a, b); a criterion's name becomes a mapping when options are set on it."""
    *parents, last = path
    for key in parents:
        inner = values.setdefault(key, {})
        if key == "importance" and isinstance(inner, str):
            inner = values[key] = {"name": inner}
        if not isinstance(inner, dict):
            raise BadInput(f"--set {'.'.join(path)}: {key} is {inner!r}, not a mapping")
        values = inner
    values[last] = value
