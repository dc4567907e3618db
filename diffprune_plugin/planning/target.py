"""The common ratio that meets a target, and the sizes that come out of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.costs import LayerCost
from diffprune_plugin.graph.groups import CoupledGroup, removed_channels
from diffprune_plugin.planning.channels import AskedGroup, Rules, select
from diffprune_plugin.planning.plan import GroupPlan, LayerSize

Size = Callable[[Sequence[GroupPlan]], int]


def nearest_to(
    wanted: float, groups: Sequence[AskedGroup], head_ratio: float | None, rules: Rules, size: Size, steps: int = 24
) -> tuple[float, list[GroupPlan]]:
    """The common ratio, and the plans, whose ``size``, which falls with the ratio, is nearest to ``wanted``.

    Groups of one width jump together where a whole channel of each norm group goes, too coarse a step for a target:
    bisection finds that jump, and then the groups take it one by one, those first whose share of the group's score is
    lowest, each only if that comes nearer; and again, back or forth, until nothing does.
    """
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        above = size(select(groups, middle, head_ratio, rules)) > wanted
        low, high = (middle, high) if above else (low, middle)
    before, after = (select(groups, ratio, head_ratio, rules) for ratio in (low, high))
    order, best = by_harm(groups, before, after), list(before)
    last: list[GroupPlan] = []
    while best != last:
        last = best
        for place in order:
            other = before[place] if best[place] == after[place] else after[place]
            tried = [*best[:place], other, *best[place + 1 :]]
            if abs(size(tried) - wanted) < abs(size(best) - wanted):
                best = tried
    return high, best


def by_harm(groups: Sequence[AskedGroup], before: Sequence[GroupPlan], after: Sequence[GroupPlan]) -> list[int]:
    """Places of the groups that differ between two plans, those first that lose the lower share of their score."""

    def harm(place: int) -> float:
        more = sorted(set(after[place].removed) - set(before[place].removed))
        scores = groups[place].scores
        return float(scores[more].sum() / max(scores.sum(), 1e-300))

    return sorted((place for place in range(len(groups)) if before[place] != after[place]), key=harm)


def searched(
    items: Sequence[AskedGroup],
    costs: Mapping[str, LayerCost],
    target: Mapping[str, float],
    head_ratio: float | None,
    rules: Rules,
) -> tuple[float, list[GroupPlan]]:
    """The common ratio, and the plans, that come nearest to the target.

    Raises BadInput if the target is less than what is left when every group loses all it can.
    """
    ((key, share),) = target.items()
    groups = [item.group for item in items]

    def size(plans: Sequence[GroupPlan]) -> int:
        _, params, macs = sizes(groups, plans, costs)
        return (macs if key == "macs_target" else params)[1]

    dense = sum(cost.after(0, 0)[key == "macs_target"] for cost in costs.values())
    least = size(select(items, 1.0, head_ratio, rules))
    if least > share * dense:
        raise BadInput(f"{key}: {share} is below {least / dense:.3f}, all that these settings can reach; raise it")
    return nearest_to(share * dense, items, head_ratio, rules, size)


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
