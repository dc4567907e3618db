"""How a plan is made: scores of the coupled groups, what is asked of each, and the sizes that come out."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.graph.costs import layer_costs
from diffprune_plugin.graph.groups import CoupledGroup, trace_groups
from diffprune_plugin.graph.patterns import layer_names, matching
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.planning.channels import AskedGroup, Halves, Rules, Scores, head_groups, select
from diffprune_plugin.planning.plan import GroupPlan, PruningPlan, architecture_hash
from diffprune_plugin.planning.target import searched, sizes
from diffprune_plugin.plugins import find_adapter, importance

DEFAULT_RATIO = 0.3
TARGETS = ("macs_target", "params_target")


def make_plan(
    model: nn.Module,
    criterion: Criterion | str,
    *,
    pruning_ratio: float | None = None,
    pruning_ratio_dict: Mapping[str, float] | None = None,
    macs_target: float | None = None,
    params_target: float | None = None,
    max_pruning_ratio: float = 1.0,
    head_pruning_ratio: float | None = None,
    ignored_layers: Sequence[str] = (),
    target_layers: Sequence[str] = (),
    global_pruning: bool = False,
    isomorphic: bool = False,
    round_to: int | None = None,
    halves: Halves | None = None,
    strict: bool = False,
    adapter: ModelAdapter | None = None,
    description: dict[str, Any] | None = None,
) -> PruningPlan:
    """Decide which channels go, without touching the UNet.

    ``pruning_ratio`` (0.3) is the share of each group's channels asked to go, ``pruning_ratio_dict`` the same by
    pattern of layer names; groups with a layer in ``ignored_layers``, or with one outside ``target_layers`` if there
    are any, stay. Counts follow the published rule: of C channels n = C - int(C * (1 - ratio)) are asked to go and
    floor(n / parts) go from each part, ranked inside it.
    ``macs_target`` or ``params_target``, the share of the dense UNet's that is to be left, searches for the ratio.
    ``max_pruning_ratio`` bounds the share that a group loses. ``head_pruning_ratio``: attention loses this share of
    its heads, whole, instead of dimensions inside them. ``global_pruning`` ranks all groups together, ``isomorphic``
    those alike. ``round_to`` makes what is kept a multiple of it, never removing more than asked. ``halves="apart"``
    asks each half of a GEGLU to lose the ratio on its own: a pair stays where both stay. Deduced from the published
    size of LDM-4, not read in the authors' code.

    Raises BadInput for a ratio out of range, a target that cannot be reached or a pattern that matches nothing;
    CheckFailed with ``strict`` if a group or target is missed.
    """
    target = check_asked(locals())
    adapter = adapter or find_adapter(model)
    if isinstance(criterion, str):
        criterion = importance(criterion)
    rules = Rules(
        global_pruning=global_pruning,
        isomorphic=isomorphic,
        round_to=round_to or getattr(criterion, "round_to", None) or 1,
        max_pruning_ratio=max_pruning_ratio,
        halves=halves or getattr(criterion, "halves", None) or "together",
    )
    groups = trace_groups(model, adapter)
    asked = requested_ratios(groups, model, adapter, pruning_ratio_dict or {}, ignored_layers, target_layers)
    heads = {} if head_pruning_ratio is None else head_groups(groups, adapter.head_layers(model))
    asked = asked_of_heads(asked, heads)
    items = [asked_group(g, asked[g.root], criterion, heads.get(g.root, "")) for g in groups]
    costs = layer_costs(model, adapter)
    ratio = DEFAULT_RATIO if pruning_ratio is None else float(pruning_ratio)
    if target:
        ratio, planned = searched(items, costs, target, head_pruning_ratio, rules)
    else:
        planned = select(items, ratio, head_pruning_ratio, rules)
    layers, params, macs = sizes(groups, planned, costs)
    plan = PruningPlan(
        model_class=adapter.model_class,
        architecture=architecture_hash(model),
        criterion=description or {"name": type(criterion).__name__},
        pruning_ratio=ratio,
        target=target,
        groups=tuple(planned),
        heads=heads_left(heads, planned, groups),
        layers=layers,
        params=params,
        macs=macs,
        versions=library_versions(),
    )
    if strict and plan.shortfalls():
        raise CheckFailed("strict: " + "; ".join(plan.shortfalls()))
    return plan


def library_versions() -> dict[str, str]:
    """Of what a plan depends on."""
    names = ("diffprune-plugin", "torch", "torch-pruning", "diffusers")
    return {name: importlib.metadata.version(name) for name in names}


def check_asked(options: Mapping[str, Any]) -> dict[str, float]:
    """The target among the options of `make_plan`, if any; raises BadInput for what is out of range or contradicts."""
    given = {key: options[key] for key in ("pruning_ratio", *TARGETS) if options.get(key) is not None}
    if len(given) > 1:
        listed = " and ".join(f"{key} {value}" for key, value in given.items())
        raise BadInput(f"{listed} ask for different things; give one of them (null takes back the other)")
    for key in ("pruning_ratio", "head_pruning_ratio"):
        if options.get(key) is not None:
            check_ratio(options[key], key)
    for key in (*TARGETS, "max_pruning_ratio"):
        if options.get(key) is not None and not 0 < options[key] <= 1:
            raise BadInput(f"{key}: {options[key]} is outside (0, 1]; 0.5 is one half")
    if options.get("isomorphic") and not options.get("global_pruning"):
        raise BadInput("isomorphic: true ranks like groups together and needs global_pruning: true; set it too")
    if options.get("halves") not in (*get_args(Halves), None):
        raise BadInput(f"halves: {options['halves']!r} is none of {', '.join(get_args(Halves))}")
    return {key: float(value) for key, value in given.items() if key in TARGETS}


def check_ratio(ratio: float, key: str) -> None:
    if not 0 <= ratio < 1:
        raise BadInput(f"{key}: {ratio} is outside [0, 1); 0.3 removes 30 % of the channels")


def check_patterns(model: nn.Module, **patterns: Iterable[str]) -> None:
    """Raises BadInput for a pattern that matches no layer: before a long calibration rather than after it."""
    names = layer_names(model)
    for key, given in patterns.items():
        for pattern in given:
            matching(pattern, names, key)


def requested_ratios(
    groups: Sequence[CoupledGroup],
    model: nn.Module,
    adapter: ModelAdapter,
    ratio_dict: Mapping[str, float],
    ignored: Sequence[str],
    targets: Sequence[str],
) -> dict[str, float | str | None]:
    """For each group its own ratio, None for the common one, or in words why it stays as it is."""
    names = layer_names(model)
    stays = dict.fromkeys(adapter.kept_layers(model), "kept: the adapter says that its width is the output's")
    wanted = {name for pattern in targets for name in matching(pattern, names, "target_layers")}
    if targets:
        stays |= {name: "outside target_layers" for name, also in names.items() if also and name not in wanted}
    for pattern in ignored:
        stays |= dict.fromkeys(matching(pattern, names, "ignored_layers"), f"ignored_layers: {pattern}")
    special: dict[str, tuple[float, str]] = {}
    for pattern, value in ratio_dict.items():
        check_ratio(value, f"pruning_ratio_dict[{pattern!r}]")
        special |= dict.fromkeys(matching(pattern, names, "pruning_ratio_dict"), (float(value), pattern))
    return {group.root: requested_ratio(group, special, stays) for group in groups}


def requested_ratio(
    group: CoupledGroup, special: Mapping[str, tuple[float, str]], stays: Mapping[str, str]
) -> float | str | None:
    """The ratio of one group, or why it stays; raises BadInput where two patterns ask different things of it."""
    for layer in group.layers:
        if layer in stays:
            return stays[layer] if layer == group.root else f"{stays[layer]} (coupled to {layer})"
    asked = dict(special[layer] for layer in group.layers if layer in special)
    if len(asked) > 1:
        wishes = " and ".join(f"{pattern!r} asks {value}" for value, pattern in asked.items())
        message = f"pruning_ratio_dict: the group of {group.root} is coupled, but {wishes}; give it one ratio"
        raise BadInput(message, key="pruning_ratio_dict", value=next(iter(asked.values())))
    return next(iter(asked), None)


def asked_of_heads(asked: Mapping[str, float | str | None], heads: Mapping[str, str]) -> dict[str, float | str | None]:
    """What is asked of each group, where attentions lose whole heads: if one group of an attention stays, all do.

    Raises BadInput for a group of heads with a ratio of its own.
    """
    stays = {heads[root]: why for root, why in asked.items() if root in heads and isinstance(why, str)}
    for root, why in asked.items():
        if root in heads and isinstance(why, float):
            raise BadInput(f"pruning_ratio_dict: {root} gets {why}, but head_pruning_ratio takes whole heads; drop one")
    return {root: stays.get(heads.get(root, ""), why) for root, why in asked.items()}


def asked_group(group: CoupledGroup, asked: float | str | None, criterion: Criterion, heads: str) -> AskedGroup:
    """A group with its scores, unless it stays."""
    if isinstance(asked, str):
        return AskedGroup(group, asked, np.zeros(group.units))
    return AskedGroup(group, asked, unit_scores(group, criterion), heads)


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


def heads_left(
    heads: Mapping[str, str], planned: Sequence[GroupPlan], groups: Sequence[CoupledGroup]
) -> dict[str, tuple[int, int]]:
    """Heads before and after of each attention that loses whole ones."""
    counts = {}
    for plan, group in zip(planned, groups, strict=True):
        if group.root in heads and plan.removed:
            counts[heads[group.root]] = (group.parts, group.parts - len(plan.removed) // plan.step)
    return counts
