"""How a plan is made: scores of the coupled groups, what is asked of each, and the sizes that come out."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.graph.costs import LayerCost, can_narrow, layer_costs
from diffprune_plugin.graph.groups import CoupledGroup, trace_groups
from diffprune_plugin.graph.patterns import layer_names, matching
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.planning.allocated import Errors, LatencyCosts, allocated, size_with
from diffprune_plugin.planning.channels import AskedGroup, Request, head_groups, select
from diffprune_plugin.planning.options import PATTERNS, PlanOptions
from diffprune_plugin.planning.plan import LATENCY, GroupPlan, PruningPlan, architecture_hash
from diffprune_plugin.planning.presets import filled_in
from diffprune_plugin.planning.scores import unit_scores
from diffprune_plugin.planning.target import searched, sizes
from diffprune_plugin.plugins import find_adapter, importance


def make_plan(
    model: nn.Module,
    criterion: Criterion | str,
    *,
    adapter: ModelAdapter | None = None,
    description: dict[str, Any] | None = None,
    sensitivity: Errors | None = None,
    **options: Any,
) -> PruningPlan:
    """Decide which channels go, without touching the model; ``options`` are the fields of `PlanOptions`.

    ``criterion``: an importance or its name; ``adapter``: by default that of the model's class; ``description``: what
    the plan says of the criterion; ``sensitivity``: what a target is spent by, each group getting the width that costs
    least, unless ``allocation`` is uniform.
    Counts follow the published rule: of C channels n = C - int(C * (1 - ratio)) are asked to go and floor(n / parts) go
    from each part (norm group, head), ranked inside it.

    Raises BadInput for an unknown option or a value out of range, a target that cannot be reached or a pattern that
    matches nothing; CheckFailed for a criterion that fails, and with ``strict`` if a group or target is missed.
    """
    return plan_with(PlanOptions.make(options, "make_plan"), model, criterion, adapter, description, sensitivity)


def plan_with(
    options: PlanOptions,
    model: nn.Module,
    criterion: Criterion | str,
    adapter: ModelAdapter | None = None,
    description: dict[str, Any] | None = None,
    sensitivity: Errors | None = None,
) -> PruningPlan:
    """As `make_plan`, with its options in one object."""
    if options.allocation == "measured":
        raise BadInput("allocation: measured tries plans out: diffprune prune does; make_plan takes linear and uniform")
    adapter = adapter or find_adapter(model)
    options = filled_in(options, model, adapter)
    return plan_from(material_of(options, model, criterion, adapter), options, description, sensitivity)


@dataclass(frozen=True)
class Material:
    """What plans of a model are made from, whatever their budget: its scored groups and what its layers cost."""

    adapter: ModelAdapter
    architecture: str
    criterion: Criterion
    items: tuple[AskedGroup, ...]
    heads: Mapping[str, str]
    costs: Mapping[str, LayerCost]


def material_of(
    options: PlanOptions,
    model: nn.Module,
    criterion: Criterion | str,
    adapter: ModelAdapter | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Material:
    """The groups with what the options ask of each, scored by the criterion; costs are for prompts like ``extra``'s."""
    adapter = adapter or find_adapter(model)
    if isinstance(criterion, str):
        criterion = importance(criterion)
    options.with_wishes_of(criterion)  # wrong ones are told before anything is scored
    groups = trace_groups(model, adapter)
    heads = head_groups(groups, adapter.head_layers(model, whole=options.head_pruning_ratio is None))
    if options.head_pruning_ratio and not heads:
        reason = f"no attention of this {type(model).__name__} could lose a head; leave it out"
        raise BadInput.of("head_pruning_ratio", options.head_pruning_ratio, reason)
    requests = requests_of_heads(requested(groups, model, adapter, options), heads, options.head_pruning_ratio)
    items = tuple(asked_group(g, requests[g.root], criterion, heads.get(g.root, "")) for g in groups)
    return Material(adapter, architecture_hash(model), criterion, items, heads, layer_costs(model, adapter, extra))


