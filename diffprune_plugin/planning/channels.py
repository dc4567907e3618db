"""Which units of the scored groups go: how many each is asked to lose, ranked over what, and what stops it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from diffprune_plugin.graph.groups import CoupledGroup
from diffprune_plugin.planning.plan import GroupPlan

Scores = npt.NDArray[np.float64]
Halves = Literal["together", "apart"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How units are counted, ranked and rounded: the options of `make_plan`."""

    global_pruning: bool = False
    isomorphic: bool = False
    round_to: int = 1
    max_pruning_ratio: float = 1.0
    halves: Halves = "together"


@dataclass(frozen=True)
class AskedGroup:
    """A coupled group with what is asked of it.

    ``asked``: its ratio; None for the common one; or in words why it stays as it is. ``scores``: one for each unit,
    shape (units,). ``heads``: name of the attention whose whole heads are its units' fate, or nothing. ``scope``: it
    is ranked together with those of the same scope only. ``gone``: units that it lost before, of which ratios count.
    """

    group: CoupledGroup
    asked: float | str | None
    scores: Scores
    heads: str = ""
    scope: str = ""
    gone: int = 0

    @property
    def dense(self) -> int:
        """Units before the first was removed."""
        return self.group.units + self.gone

    def ratio(self, common: float, rules: Rules) -> float | None:
        """The share of its units that is asked to go; None if it stays or loses heads.

        Halves that are ranked apart leave a unit only where both stay: 1 - (1 - ratio) ** pairs of the units go.
        """
        if isinstance(self.asked, str) or self.heads:
            return None
        ratio = common if self.asked is None else self.asked
        return 1 - (1 - ratio) ** self.group.pairs if rules.halves == "apart" else ratio


def select(groups: Sequence[AskedGroup], common: float, head_ratio: float | None, rules: Rules) -> list[GroupPlan]:
    """The plan of every group, ``common`` being the ratio of those that have none of their own."""
    counts = requested_units(groups, common, rules)
    chosen = chosen_heads(groups, head_ratio, rules) if head_ratio is not None else {}
    return [
        plan_heads(item, *chosen[item.heads]) if item.heads else plan_group(item, counts.get(item.group.root, 0), rules)
        for item in groups
    ]


def requested_units(groups: Sequence[AskedGroup], common: float, rules: Rules) -> dict[str, int]:
    """How many of its C dense units each group is asked to have lost: C - int(C * (1 - ratio)).

    With ``global_pruning`` the groups of one ratio and scope (and with ``isomorphic`` of one family) are ranked
    together, and each loses those among the lowest of all.
    """
    counts = {}
    shared: dict[object, list[AskedGroup]] = {}
    for item in groups:
        ratio = item.ratio(common, rules)
        if ratio is not None:
            counts[item.group.root] = asked_of(item.dense, ratio)
            family = item.group.family if rules.isomorphic and not item.scope else ()
            shared.setdefault((ratio, item.scope, family), []).append(item)
    for ranked in shared.values() if rules.global_pruning else ():
        ratio = ranked[0].ratio(common, rules)
        total = asked_of(sum(item.dense for item in ranked), ratio or 0.0) - sum(item.gone for item in ranked)
        owner = np.repeat(np.arange(len(ranked)), [len(item.scores) for item in ranked])
        order = np.argsort(np.concatenate([item.scores for item in ranked]), kind="stable")
        lost = np.bincount(owner[order[: max(total, 0)]], minlength=len(ranked))
        counts |= {item.group.root: item.gone + int(count) for item, count in zip(ranked, lost, strict=True)}
    return counts


def asked_of(units: int, ratio: float) -> int:
    """The published count: C - int(C * (1 - ratio))."""
    return units - int(units * (1 - ratio))


