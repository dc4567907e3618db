"""The native config: frozen, checked when made, unknown keys are errors."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from diffprune_plugin.config.documents import parse_mapping, parse_yaml, read_text
from diffprune_plugin.errors import BadInput, nearest

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self


ConfigType = TypeVar("ConfigType", bound="Config")
POLYNOMIAL_END = 1e-7  # the rate that diffusers' polynomial schedule ends at


def number(value: Any) -> Any:
    """A whole number as a float."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53
    return float(value) if whole else value


Place = Annotated[str, Field(min_length=1)]  # an empty path would be the working directory
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # what torch takes
Number = Annotated[float, BeforeValidator(number)]


class Config(BaseModel):
    """What all configs share: frozen, checked when made, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def make(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """A config from a mapping; raises BadInput with the place, the value and the remedy for what is wrong."""
        for key in values:
            if key not in cls.model_fields:
                raise BadInput(f"{where}: unknown key {key!r}{nearest(str(key), cls.model_fields)}; {known_keys(cls)}")
        try:
            return cls(**values)
        except ValidationError as error:
            raise BadInput(f"{where}: {'; '.join(explain(item) for item in error.errors())}") from None


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


class FinetuneConfig(Config):
    """How to train a pruned model further. Paths are relative to the working directory.

    model, output: directories of the pruned model (a pipeline) and of the result; data, resolution: as for pruning.
    condition_dropout: share of samples trained without their condition, for classifier-free guidance; by default 0.1
        where the data says what stands for none (the empty caption), else 0.
    steps: optimizer steps; batch_size: samples a step, over all processes and accumulated passes together, so that the
        same config trains the same on any number of processes.
    learning_rate, lr_scheduler, warmup_steps (by default a twentieth of the steps), weight_decay: of AdamW.
    max_grad_norm: gradients are clipped to it; null does not clip.
    ema_decay: of the moving average of the weights, which is what is saved; 0 saves the last weights.
    snr_gamma: min-SNR weights (arXiv 2303.09556), 5 in the paper; by default all timesteps weigh the same.
    timestep_sampling: ``uniform``, each sample on its own, or ``stratified``, a batch spread evenly over the timesteps.
    teacher: directory of the dense model; task_weight, output_weight, feature_weight: weights of the noise-prediction
        loss, of the distance to the teacher's prediction, and of that between features (arXiv 2305.15798).
    mixed_precision: by default what ``accelerate launch`` was told, else ``no``. gradient_checkpointing: less memory,
        more time.
    checkpoint_every: steps; num_workers: processes that load data; tracker: where the curve is followed, in
        ``OUTPUT.logs``.
    """

    model: Place
    output: Place = "finetuned"
    data: Place
    resolution: int | None = Field(default=None, ge=1)
    condition_dropout: Number | None = Field(default=None, ge=0, le=1)
    steps: int = Field(ge=1)
    batch_size: int = Field(default=32, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: Number = Field(default=2e-4, gt=0)
    lr_scheduler: Literal["cosine", "linear", "constant", "polynomial"] = "cosine"
    warmup_steps: int | None = Field(default=None, ge=0)
    weight_decay: Number = Field(default=0.0, ge=0)
    max_grad_norm: Number | None = Field(default=1.0, gt=0)
    ema_decay: Number = Field(default=0.999, ge=0, lt=1)
    snr_gamma: Number | None = Field(default=None, gt=0)
    timestep_sampling: Literal["uniform", "stratified"] = "uniform"
    teacher: Place | None = None
    task_weight: Number = Field(default=1.0, ge=0)
    output_weight: Number | None = Field(default=None, ge=0)
    feature_weight: Number | None = Field(default=None, ge=0)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(default=500, ge=1)
    num_workers: int = Field(default=0, ge=0)
    tracker: Literal["tensorboard", "none"] = "tensorboard"
    seed: Seed = 0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for key in ("output_weight", "feature_weight"):
            if self.teacher is None and getattr(self, key) is not None:
                raise ValueError(f"{key} needs the dense model; add 'teacher: DIRECTORY'")
        if not any(self.weights().values()):
            raise ValueError("all weights of the loss are 0; give one of them a value")
        if self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leaves none of the {self.steps} steps; make it smaller")
        if self.lr_scheduler == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise ValueError(f"learning_rate {self.learning_rate}: polynomial ends at {POLYNOMIAL_END}; make it larger")
        return self

    def weights(self) -> dict[str, float]:
        """The terms of the loss with their weights; the teacher's prediction weighs 1 if there is a teacher."""
        output = self.output_weight if self.output_weight is not None else float(self.teacher is not None)
        return {"task": self.task_weight, "output": output, "features": self.feature_weight or 0.0}


def known_keys(cls: type[BaseModel]) -> str:
    return f"known: {', '.join(cls.model_fields)}"


def explain(error: Any) -> str:
    """One pydantic error as key, value and what is expected."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{key} is missing; add '{key}: ...'" + (" or give --model" if key == "model" else "")
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return str(message)
    return f"{key}: {error['input']!r}: {message[0].lower()}{message[1:]}"


def read_config(path: Path, settings: Sequence[str] = (), **overrides: str | None) -> PruningConfig:
    """How to prune, from a file; see `read_as`."""
    return read_as(PruningConfig, path, settings, **overrides)


def read_as(kind: type[ConfigType], path: Path, settings: Sequence[str] = (), **overrides: str | None) -> ConfigType:
    """A config file with ``KEY=VALUE`` settings (values in YAML, dots reach into mappings) and overrides on top."""
    values = parse_mapping(read_text(path), path)
    apply_(values, settings, overrides)
    return kind.make(values, str(path))


def apply_(values: dict[str, Any], settings: Sequence[str], overrides: Mapping[str, str | None]) -> None:
    """Put settings and overrides on top of a config's values; raises BadInput for a setting that cannot be set."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise BadInput(f"--set {setting!r}: not KEY=VALUE")
        try:
            set_at(values, key, parse_yaml(text))
        except (ValueError, yaml.YAMLError) as error:
            raise BadInput(f"--set {setting!r}: {' '.join(str(error).split())}") from None
    values |= {key: value for key, value in overrides.items() if value is not None}


def set_at(values: dict[str, Any], key: str, value: Any) -> None:
    """``values[key] = value``; what follows the key's first dot is a key of the mapping there, dots and all.

    A criterion's name becomes a mapping when options are set on it.
    """
    first, dot, inner = key.partition(".")
    if dot:
        before = values.get(first) or {}
        before = {"name": before} if first == "importance" and isinstance(before, str) else before
        if not isinstance(before, dict):
            raise BadInput(f"--set {key}: {first} is {before!r}, not a mapping")
        value = {**before, inner: value}
    values[first] = value