def plan_from(
    material: Material,
    options: PlanOptions,
    description: dict[str, Any] | None = None,
    sensitivity: Errors | None = None,
    latency: LatencyCosts | None = None,
) -> PruningPlan:
    """The plan of options that ask the same of single groups as those that the material was made with.

    latency: what a ``latency_target`` is met by; `latency.target.meet` measures one and corrects it.
    """
    items, costs, criterion = material.items, material.costs, material.criterion
    options, groups, allocation = options.with_wishes_of(criterion), [item.group for item in items], None
    if options.spends and sensitivity is None:
        raise BadInput(
            f"allocation: {options.allocation} needs a sensitivity; give make_plan what measure_sensitivity returns"
        )
    if options.timed and (latency is None or options.latency_target is None):
        raise BadInput("latency_target and max_latency_ms need measuring on a runtime: use diffprune prune, or prune()")
    by_error = options.spends or (options.allocation is None and not options.global_pruning)
    if options.target and sensitivity is not None and by_error:
        planned, allocation = allocated(items, costs, options, sensitivity, latency)
        ratio = 0.0
    elif options.pruning_ratio is None:
        ratio, planned = searched(items, costs, options, share_of(items, costs, latency) if latency else None)
    else:
        ratio, planned = options.pruning_ratio, select(items, options.pruning_ratio, options)
    layers, before, after = sizes(groups, planned, costs)
    plan = PruningPlan(
        model_class=material.adapter.model_class,
        architecture=material.architecture,
        criterion=description or {"name": type(criterion).__name__},
        pruning_ratio=ratio,
        target=options.target,
        allocation=allocation,
        groups=tuple(planned),
        heads=heads_left(material.heads, planned, groups),
        layers=layers,
        params=(before.params, after.params),
        macs=(before.macs, after.macs),
        versions=library_versions(),
    )
    return strictly(plan, options)


def strictly(plan: PruningPlan, options: PlanOptions) -> PruningPlan:
    """The plan; raises CheckFailed where it falls short and the options are strict."""
    if options.strict and plan.shortfalls():
        raise CheckFailed("strict: " + "; ".join(plan.shortfalls()))
    return plan


def share_of(
    items: Sequence[AskedGroup], costs: Mapping[str, LayerCost], latency: LatencyCosts
) -> Callable[[Sequence[int]], float]:
    """The predicted latency, as a share of the dense model's, when each group loses so many units."""
    size_of = size_with(items, costs, latency)
    place = size_of.keys.index(LATENCY)
    dense = size_of([0] * len(items))[place]
    return lambda removed: float(size_of(removed)[place] / dense)


def library_versions() -> dict[str, str]:
    """Of what a plan depends on."""
    names = ("diffprune-plugin", "torch", "torch-pruning", "diffusers")
    return {name: importlib.metadata.version(name) for name in names}


def check_patterns(model: nn.Module, options: PlanOptions) -> None:
    """Raises BadInput for a pattern that matches no layer: before a long calibration rather than after it."""
    names = layer_names(model)
    for key in PATTERNS:
        for pattern in getattr(options, key):
            found = matching(pattern, names, key)
            if found and not any(True for name in found for _ in model.get_submodule(name).parameters()):
                raise BadInput.of(key, pattern, f"matches no layer with weights, only {found[0]}; leave it out")


def check_same_layers(
    dense: nn.Module, model: nn.Module, dense_name: Callable[[str], str], options: PlanOptions
) -> None:
    """Raises BadInput for a pattern that means other layers of a model without some blocks than of the dense one."""
    before, now = layer_names(dense), layer_names(model)
    after = {dense_name(name) for name in now}
    for key in PATTERNS:
        for pattern in getattr(options, key):
            meant = {name for name in matching(pattern, before, key) if name in after}
            try:
                found = {dense_name(name) for name in matching(pattern, now, key)}
            except BadInput:
                found = set()
            if found != meant:
                wrong = f"means other layers where depth numbers what it leaves anew ({min(found ^ meant)})"
                raise BadInput.of(key, pattern, f"{wrong}; write it so that it means the same of both")