def plan_group(item: AskedGroup, requested: int, rules: Rules) -> GroupPlan:
    """Choose the units that go: in each part those with the lowest scores."""
    group = item.group
    step = math.lcm(group.parts, rules.round_to)
    if isinstance(item.asked, str):
        return group_plan(group, group.parts, step, 0, [], item.asked)
    allowed = min(requested, int(item.dense * rules.max_pruning_ratio))
    kept = min(max(math.ceil((item.dense - allowed) / step), 1) * step, group.units)
    size = group.units // group.parts
    order = np.argsort(item.scores.reshape(group.parts, size), axis=1, kind="stable")
    lowest = order[:, : (group.units - kept) // group.parts] + np.arange(group.parts)[:, None] * size
    removed = sorted(lowest.ravel().tolist())
    limits = [f"max_pruning_ratio {rules.max_pruning_ratio}"] if allowed < requested else []
    reason = why_fewer(requested - (item.dense - kept), group, rules.round_to, step, limits)
    return group_plan(group, group.parts, step, requested, removed, reason)


def chosen_heads(groups: Sequence[AskedGroup], ratio: float, rules: Rules) -> dict[str, tuple[int, list[int], str]]:
    """For each attention how many heads are asked, of H dense heads H - int(H * (1 - ratio)), those that go, and what
    kept the rest.

    One at least stays, and what `Rules` keep: ``max_pruning_ratio``, and multiples of ``round_to`` channels. A head's
    score is the sum over its queries, keys and values, each group's divided by the group's mean.
    """
    totals: dict[str, Scores] = {}
    gone: dict[str, int] = {}
    sizes: dict[str, set[int]] = {}
    for item in groups:
        if item.heads:
            gone[item.heads] = item.gone * item.group.parts // item.group.units
            sizes.setdefault(item.heads, set()).add(item.group.units // item.group.parts)
            score = item.scores.reshape(item.group.parts, -1).sum(1) / max(item.scores.mean(), 1e-300)
            totals[item.heads] = totals.get(item.heads, np.zeros(1)) + score
    chosen = {}
    for name, score in totals.items():
        heads, dense = len(score), len(score) + gone[name]
        asked = max(asked_of(dense, ratio) - gone[name], 0)
        limits = {
            f"max_pruning_ratio {rules.max_pruning_ratio}": int(dense * rules.max_pruning_ratio) - gone[name],
            "one head has to stay": heads - 1,
        }
        count = max(min(asked, *limits.values()), 0)
        while count and any((heads - count) * size % rules.round_to for size in sizes[name]):
            limits[f"round_to {rules.round_to}"] = count = count - 1
        bound = [limit for limit, most in limits.items() if most <= count < asked]
        chosen[name] = asked, sorted(np.argsort(score, kind="stable")[:count].tolist()), " and ".join(bound)
    return chosen


def plan_heads(item: AskedGroup, asked: int, heads: Sequence[int], limit: str) -> GroupPlan:
    """The same whole heads of every group of one attention, of which as many were asked."""
    size = item.group.units // item.group.parts
    removed = [head * size + place for head in heads for place in range(size)]
    reason = f"{limit}: {size} at a time" if limit else ""
    if not asked and not item.gone:
        reason = f"head_pruning_ratio: one of {item.group.parts} heads is more than was asked"
    return group_plan(item.group, 1, size, item.gone + asked * size, removed, reason)


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


def why_fewer(missing: int, group: CoupledGroup, round_to: int, step: int, limits: list[str]) -> str:
    """In words, the constraint that kept a group from losing what was asked; empty if nothing is missing."""
    if missing <= 0:
        return ""
    limits = limits + ([f"{group.parts} norm groups or heads lose equally many"] if group.parts > 1 else [])
    limits += [f"round_to {round_to}"] if round_to > 1 else []
    return f"{' and '.join(limits) or 'one channel has to stay'}: {step} at a time"


def head_groups(groups: Sequence[CoupledGroup], owners: Mapping[str, str]) -> dict[str, str]:
    """For each group that consists of one attention's heads its root and the attention's name."""
    found = {}
    for group in groups:
        names = {owners[layer] for layer in group.layers if layer in owners}
        if len(names) == 1 and all(layer in owners for layer in group.layers):
            found[group.root] = names.pop()
    return found
