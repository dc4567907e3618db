"""Which units of the scored groups go: how many each is asked to lose, ranked over what, and what stops it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffprune_plugin.graph.groups import CoupledGroup
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.plan import GroupPlan
from diffprune_plugin.planning.scores import Scores
from diffprune_plugin.planning.widths import fit_of, layer_multiple


@dataclass(frozen=True)
class Request:
    """What is asked of a group: a ratio of its own, None for the common one; or it ``stays``, for the reason given."""

    ratio: float | None = None
    stays: str = ""


@dataclass(frozen=True)
class AskedGroup:
    """A coupled group with what is asked of it.

    ``scores``: one for each unit, shape (units,). ``heads``: name of the attention whose whole heads are its units'
    fate, or nothing. ``scope``: it is ranked together with those of the same scope only. ``gone``: units that it lost
    before, of which ratios count.
    """

    group: CoupledGroup
    request: Request
    scores: Scores
    heads: str = ""
    scope: str = ""
    gone: int = 0

    @property
    def dense(self) -> int:
        """Units before the first was removed."""
        return self.group.units + self.gone

    def ratio(self, common: float, options: PlanOptions) -> float | None:
        """The share of its units that is asked to go; None if it stays or loses heads.

        Halves that are ranked apart leave a unit only where both stay: 1 - (1 - ratio) ** pairs of the units go.
        """
        if self.request.stays or self.heads:
            return None
        ratio = common if self.request.ratio is None else self.request.ratio
        return 1 - (1 - ratio) ** self.group.pairs if options.halves == "apart" else ratio


def select(groups: Sequence[AskedGroup], common: float, options: PlanOptions) -> list[GroupPlan]:
    """The plan of every group, ``common`` being the ratio of those that have none of their own."""
    counts = requested_units(groups, common, options)
    chosen = {name: chosen_heads(own, common, options) for name, own in attentions(groups).items()}
    return [
        plan_heads(item, chosen[item.heads], options)
        if item.heads
        else plan_group(item, counts.get(item.group.root, 0), options)
        for item in groups
    ]


def requested_units(groups: Sequence[AskedGroup], common: float, options: PlanOptions) -> dict[str, int]:
    """How many of its C dense units each group is asked to have lost: C - int(C * (1 - ratio)).

    With ``global_pruning`` the groups of one ratio and scope (and with ``isomorphic`` of one family) are ranked
    together, and each loses those among the lowest of all.
    """
    counts = {}
    shared: dict[object, list[AskedGroup]] = {}
    for item in groups:
        ratio = item.ratio(common, options)
        if ratio is not None:
            counts[item.group.root] = asked_of(item.dense, ratio, options)
            family = item.group.family if options.isomorphic and not item.scope else ()
            shared.setdefault((ratio, item.scope, family), []).append(item)
    for ranked in shared.values() if options.global_pruning else ():
        ratio = ranked[0].ratio(common, options)
        total = asked_of(sum(item.dense for item in ranked), ratio or 0.0, options) - sum(item.gone for item in ranked)
        owner = np.repeat(np.arange(len(ranked)), [len(item.scores) for item in ranked])
        order = np.argsort(np.concatenate([item.scores for item in ranked]), kind="stable")
        lost = np.bincount(owner[order[: max(total, 0)]], minlength=len(ranked))
        counts |= {item.group.root: item.gone + int(count) for item, count in zip(ranked, lost, strict=True)}
    return counts


def asked_of(units: int, ratio: float, options: PlanOptions) -> int:
    """The published count, C - int(C * (1 - ratio)), or the nearest."""
    return round(units * ratio) if options.rounding == "nearest" else units - int(units * (1 - ratio))


def plan_group(item: AskedGroup, requested: int, options: PlanOptions) -> GroupPlan:
    """Choose the units that go: in each part those with the lowest scores."""
    group, fit = item.group, fit_of(item.group, options.round_to)
    if item.request.stays:
        return group_plan(group, group.parts, fit.step, 0, [], item.request.stays)
    allowed = min(requested, int(item.dense * options.max_pruning_ratio))
    kept = fit.at_least(item.dense - allowed, group.units)
    step = fit.below(kept)
    size = group.units // group.parts
    order = np.argsort(item.scores.reshape(group.parts, size), axis=1, kind="stable")
    lowest = order[:, : (group.units - kept) // group.parts] + np.arange(group.parts)[:, None] * size
    removed = sorted(lowest.ravel().tolist())
    limits = [f"max_pruning_ratio {options.max_pruning_ratio}"] if allowed < requested else []
    reason = why_fewer(requested - (item.dense - kept), group, fit.why, step, limits)
    return group_plan(group, group.parts, step, requested, removed, reason)


@dataclass(frozen=True)
class ChosenHeads:
    """How many heads of an attention were asked to go, which do, and in words what keeps the others."""

    asked: int
    removed: tuple[int, ...]
    limit: str


def attentions(groups: Sequence[AskedGroup]) -> dict[str, list[AskedGroup]]:
    """The groups of each attention whose whole heads go: its queries and keys, its values."""
    found: dict[str, list[AskedGroup]] = {}
    for item in groups:
        if item.heads:
            found.setdefault(item.heads, []).append(item)
    return found


def chosen_heads(groups: Sequence[AskedGroup], common: float, options: PlanOptions) -> ChosenHeads:
    """Of one attention's H dense heads H - int(H * (1 - ratio)) are asked to go; those of lowest score do.

    The ratio is head_pruning_ratio, else the attention's own, else the common one.
    """
    heads, own = groups[0].group.parts, groups[0].request.ratio
    ratio = next(each for each in (options.head_pruning_ratio, own, common) if each is not None)
    gone = groups[0].gone * heads // groups[0].group.units
    asked = max(asked_of(heads + gone, ratio, options) - gone, 0)
    limits = head_limits(groups, heads, gone, options)
    allowed = [n for n in range(asked + 1) if not n or all(fits(n) for fits in limits.values())]
    count = allowed[-1]
    bound = [limit for limit, fits in limits.items() if count < asked and not fits(count + 1)]
    return ChosenHeads(asked, tuple(sorted(head_order(groups)[:count])), " and ".join(bound))


def head_order(groups: Sequence[AskedGroup]) -> list[int]:
    """An attention's heads, the lowest score first.

    A head's score is the sum over its queries, keys and values, each group's divided by the group's mean.
    """
    parts = groups[0].group.parts
    score = sum(item.scores.reshape(parts, -1).sum(1) / max(item.scores.mean(), 1e-300) for item in groups)
    order: list[int] = np.argsort(score, kind="stable").tolist()
    return order


def head_limits(
    groups: Sequence[AskedGroup], heads: int, gone: int, options: PlanOptions
) -> dict[str, Callable[[int], bool]]:
    """What has to hold where so many of the heads that are left go, by its words."""
    sizes, multiple = {item.group.units // heads for item in groups}, layer_multiple(options.round_to)
    return {
        f"max_pruning_ratio {options.max_pruning_ratio}": lambda n: (
            gone + n <= int((heads + gone) * options.max_pruning_ratio)
        ),
        "one head has to stay": lambda n: n < heads,
        f"round_to {options.round_to}": lambda n: all((heads - n) * size % multiple == 0 for size in sizes),
    }


def plan_heads(item: AskedGroup, chosen: ChosenHeads, options: PlanOptions) -> GroupPlan:
    """The same whole heads of every group of one attention."""
    size = item.group.units // item.group.parts
    removed = [head * size + place for head in chosen.removed for place in range(size)]
    reason = f"{chosen.limit}: {size} at a time" if chosen.limit else ""
    if not chosen.asked and not item.gone:
        key = "pruning_ratio" if options.head_pruning_ratio is None else "head_pruning_ratio"
        reason = f"{key}: one of {item.group.parts} heads is more than was asked"
    return group_plan(item.group, 1, size, item.gone + chosen.asked * size, removed, reason)


def group_plan(
    group: CoupledGroup, parts: int, step: int, requested: int, removed: Sequence[int], reason: str
) -> GroupPlan:
    return GroupPlan(
        root=group.root,
        layers=group.layers,
        units=group.units,
        pairs=group.pairs,
        parts=parts,
        step=step,
        requested=requested,
        removed=tuple(removed),
        reason=reason,
    )


def why_fewer(missing: int, group: CoupledGroup, fit: str, step: int, limits: list[str]) -> str:
    """In words, the constraint that kept a group from losing what was asked; empty if nothing is missing."""
    if missing <= 0:
        return ""
    limits = limits + ([f"{group.parts} norm groups or heads lose equally many"] if group.parts > 1 else [])
    limits += [fit] if fit else []
    return f"{' and '.join(limits) or 'one channel has to stay'}: {step} at a time"


def head_groups(groups: Sequence[CoupledGroup], owners: Mapping[str, str]) -> dict[str, str]:
    """For each group that consists of one attention's heads its root and the attention's name."""
    found = {}
    for group in groups:
        names = {owners[layer] for layer in group.layers if layer in owners}
        if len(names) == 1 and all(layer in owners for layer in group.layers):
            found[group.root] = names.pop()
    return found
