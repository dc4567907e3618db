"""The common ratio that meets a target, and the sizes that come out of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.costs import LayerCost, Size
from diffprune_plugin.graph.groups import CoupledGroup, removed_channels
from diffprune_plugin.planning.channels import AskedGroup, attentions, select
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.plan import TARGETS, GroupPlan, LayerSize

Measure = Callable[[Sequence[GroupPlan]], float]


def nearest_to(
    wanted: float, groups: Sequence[AskedGroup], options: PlanOptions, size: Measure, steps: int = 24
) -> tuple[float, list[GroupPlan]]:
    """The common ratio, and the plans, whose ``size``, which falls with the ratio, is nearest to ``wanted``.

    Groups of one width jump together where a whole channel of each norm group goes, too coarse a step for a target:
    bisection finds that jump, and then the groups take it one by one, those first whose share of the group's score is
    lowest, each only if that comes nearer; and again, back or forth, until nothing does. Groups that lose the heads of
    one attention go together.
    """
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        above = size(select(groups, middle, options)) > wanted
        low, high = (middle, high) if above else (low, middle)
    before, after = (select(groups, ratio, options) for ratio in (low, high))
    order, best = by_harm(groups, before, after), list(before)
    heads = attentions(groups)
    place_of = {item.group.root: place for place, item in enumerate(groups)}
    last: list[GroupPlan] = []
    while best != last:
        last = best
        for place in order:
            other, tried = before if best[place] == after[place] else after, list(best)
            for item in heads.get(groups[place].heads, [groups[place]]):
                tried[place_of[item.group.root]] = other[place_of[item.group.root]]
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
    options: PlanOptions,
    latency: Callable[[Sequence[int]], float] | None = None,
) -> tuple[float, list[GroupPlan]]:
    """The common ratio, and the plans, that come nearest to the target of the options.

    latency: that of the whole model, as a share, when each group loses so many units.

    Raises BadInput if the target is less than what is left when every group loses all it can.
    """
    ((key, share),) = options.target.items()
    groups = [item.group for item in items]

    def size(plans: Sequence[GroupPlan]) -> float:
        if key == "latency_target" and latency is not None:
            return latency([len(plan.removed) for plan in plans] or [0] * len(items))
        return float(getattr(sizes(groups, plans, costs)[2], TARGETS[key]))

    dense = size([])
    least = size(select(items, 1.0, options))
    if least > share * dense:
        raise BadInput(f"{key}: {share} is below {least / dense:.3f}, all that these settings can reach; raise it")
    return nearest_to(share * dense, items, options, size)


def sizes(
    groups: Sequence[CoupledGroup], planned: Iterable[GroupPlan], costs: Mapping[str, LayerCost]
) -> tuple[dict[str, LayerSize], Size, Size]:
    """Layers that change, and the size of the whole model before and after."""
    gone = removed_channels(groups, {group.root: list(group.removed) for group in planned})
    layers, before, after = {}, [], []
    for name, cost in costs.items():
        less = (len(gone.get((name, "in"), ())), len(gone.get((name, "out"), ())))
        before.append(cost.after(0, 0))
        after.append(cost.after(*less))
        if any(less):
            width = (cost.channels_in, cost.channels_out)
            layers[name] = LayerSize(before=width, after=(width[0] - less[0], width[1] - less[1]))
    return layers, total(before), total(after)


def total(layers: Sequence[Size]) -> Size:
    return Size(sum(size.params for size in layers), sum(size.macs for size in layers))
