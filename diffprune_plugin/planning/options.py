"""What is asked of a plan: how much goes, from where, and how it is counted. A new option is one field here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticKnownError
from typing_extensions import Self

from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.plan import TARGETS
from diffprune_plugin.planning.widths import AUTO, RUNTIMES
from diffprune_plugin.utils.checked import Checked

DEFAULT_RATIO = 0.3
BUDGETS = (*TARGETS, "max_latency_ms")  # what may be asked for instead of a ratio
PATTERNS = ("pruning_ratio_dict", "ignored_layers", "target_layers")  # options that hold patterns of layer names
LATENCIES = {"latency_target", "max_latency_ms"}
Ratio = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
WIDEST = 65536


def multiple_or_runtime(value: Any) -> Any:
    """A multiple in [1, 65536], or a runtime of the table of kernels."""
    if isinstance(value, str):
        told = "auto is for a config, whose latency names the runtime; here name it" if value == AUTO else ""
        if told or value not in RUNTIMES:
            raise ValueError(f"{told or 'no multiple, and no runtime'}: one of {', '.join(RUNTIMES)}")
    elif value is not None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise PydanticKnownError("int_type")
        if not 1 <= value <= WIDEST:
            raise PydanticKnownError("greater_than_equal", {"ge": 1})
    return value


RoundTo = Annotated[int | str | None, BeforeValidator(multiple_or_runtime)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]
Ratios = Annotated[
    dict[str, Ratio], BeforeValidator(lambda value: dict(value) if isinstance(value, Mapping) else value)
]


class PlanOptions(Checked):
    """The options of `make_plan`, which a config has as keys.

    ``pruning_ratio`` is 0.3 unless it or a target is given. Raises pydantic's ValidationError, and with `make`
    BadInput, for a value out of its range, or options that contradict each other.
    """

    pruning_ratio: Ratio | None = Field(
        default=None,
        description="Share of each group's channels that is asked to go; 0.3 unless a target is given.",
    )
    pruning_ratio_dict: Ratios = Field(
        default_factory=dict,
        description="Ratio by pattern of layer names; the last pattern that matches a layer counts.",
    )
    macs_target: Share | None = Field(
        default=None,
        description="Instead of a ratio: the share of the dense model's MACs that is to be left, met within 1 %.",
    )
    params_target: Share | None = Field(
        default=None,
        description="Instead of a ratio: the share of the dense model's parameters that is to be left, met within 1 %.",
    )
    latency_target: Share | None = Field(
        default=None,
        description="Instead of a ratio: the share of the dense model's latency that is to be left, on the runtime "
        "that 'latency' names, measured there and met within 3 %.",
    )
    max_latency_ms: float | None = Field(
        default=None,
        gt=0,
        le=1e9,
        description="Instead of a latency_target: the latency itself, in milliseconds, on the machine at hand.",
    )
    allocation: Literal["uniform", "linear", "measured"] | None = Field(
        default=None,
        description="How a target is met. uniform: by one ratio for all groups. linear: each group gets the width that "
        "costs least, by the linear sensitivity of the output to its channels (needs images and a scheduler). "
        "measured: then the widths next to it are tried, compensated, while the measured error falls. By default "
        "linear where there is what it takes (in Python, where make_plan is given a sensitivity), else uniform.",
    )
    max_pruning_ratio: Share = Field(default=1.0, description="No group loses a larger share of its channels.")
    head_pruning_ratio: Ratio | None = Field(
        default=None,
        description="Attention loses this share of its heads, whole, instead of dimensions inside them.",
    )
    ignored_layers: Patterns = Field(
        default=(), description="Patterns of layers that stay as they are, with what is coupled to them."
    )
    target_layers: Patterns = Field(
        default=(), description="Patterns that all layers of a group must match; the other groups stay as they are."
    )
    global_pruning: bool = Field(
        default=False, description="Rank the channels of all groups together instead of each group by itself."
    )
    isomorphic: bool = Field(
        default=False, description="Rank only groups of the same structure together; needs global_pruning."
    )
    round_to: RoundTo = Field(
        default=None,
        json_schema_extra={"minimum": 1, "maximum": WIDEST},
        description="What is kept of a group is a multiple of it; never removes more than asked. Or a runtime, "
        "cuda-fp16 say, whose kernels each group's width is to keep; in a config auto stands for that of latency. By "
        "default what the criterion asks for, else 1.",
    )
    halves: Literal["together", "apart"] | None = Field(
        default=None,
        description="apart: each half of a GEGLU is asked to lose the ratio on its own, and a pair stays where both "
        "stay (deduced from the published size of LDM-4). By default what the criterion asks for, else together.",
    )
    rounding: Literal["published", "nearest"] = Field(
        default="published",
        description="How many of C channels, or heads, a ratio asks to go: C - int(C * (1 - ratio)), as published, or "
        "the nearest count.",
    )
    preset: Literal["obs-diff"] | None = Field(
        default=None,
        description="A published recipe, which says where channels go and how they are counted. obs-diff: heads and "
        "feed-forward of all blocks of a transformer but the first and the last.",
    )
    strict: bool = Field(
        default=False, description="A group that loses nothing, or a whole step less than asked, is an error."
    )

    @model_validator(mode="before")
    @classmethod
    def _ratio(cls, values: Any) -> Any:
        sized = {"pruning_ratio", *BUDGETS} & {key for key, value in values.items() if value is not None}
        return values if sized else {**values, "pruning_ratio": DEFAULT_RATIO}

    @model_validator(mode="after")
    def _agree(self) -> Self:
        given = {key: getattr(self, key) for key in ("pruning_ratio", *BUDGETS) if getattr(self, key) is not None}
        possible = "pruning_ratio" not in given and not set(given) >= LATENCIES
        if len(given) > 1 and not (possible and self.spends):
            listed = " and ".join(f"{key} {value}" for key, value in given.items())
            both = ", or say allocation: linear, which holds all of them" if possible else ""
            raise ValueError(f"{listed} ask for different things; give one of them (null takes back the other){both}")
        if self.spends and not given.keys() & set(BUDGETS):
            budgets = f"{', '.join(BUDGETS[:-1])} or {BUDGETS[-1]}"
            raise ValueError(f"allocation: {self.allocation} spends a budget; add {budgets}")
        if self.allocation == "measured" and self.timed:
            raise ValueError("allocation: measured spends a size, no latency; say linear")
        if self.spends and self.global_pruning:
            raise ValueError(
                f"global_pruning: true ranks groups together, allocation: {self.allocation} weighs them; drop one"
            )
        if self.preset and (self.target_layers or self.rounding != "published"):
            raise ValueError(f"preset: {self.preset} sets target_layers and rounding itself; drop them, or the preset")
        if self.isomorphic and not self.global_pruning:
            raise ValueError("isomorphic: true ranks like groups together and needs global_pruning: true; set it too")
        return self

    @property
    def spends(self) -> bool:
        """Whether a target is spent by a sensitivity."""
        return self.allocation in ("linear", "measured")

    @property
    def target(self) -> dict[str, float]:
        """The target by its key, if there is one."""
        return {key: getattr(self, key) for key in TARGETS if getattr(self, key) is not None}

    @property
    def timed(self) -> bool:
        """Whether a latency is asked for."""
        return self.latency_target is not None or self.max_latency_ms is not None

    def with_wishes_of(self, criterion: Any) -> Self:
        """With the criterion's ``round_to`` and ``halves`` where there are none; raises BadInput for wrong ones."""
        wishes = {key: getattr(criterion, key, None) for key in ("round_to", "halves") if getattr(self, key) is None}
        return self.make(self.model_dump() | wishes, type(criterion).__name__)


def check_ratio(ratio: float, key: str) -> None:
    """Raises BadInput for a ratio of a schedule that is outside [0, 1)."""
    if not 0 <= ratio < 1:
        raise BadInput.of(key, ratio, "is outside [0, 1); 0.3 removes 30 % of the channels")
