"""The pruning plan: which channels go, and how it is written down."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.utils.files import write_text
from diffprune_plugin.utils.reading import parse_json, read_text

PLAN_FILE = "pruning_plan.json"
WITHIN = 0.01  # a target is met within this share of it
HAIR = 1e-9  # of a group's units: far below one, far above rounding
TIMED_WITHIN = 0.03  # a latency likewise
LATENCY = "latency"
TARGETS = {"macs_target": "macs", "params_target": "params", "latency_target": LATENCY}  # what each is a share of


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GroupPlan(Frozen):
    """One coupled group: its root layer, what is coupled to it, and which of its units go.

    A unit is a channel of the root, with its twins where the layer's output comes in ``pairs``. The units fall into
    ``parts`` that lose equally many, so that, with ``round_to``, ``step`` go at a time. ``requested`` units were asked
    to go; ``reason`` says why fewer went.
    """

    root: str
    layers: tuple[str, ...]
    units: int
    pairs: int
    parts: int
    step: int
    requested: int
    removed: tuple[int, ...]
    reason: str = ""

    @property
    def short(self) -> bool:
        """Whether the group lost nothing, or a whole step less, than it was asked to."""
        return self.requested > 0 and (not self.removed or self.requested - len(self.removed) >= self.step)


class LayerSize(Frozen):
    """Channels (in, out) of one layer before and after."""

    before: tuple[int, int]
    after: tuple[int, int]


class Allocation(Frozen):
    """Where a budget was spent: the predicted error of the output, in all and by root layer, and by which sensitivity.

    An error is the mean squared change of a value of the model's output; ``sensitivity`` the SHA-256 of what says so.
    ``measured``: those of the plans that were tried, after compensation, of fresh samples: first that of the plan made
    by the sensitivity alone, then of one a round; the plan with the least is the one that was taken.
    """

    error: float
    errors: dict[str, float]
    sensitivity: str
    measured: tuple[float, ...] = ()


class Latency(Frozen):
    """What the plan's latency was measured to be before anything was trained: a share of the dense model's.

    ``predicted``: by the sum of pieces; ``measured``: of the whole file on its provider, the median of ``rounds`` with
    its 95 % interval; ``noise``: the interval of the dense model against itself; ``dense_ms``: what that took there,
    by ``clock`` (the wall's, or the computing thread's own); ``max_ms``: the latency that was asked for, if one was;
    ``attempts``: plans that were measured; ``fuse``: with fused operators; ``size``: the side of a sample, None for the
    config's; ``device``, ``versions``: what it ran on.
    """

    provider: str
    dtype: str
    batch: int
    size: int | None = None
    threads: int
    clock: Literal["wall", "thread"]
    device: str
    versions: dict[str, str]
    predicted: float
    measured: tuple[float, float, float]
    noise: tuple[float, float]
    dense_ms: float
    max_ms: float | None = None
    attempts: int
    fuse: bool = False


class BlockChoice(Frozen):
    """Which blocks went by the sensitivity, chosen together with widths, before these were settled for what was left.

    ``gone``: by their names; ``errors``: what the removal of each that might have gone was predicted to cost, a mean
    squared change of a value of the output; ``error``: in all, widths included; ``sensitivity`` the SHA-256 of what
    says so. ``target``: what was asked of the model with all its blocks, whose ``params`` and ``macs`` these are.
    """

    gone: tuple[str, ...]
    errors: dict[str, float]
    error: float
    target: dict[str, float]
    params: int
    macs: int
    sensitivity: str


class PruningPlan(Frozen):
    """Which output channels of which layers go, and what is left. JSON, readable, made without touching the model.

    ``architecture`` is the SHA-256 of the dense UNet's config; ``layers`` holds every layer that changes; ``params``
    and ``macs`` are those of the whole UNet before and after, for one sample. ``target`` is the ``macs_target``,
    ``params_target`` or ``latency_target`` that was to be met; ``heads`` the number of heads before and after of each
    attention that loses whole ones; ``depth`` the blocks that went before, without which the model is the dense one of
    this plan, ``skipped`` those of them that its config still has, and ``blocks`` why, where they were chosen.
    """

    format: Literal[1] = 1
    model_class: str
    architecture: str
    criterion: dict[str, Any]
    pruning_ratio: float
    target: dict[str, float] = {}
    allocation: Allocation | None = None
    latency: Latency | None = None
    depth: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    blocks: BlockChoice | None = None
    groups: tuple[GroupPlan, ...]
    heads: dict[str, tuple[int, int]] = {}
    layers: dict[str, LayerSize]
    params: tuple[int, int]
    macs: tuple[int, int]
    versions: dict[str, str]

    @property
    def sha256(self) -> str:
        """Hash of the decisions: the same plan made twice, or with other library versions, has the same."""
        later = ("allocation", "latency", "depth", "skipped", "blocks")
        absent = {key for key in later if not getattr(self, key)}  # not in older plans
        content = self.model_dump(mode="json", exclude={"versions", *absent})
        if self.allocation and not self.allocation.measured:
            del content["allocation"]["measured"]
        if self.latency and not self.latency.fuse:
            del content["latency"]["fuse"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def shortfalls(self) -> list[str]:
        """A line for each group that could not lose what was asked; for a target only whether that was missed."""
        if not self.target:
            return [f"{g.root}: {len(g.removed)} of {g.requested} went: {g.reason}" for g in self.groups if g.short]
        missed = {key: told for key, share in self.target.items() for told in self.missed(key, share)}
        # Of several targets each is a limit: where another is met, one that is held with room to spare is no miss.
        held = {key for key in missed if self.left(key) < self.target[key]} if len(missed) < len(self.target) else set()
        return [told for key, told in missed.items() if key not in held]

    def left(self, key: str) -> float:
        """The share that is left of what a target is about."""
        if key == "latency_target":
            return 0.0 if self.latency is None else self.latency.measured[0]
        before, after = getattr(self, TARGETS[key])
        return float(after / before)

    def missed(self, key: str, share: float) -> list[str]:
        """A line where what is left is not the share that was asked for."""
        if key == "latency_target":
            return [] if self.latency is None else missed(share, self.latency)
        if abs(self.left(key) - share) <= WITHIN * share:
            return []
        nearest = "no nearer size below it" if self.allocation else "no nearer size"
        got = f"asked {share}, got {self.left(key):.4f}"
        return [f"{key}: {got}: the groups' steps, and ratios that are set, allow {nearest}"]

    def removed_units(self) -> dict[str, list[int]]:
        """The units that go, by root layer."""
        return {group.root: list(group.removed) for group in self.groups}

    def ratios(self) -> dict[str, float]:
        """The share of each group's units that goes, by root layer: a ``pruning_ratio_dict`` that asks for just these.

        A hair less than the share, since what is asked of a ratio is rounded up to whole units.
        """
        return {group.root: max(len(group.removed) / group.units - HAIR, 0.0) for group in self.groups}

    def write(self, path: Path) -> None:
        """As JSON with its hash, atomically."""
        write_text(path, self.as_json(indent=1) + "\n")

    def as_json(self, indent: int | None = None) -> str:
        """With its hash."""
        return json.dumps(self.model_dump(mode="json") | {"sha256": self.sha256}, indent=indent)

    @classmethod
    def read(cls, path: Path | str) -> PruningPlan:
        """The plan in a file.

        Raises BadInput if it is missing, is no plan, or was altered since it was written.
        """
        path = Path(path)
        if not path.exists():
            raise BadInput(f"{path}: no such file; is the directory a pruned model?")
        try:
            text = read_text(path)
        except BadInput as error:
            raise BadInput(f"{error}; restore it or prune again") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> PruningPlan:
        """The plan in a text, of a file that is named in the errors; raises as `read` does."""
        try:
            content = parse_json(text, where)
            stated = content.pop("sha256")
            plan = cls.model_validate(content)
        except BadInput as error:
            raise BadInput(f"{error}; restore it or prune again") from None
        except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{where}: not a pruning plan: {first_line(error)}") from None
        if plan.sha256 != stated:
            raise BadInput(f"{where}: altered since it was written (its sha256 differs); restore it or prune again")
        return plan


def missed(share: float, latency: Latency) -> list[str]:
    """A line where the measured latency is not the one asked for."""
    got, low, high = latency.measured
    if abs(got - share) <= TIMED_WITHIN * share:
        return []
    told = f"asked {share:.4g}, measured {got:.4f} [{low:.4f}, {high:.4f}] after {latency.attempts} plans"
    return [f"latency_target: {told}: the groups' steps, or the machine's noise, allow no nearer one"]


def architecture_hash(model: Any) -> str:
    """SHA-256 of what the dense config says beyond the defaults: a key that a later diffusers adds changes nothing, nor
    one that the class does not take (EMA's ``decay``)."""
    defaults = {
        key: parameter.default
        for cls in reversed(type(model).__mro__)
        for key, parameter in inspect.signature(cls.__init__).parameters.items()  # type: ignore[misc]
    }
    config = {
        key: value
        for key, value in dict(model.config).items()
        if key in defaults and plain(value) != plain(defaults[key])
    }
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode()).hexdigest()


def plain(value: Any) -> Any:
    """A tuple as the list that it becomes in JSON."""
    return list(value) if isinstance(value, tuple) else value
