"""The native config: frozen, checked when made, unknown keys are errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from typing_extensions import Self

from diffprune_plugin.config.base import CRITERION, PathText, read_as
from diffprune_plugin.config.latency import LatencyConfig
from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.options import BUDGETS, Patterns, PlanOptions
from diffprune_plugin.planning.widths import AUTO, rules_of
from diffprune_plugin.utils.checked import Checked, Seed, nested

# What depth: auto cannot be combined with, and why.
NAMED = "it names layers, whose names change where blocks go; name the blocks instead"
WEIGHED = "blocks are weighed against widths, by the linear sensitivity; drop one"
UNCHOSEN = {
    **dict.fromkeys(("ignored_layers", "target_layers", "pruning_ratio_dict", "preset"), NAMED),
    **dict.fromkeys(("allocation", "global_pruning", "head_pruning_ratio"), WEIGHED),
    **dict.fromkeys(("latency_target", "max_latency_ms"), "blocks are chosen by a size; say macs_target"),
}
UNSET: tuple[Any, ...] = (None, False, (), {})

Depth = Annotated[Patterns, BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class Subject(Checked):
    """The keys that stand first in a config."""

    model: PathText = Field(description="Directory of the dense model: a pipeline, or the model by itself.")
    output: PathText = Field(default="pruned", description="Directory of the result.")
    importance: dict[str, Any] = Field(
        default_factory=lambda: {"name": CRITERION},
        description="The criterion: its name, or a mapping of name and its options.",
    )


class PruningConfig(PlanOptions, Subject):
    """What to prune and how: the options of a plan, and what stands around it. Paths are relative to the working
    directory.
    """

    data: PathText | None = Field(
        default=None,
        description="Images for calibration and compensation: a folder, an .npz with images, or a .safetensors with "
        "latents. Needed by criteria that use gradients.",
    )
    resolution: int | None = Field(
        default=None,
        ge=1,
        le=16384,
        description="Image files are resized and cropped to so many pixels a side; without it they stay as they are.",
    )
    depth: Depth = Field(
        default=(),
        description="Whole blocks that go first: patterns of their names, or a published plan (bk-sdm-base, "
        "bk-sdm-small, bk-sdm-tiny). What is left is the dense model of the ratios and targets. Or auto: blocks "
        "are weighed against widths, so that a macs_target or params_target of the whole costs least.",
    )
    max_pruning_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="No group loses a larger share of its channels; 0: blocks go and no channels.",
    )
    compensate: bool | str | None = Field(
        default=None,
        description="Refit the layers behind the cuts, without training; by default where there are data and a "
        "scheduler. A name: in the way that a plugin registered.",
    )
    calibration: PathText | None = Field(
        default=None,
        description="Directory of the calibration: read if it exists, else written, so that another ratio needs no new "
        "gradients.",
    )
    sensitivity: PathText | None = Field(
        default=None,
        description="JSON file of the sensitivity that a target is spent by: read if it exists, else written, so that "
        "another budget needs no new pass.",
    )
    latency: Annotated[LatencyConfig, BeforeValidator(nested(LatencyConfig, "latency"))] = Field(
        default=LatencyConfig(),
        description="The runtime that a latency_target or max_latency_ms counts on: a mapping of provider (cpu), dtype "
        "(fp32), batch (1), size (the model's), threads (1), options (of the provider), fuse (false) and table, a JSON "
        "file of the measured pieces that is read if it exists, else written.",
    )
    sensitivity_samples: int = Field(default=64, ge=1, le=65536, description="Noisy samples it is measured with.")
    sensitivity_probes: int = Field(default=8, ge=1, le=1024, description="Backward passes for each of them.")
    batch_size: int = Field(default=32, ge=1, le=65536, description="Samples a pass.")
    timesteps: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Points of the loss curve; by default 100, and all timesteps for the authors' loops.",
    )
    gradient_checkpointing: bool = Field(default=False, description="Less memory for more time.")
    autocast: bool = Field(
        default=False, description="Compute in bfloat16, while weights and sums of gradients keep their dtype."
    )
    blocks_at_once: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="Sums the gradients of so many blocks at once, in a sweep for each such part: the memory is the "
        "weights and those gradients; by default all in one sweep.",
    )
    seed: Seed = Field(default=0, description="Of all that is drawn at random.")
    variant: str | None = Field(
        default=None,
        pattern=r"^[\w-]+$",
        description="Of the model's weights, as in model.fp16.safetensors; found by itself where it is the only one.",
    )
    unused_tensors: Literal["refuse", "ignore"] = Field(
        default="refuse", description="What becomes of weights that the model does not take, such as copies for EMA."
    )
    device: str = Field(
        default="cpu", pattern=r"^(cpu|cuda(:\d{1,3})?)$", description="Where it runs: cpu, cuda, cuda:1 and so on."
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="Of the weights while calibrating and saving."
    )

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, values: Any) -> Any:
        """In a file a key with nothing behind it is a slip, and not a wish for the default."""
        given = {key: value for key, value in values.items() if key in ("pruning_ratio", *BUDGETS)}
        if given and all(value is None for value in given.values()):
            raise ValueError(f"{' and '.join(given)}: null, and nothing else says how much is to go; give a number")
        return values

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, values: Any) -> Any:
        """``round_to: auto`` as the runtime that it stands for."""
        latency = values.get("latency", {})
        if values.get("round_to") != AUTO or not isinstance(latency, (Mapping, LatencyConfig)):
            return values
        try:
            runtime = LatencyConfig.make(dict(latency), "latency").runtime
            rules_of(runtime)
        except BadInput as error:
            raise ValueError(f"round_to: auto: {error}") from None
        return {**values, "round_to": runtime}

    @model_validator(mode="after")
    def _depth(self) -> Self:
        if AUTO in self.depth and len(self.depth) > 1:
            raise ValueError("depth: auto stands alone; drop the other names, or auto")
        if not self.max_pruning_ratio and not self.depth:
            raise ValueError("max_pruning_ratio: 0 takes no channels, and no blocks go; add depth, or raise it")
        if self.chooses_depth:
            if not self.target:
                raise ValueError("depth: auto spends a target; add macs_target or params_target")
            for key in UNCHOSEN:
                if getattr(self, key) not in (*UNSET, "linear", "measured"):
                    raise ValueError(f"{key}: does not go with depth: auto; {UNCHOSEN[key]}")
        return self

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if self.allocation == "measured" and self.sensitivity_samples < 2:
            raise ValueError("sensitivity_samples: 1: allocation: measured holds one out; give 2 or more")
        return self

    @property
    def chooses_depth(self) -> bool:
        """Whether the blocks that go are to be chosen."""
        return self.depth == (AUTO,)

    @property
    def sources(self) -> dict[str, str | None]:
        """What the output must not replace, by key."""
        files = {key: getattr(self, key) for key in ("model", "data", "calibration", "sensitivity")}
        return files | {"latency: table": self.latency.table}

    @field_validator("importance", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ValueError("is neither a criterion's name nor a mapping with a 'name'")
        return dict(value)

    def criterion(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the importance criterion."""
        options = dict(self.importance)
        return options.pop("name"), options


def read_config(path: Path, settings: Sequence[str] = (), **overrides: str | Path | None) -> PruningConfig:
    """How to prune, from a file; see `read_as`."""
    return read_as(PruningConfig, path, settings, **overrides)
