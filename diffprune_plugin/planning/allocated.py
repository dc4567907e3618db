"""A budget spent where it costs least: the widths that groups can have, what each costs, and which are taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.costs import LayerCost
from diffprune_plugin.planning.allocation import Column, Menu, SizeOf, allocate
from diffprune_plugin.planning.channels import (
    AskedGroup,
    ChosenHeads,
    attentions,
    head_limits,
    head_order,
    plan_group,
    plan_heads,
    select,
)
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.plan import LATENCY, TARGETS, Allocation, GroupPlan
from diffprune_plugin.planning.target import sizes
from diffprune_plugin.planning.widths import fit_of

WIDTHS = 64  # of one group at most
TIMED_WIDTHS = 10  # where a latency is asked for


class Errors(Protocol):
    """What a sensitivity says: the error of the output when these units of a group are gone, and for which counts.

    ``most``: the largest share of a group for which it holds.
    """

    @property
    def most(self) -> float: ...

    @property
    def sha256(self) -> str: ...

    def error(self, root: str, units: Collection[int]) -> float: ...

    def knows(self, root: str, count: int) -> bool: ...


UNSEEN = "allocation: kept, since what comes from it was the same for all samples, which says nothing of other inputs"


@dataclass(frozen=True)
class LatencyCosts:
    """What latency a plan has, in whatever unit: one more column of the sizes.

    slower: by root layer the numbers of units that no group loses, since it would be no faster than losing less.
    """

    column: Column
    slower: Mapping[str, frozenset[int]] = field(default_factory=dict)


def allocated(
    items: Sequence[AskedGroup],
    costs: Mapping[str, LayerCost],
    options: PlanOptions,
    errors: Errors,
    latency: LatencyCosts | None = None,
) -> tuple[list[GroupPlan], Allocation]:
    """The plan of every group within the target of the options, with the least summed error; and what it costs.

    Groups that stay, lose heads by a head_pruning_ratio or have a ratio of their own are as they would be without an
    allocation.

    Raises BadInput for a target that is less than what is left when every group loses all it can.
    """
    menus = menus_of(items, options, errors, latency)
    size_of = size_with(items, costs, latency)
    dense = dict(zip(size_of.keys, size_of([0] * len(items)), strict=True))
    limits = {TARGETS[key]: share * dense[TARGETS[key]] for key, share in options.target.items()}
    try:
        removed = allocate([menu for menu, _ in menus], size_of, limits)
    except BadInput as error:
        raise unreachable(error, options, further(options, items, costs)) from None
    plans = [of[count] for (_, of), count in zip(menus, removed, strict=True)]
    return described(plans, [menu for menu, _ in menus], errors)


def unreachable(error: BadInput, options: PlanOptions, remedy: str = "") -> BadInput:
    """The error of `allocate`, which names a column, in the words of the config."""
    key = next(key for key in options.target if TARGETS[key] == error.key)
    return BadInput.of(key, options.target[key], f"cannot be reached: it {error.reason}{remedy}")


def further(options: PlanOptions, items: Sequence[AskedGroup], costs: Mapping[str, LayerCost]) -> str:
    """One ratio as a remedy for a target that no allocation reaches, where it does."""
    if len(options.target) > 1 or options.timed:
        return ""
    ((key, share),) = options.target.items()
    _, dense, least = sizes([item.group for item in items], select(items, 1.0, options), costs)
    reached = getattr(least, TARGETS[key]) <= share * getattr(dense, TARGETS[key])
    return ", or say allocation: uniform, which reaches further" if reached else ""


def size_with(items: Sequence[AskedGroup], costs: Mapping[str, LayerCost], latency: LatencyCosts | None) -> SizeOf:
    """What the model costs, with its latency where that is known."""
    return SizeOf([item.group for item in items], costs, {} if latency is None else {LATENCY: latency.column})


def menus_of(
    items: Sequence[AskedGroup], options: PlanOptions, errors: Errors, latency: LatencyCosts | None = None
) -> list[tuple[Menu, dict[int, GroupPlan]]]:
    """For each group its widths with their errors, and the plan of each by how many units go."""
    found = []
    for item, every in zip(items, choices(items, options, errors.most), strict=True):
        root = item.group.root
        slower = latency.slower.get(root, ()) if latency else ()
        fit = {count: plan for count, plan in every.items() if errors.knows(root, count) and count not in slower}
        plans = fit if len(every) > 1 else every  # where there is no choice, a wish is met
        counts = tuple(sorted(plans))
        rising = np.maximum.accumulate([errors.error(root, plans[count].removed) for count in counts])
        found.append((Menu(root, counts, tuple(rising.tolist())), plans))
    return found


def choices(items: Sequence[AskedGroup], options: PlanOptions, most: float) -> list[dict[int, GroupPlan]]:
    """The plans that each group can have, by how many units go, ``most`` of them at most: one where it stays or has a
    wish of its own."""
    found = []
    for item, as_it_is in zip(items, select(items, 0.0, options), strict=True):
        heads = len(attentions(items).get(item.heads, ())) > 1 or options.head_pruning_ratio is not None
        free = not (item.request.stays or (item.heads and heads) or item.request.ratio is not None)
        found.append({len(plan.removed): plan for plan in (widths(item, options, most) if free else [as_it_is])})
    return found


def predicted(items: Sequence[AskedGroup], options: PlanOptions, errors: Errors) -> dict[str, dict[int, float]]:
    """The error that each width of each group would have by itself, by root layer and by how many units go."""
    return {
        item.group.root: {count: errors.error(item.group.root, plan.removed) for count, plan in of.items()}
        for item, of in zip(items, choices(items, options, errors.most), strict=True)
    }


def widths(item: AskedGroup, options: PlanOptions, most: float) -> list[GroupPlan]:
    """The plans of a group that loses nothing, a step, two steps ... as many as may go.

    Of very many those are left whose width is a multiple of 2, 4, 8 ... steps, which hardware is fast with.
    """
    if item.heads:
        order, heads = head_order([item]), item.group.parts
        limits = head_limits([item], heads, item.gone * heads // item.group.units, options).values()
        fitting = [n for n in range(int(most * heads) + 1) if not n or all(fits(n) for fits in limits)]
        chosen = [ChosenHeads(n, tuple(sorted(order[:n])), "") for n in fitting]
        plans = [plan_heads(item, each, options) for each in chosen]
    else:
        fit = fit_of(item.group, options.round_to)
        counts = fit.counts(item.group.units, int(most * item.group.units))
        every, widest = fit.step, TIMED_WIDTHS if options.timed else WIDTHS
        while len(counts) > widest:
            every *= 2
            counts = range(item.group.units % every, counts[-1] + 1, every)
        plans = [plan_group(item, count, options) for count in dict.fromkeys([0, *counts])]
    # What keeps a group from losing anything is told; else its reason is what its width costs.
    kept = "" if len(plans) > 1 or item.heads or item.group.units < 2 else plan_group(item, 1, options).reason
    return [plan.model_copy(update={"requested": len(plan.removed), "reason": kept}) for plan in plans]


def described(plans: Sequence[GroupPlan], menus: Sequence[Menu], errors: Errors) -> tuple[list[GroupPlan], Allocation]:
    """The plans, each with what its width costs as its reason, and all of it together."""
    costs = {
        menu.root: menu.errors[menu.removed.index(len(plan.removed))] for plan, menu in zip(plans, menus, strict=True)
    }
    total = sum(costs.values())
    unseen = getattr(errors, "unseen", ())
    told = [
        plan
        if plan.reason
        else plan.model_copy(update={"reason": UNSEEN if plan.root in unseen else why(plan, costs, total)})
        for plan in plans
    ]
    return told, Allocation(error=total, errors=costs, sensitivity=errors.sha256)


def why(plan: GroupPlan, costs: Mapping[str, float], total: float) -> str:
    """What a width costs, in words."""
    if not plan.removed:
        return "allocation: any step costs more here than elsewhere"
    return f"allocation: {costs[plan.root] / total if total else 0.0:.1%} of the output's error"