def requested(
    groups: Sequence[CoupledGroup], model: nn.Module, adapter: ModelAdapter, options: PlanOptions
) -> dict[str, Request]:
    """What is asked of each group, by its root."""
    names = layer_names(model)
    stays = adapter.kept_layers(model)
    wanted = {name for pattern in options.target_layers for name in matching(pattern, names, "target_layers")}
    if options.target_layers:
        stays |= {name: "outside target_layers" for name, also in names.items() if also and name not in wanted}
    for pattern in options.ignored_layers:
        stays |= dict.fromkeys(matching(pattern, names, "ignored_layers"), f"ignored_layers: {pattern}")
    special: dict[str, tuple[float, str]] = {}
    for pattern, value in options.pruning_ratio_dict.items():
        special |= dict.fromkeys(matching(pattern, names, "pruning_ratio_dict"), (value, pattern))
    found = {group.root: request_of(group, special, stays) for group in groups}
    for group in (group for group in groups if not found[group.root].stays):
        check_narrowed(group, model)
    return found


def check_narrowed(group: CoupledGroup, model: nn.Module) -> None:
    """Raises BadInput for a group with a layer that could not be rebuilt with fewer channels."""
    for member in group.members:
        if not can_narrow(module := model.get_submodule(member.layer)):
            of = " with groups" if isinstance(module, nn.Conv2d) else ""
            reason = f"{member.layer}: channels of a {type(module).__name__}{of} cannot be removed"
            raise BadInput(f"{reason}; add {group.root!r} to ignored_layers", key="ignored_layers", value=group.root)


def request_of(group: CoupledGroup, special: Mapping[str, tuple[float, str]], stays: Mapping[str, str]) -> Request:
    """What is asked of one group; raises BadInput where two patterns ask different things of it."""
    for layer in group.layers:
        if layer in stays:
            return Request(stays=stays[layer] if layer == group.root else f"{stays[layer]} (coupled to {layer})")
    if group.units % group.parts:
        return Request(stays=f"its norm groups and heads call for {group.parts} equal parts of {group.units} channels")
    asked = dict(special[layer] for layer in group.layers if layer in special)
    if len(asked) > 1:
        wishes = " and ".join(f"{pattern!r} asks {value}" for value, pattern in asked.items())
        message = f"pruning_ratio_dict: the group of {group.root} is coupled, but {wishes}; give it one ratio"
        raise BadInput(message, key="pruning_ratio_dict", value=next(iter(asked.values())))
    return Request(next(iter(asked), None))


def requests_of_heads(
    requests: Mapping[str, Request], heads: Mapping[str, str], common: float | None
) -> dict[str, Request]:
    """What is asked of each group, where attentions lose whole heads: one thing of all groups of an attention; if one
    stays, all do.

    Raises BadInput for a ratio of its own beside the ``common`` one, or two for one attention.
    """
    asked: dict[str, Request] = {}
    for root, attention in heads.items():
        request, known = requests[root], asked.get(attention, Request())
        if request.ratio is not None and common is not None:
            raise BadInput(
                f"pruning_ratio_dict: {root} gets {request.ratio}, but head_pruning_ratio takes whole heads; drop one"
            )
        if None not in (request.ratio, known.ratio) and request.ratio != known.ratio:
            raise BadInput(f"pruning_ratio_dict: {attention} gets {known.ratio} and {request.ratio}; give it one ratio")
        stays = known.stays or request.stays
        ratio = known.ratio if request.ratio is None else request.ratio
        asked[attention] = Request(stays=stays) if stays else Request(ratio)
    return {root: asked[heads[root]] if root in heads else request for root, request in requests.items()}


def asked_group(group: CoupledGroup, request: Request, criterion: Criterion, heads: str) -> AskedGroup:
    """A group with its scores, unless it stays."""
    if request.stays:
        return AskedGroup(group, request, np.zeros(group.units))
    return AskedGroup(group, request, unit_scores(group, criterion), heads)


def heads_left(
    heads: Mapping[str, str], planned: Sequence[GroupPlan], groups: Sequence[CoupledGroup]
) -> dict[str, tuple[int, int]]:
    """Heads before and after of each attention that loses whole ones."""
    counts = {}
    for plan, group in zip(planned, groups, strict=True):
        if group.root in heads and plan.removed:
            counts[heads[group.root]] = (group.parts, group.parts - len(plan.removed) // plan.step)
    return counts
