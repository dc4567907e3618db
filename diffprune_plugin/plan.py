"""The pruning plan: which channels go, how it is made from scores, and how it is written down."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from diffprune_plugin.adapters.table import UNetAdapter
from diffprune_plugin.errors import BadInput, CheckFailed, first_line
from diffprune_plugin.files import write_text
from diffprune_plugin.groups import CoupledGroup, LayerCost, layer_costs, removed_channels, trace_groups
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.patterns import matching
from diffprune_plugin.plugins import find_adapter, importance

PLAN_FILE = "pruning_plan.json"
Scores = npt.NDArray[np.float64]


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


class PruningPlan(Frozen):
    """Which output channels of which layers go, and what is left. JSON, readable, made without touching the model.

    ``architecture`` is the SHA-256 of the dense UNet's config; ``layers`` holds every layer that changes; ``params``
    and ``macs`` are those of the whole UNet before and after, for one sample.
    """

    format: Literal[1] = 1
    model_class: str
    architecture: str
    criterion: dict[str, Any]
    pruning_ratio: float
    groups: tuple[GroupPlan, ...]
    layers: dict[str, LayerSize]
    params: tuple[int, int]
    macs: tuple[int, int]
    versions: dict[str, str]

    @property
    def sha256(self) -> str:
        """Hash of the decisions: the same plan made twice, or with other library versions, has the same."""
        content = self.model_dump(mode="json", exclude={"versions"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def shortfalls(self) -> list[str]:
        """A line for each group that could not lose what was asked."""
        return [f"{g.root}: {len(g.removed)} of {g.requested} went: {g.reason}" for g in self.groups if g.short]

    def removed_units(self) -> dict[str, list[int]]:
        """The units that go, by root layer."""
        return {group.root: list(group.removed) for group in self.groups}

    def write(self, path: Path) -> None:
        """As JSON with its hash, atomically."""
        content = self.model_dump(mode="json") | {"sha256": self.sha256}
        write_text(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> PruningPlan:
        """The plan in a file.

        Raises BadInput if it is missing, is no plan, or was altered since it was written.
        """
        try:
            content = json.loads(path.read_text())
            stated = content.pop("sha256")
            plan = cls.model_validate(content)
        except FileNotFoundError:
            raise BadInput(f"{path}: no such file; is the directory a pruned model?") from None
        except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path}: not a pruning plan: {first_line(error)}") from None
        if plan.sha256 != stated:
            raise BadInput(f"{path}: altered since it was written (its sha256 differs); restore it or prune again")
        return plan


def make_plan(
    unet: nn.Module,
    criterion: Criterion | str,
    *,
    pruning_ratio: float = 0.3,
    pruning_ratio_dict: Mapping[str, float] | None = None,
    ignored_layers: Sequence[str] = (),
    global_pruning: bool = False,
    round_to: int | None = None,
    strict: bool = False,
    adapter: UNetAdapter | None = None,
    description: dict[str, Any] | None = None,
) -> PruningPlan:
    """Decide which channels go, without touching the UNet.

    ``pruning_ratio`` is the share of each group's channels asked to go, ``pruning_ratio_dict`` the same by pattern of
    layer names; groups with a layer in ``ignored_layers`` stay. Counts follow the published rule: of C channels
    n = C - int(C * (1 - ratio)) are asked to go and floor(n / parts) go from each part, ranked inside it. ``round_to``
    makes what is kept a multiple of it, never removing more than asked. ``global_pruning`` ranks all groups together.

    Raises BadInput for a ratio outside [0, 1) or a pattern that matches nothing; CheckFailed with ``strict`` if a
    group cannot lose what was asked.
    """
    adapter = adapter or find_adapter(unet)
    if isinstance(criterion, str):
        criterion = importance(criterion)
    round_to = round_to or getattr(criterion, "round_to", None) or 1
    groups = trace_groups(unet, adapter)
    asked = requested_ratios(groups, unet, adapter, pruning_ratio, pruning_ratio_dict or {}, ignored_layers)
    scores = {g.root: unit_scores(g, criterion) for g in groups if isinstance(asked[g.root], float)}
    counts = requested_units(groups, asked, scores, global_pruning)
    planned = tuple(plan_group(group, asked[group.root], counts, scores, round_to) for group in groups)
    layers, params, macs = sizes(groups, planned, layer_costs(unet, adapter))
    plan = PruningPlan(
        model_class=adapter.model_class,
        architecture=architecture_hash(unet),
        criterion=description or {"name": type(criterion).__name__},
        pruning_ratio=pruning_ratio,
        groups=planned,
        layers=layers,
        params=params,
        macs=macs,
        versions={
            name: importlib.metadata.version(name)
            for name in ("diffprune-plugin", "torch", "torch-pruning", "diffusers")
        },
    )
    if strict and plan.shortfalls():
        raise CheckFailed("strict: " + "; ".join(plan.shortfalls()))
    return plan


def check_ratio(ratio: float, key: str) -> None:
    if not 0 <= ratio < 1:
        raise BadInput(f"{key}: {ratio} is outside [0, 1); 0.3 removes 30 % of the channels")


def check_patterns(unet: nn.Module, ratio_dict: Mapping[str, float], ignored: Sequence[str]) -> None:
    """Raises BadInput for a pattern that matches no layer: before a long calibration rather than after it."""
    names = [name for name, _ in unet.named_modules() if name]
    for key, patterns in (("ignored_layers", ignored), ("pruning_ratio_dict", ratio_dict)):
        for pattern in patterns:
            matching(pattern, names, key)


def requested_ratios(
    groups: Sequence[CoupledGroup],
    unet: nn.Module,
    adapter: UNetAdapter,
    ratio: float,
    ratio_dict: Mapping[str, float],
    ignored: Sequence[str],
) -> dict[str, float | str]:
    """For each group its ratio, or in words why it stays as it is."""
    check_ratio(ratio, "pruning_ratio")
    names = [name for name, _ in unet.named_modules() if name]
    stays = dict.fromkeys(adapter.kept_layers(unet), "kept: the adapter says that its width is the output's")
    for pattern in ignored:
        stays |= dict.fromkeys(matching(pattern, names, "ignored_layers"), f"ignored_layers: {pattern}")
    special: dict[str, tuple[float, str]] = {}
    for pattern, value in ratio_dict.items():
        check_ratio(value, f"pruning_ratio_dict[{pattern!r}]")
        special |= dict.fromkeys(matching(pattern, names, "pruning_ratio_dict"), (float(value), pattern))
    return {group.root: requested_ratio(group, float(ratio), special, stays) for group in groups}


def requested_ratio(
    group: CoupledGroup, ratio: float, special: Mapping[str, tuple[float, str]], stays: Mapping[str, str]
) -> float | str:
    """The ratio of one group, or why it stays; raises BadInput where two patterns ask different things of it."""
    for layer in group.layers:
        if layer in stays:
            return stays[layer] if layer == group.root else f"{stays[layer]} (coupled to {layer})"
    asked = dict(special[layer] for layer in group.layers if layer in special)
    if len(asked) > 1:
        wishes = " and ".join(f"{pattern!r} asks {value}" for value, pattern in asked.items())
        raise BadInput(f"pruning_ratio_dict: the group of {group.root} is coupled, but {wishes}; give it one ratio")
    return next(iter(asked), ratio)


def unit_scores(group: CoupledGroup, criterion: Criterion) -> Scores:
    """Score of each unit, shape (units,): the criterion's score of its channels, summed over paired halves.

    Raises CheckFailed for a score of the wrong length, or one that is negative or not finite.
    """
    score = criterion(group.graph_group)
    if score is None or tuple(score.shape) != (group.channels,):
        shape = None if score is None else tuple(score.shape)
        raise CheckFailed(f"{type(criterion).__name__} scored {group.root} with shape {shape}, not ({group.channels},)")
    if not bool(torch.isfinite(score).all()) or bool((score < 0).any()):
        raise CheckFailed(f"{type(criterion).__name__} gave {group.root} a score that is negative or not finite")
    folded: Scores = score.detach().double().cpu().numpy().reshape(group.pairs, group.units).sum(0)
    return folded


def requested_units(
    groups: Sequence[CoupledGroup], asked: Mapping[str, float | str], scores: Mapping[str, Scores], global_pruning: bool
) -> dict[str, int]:
    """How many units each group is asked to lose: C - int(C * (1 - ratio)).

    With ``global_pruning`` all groups of one ratio are ranked together, and each loses those below a common score.
    """
    counts = {}
    shared: dict[float, list[CoupledGroup]] = {}
    for group in groups:
        ratio = asked[group.root]
        if isinstance(ratio, float):
            counts[group.root] = group.units - int(group.units * (1 - ratio))
            shared.setdefault(ratio, []).append(group)
    for ratio, ranked in shared.items() if global_pruning else ():
        everything = np.sort(np.concatenate([scores[group.root] for group in ranked]))
        total = len(everything) - int(len(everything) * (1 - ratio))
        if total:
            counts |= {g.root: int((scores[g.root] <= everything[total - 1]).sum()) for g in ranked}
    return counts


def plan_group(
    group: CoupledGroup,
    asked: float | str,
    counts: Mapping[str, int],
    scores: Mapping[str, Scores],
    round_to: int,
) -> GroupPlan:
    """Choose the units that go: in each part those with the lowest scores."""
    requested, removed, reason = 0, [], asked if isinstance(asked, str) else ""
    step = math.lcm(group.parts, round_to)
    if not reason:
        requested = counts[group.root]
        kept = min(max(math.ceil((group.units - requested) / step), 1) * step, group.units)
        size = group.units // group.parts
        order = np.argsort(scores[group.root].reshape(group.parts, size), axis=1, kind="stable")
        lowest = order[:, : (group.units - kept) // group.parts] + np.arange(group.parts)[:, None] * size
        removed = sorted(lowest.ravel().tolist())
        reason = why_fewer(requested - len(removed), group, round_to, step)
    return GroupPlan(
        root=group.root,
        layers=group.layers,
        units=group.units,
        pairs=group.pairs,
        parts=group.parts,
        step=step,
        requested=requested,
        removed=tuple(removed),
        reason=reason,
    )


def why_fewer(missing: int, group: CoupledGroup, round_to: int, step: int) -> str:
    """In words, the constraint that kept a group from losing what was asked; empty if nothing is missing."""
    if not missing:
        return ""
    limits = [f"{group.parts} norm groups or heads lose equally many"] if group.parts > 1 else []
    limits += [f"round_to {round_to}"] if round_to > 1 else []
    return f"{' and '.join(limits) or 'one channel has to stay'}: {step} at a time"


def sizes(
    groups: Sequence[CoupledGroup], planned: Iterable[GroupPlan], costs: Mapping[str, LayerCost]
) -> tuple[dict[str, LayerSize], tuple[int, int], tuple[int, int]]:
    """Layers that change, and params and MACs before and after."""
    gone = removed_channels(groups, {group.root: list(group.removed) for group in planned})
    layers, before, after = {}, np.zeros(2, np.int64), np.zeros(2, np.int64)
    for name, cost in costs.items():
        less = (len(gone.get((name, "in"), ())), len(gone.get((name, "out"), ())))
        before += cost.after(0, 0)
        after += cost.after(*less)
        if any(less):
            width = (cost.channels_in, cost.channels_out)
            layers[name] = LayerSize(before=width, after=(width[0] - less[0], width[1] - less[1]))
    return layers, (int(before[0]), int(after[0])), (int(before[1]), int(after[1]))


def architecture_hash(unet: Any) -> str:
    """SHA-256 of what the dense config says beyond the defaults: a key that a later diffusers adds changes nothing."""
    defaults = {key: parameter.default for key, parameter in inspect.signature(type(unet)).parameters.items()}
    config = {
        key: value
        for key, value in dict(unet.config).items()
        if not key.startswith("_") and plain(value) != plain(defaults.get(key))
    }
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode()).hexdigest()


def plain(value: Any) -> Any:
    """A tuple as the list that it becomes in JSON."""
    return list(value) if isinstance(value, tuple) else value
