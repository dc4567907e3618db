"""A budget spent by measuring: around a plan each group has a step more and a step less tried, and the plan moves.

Cuts interact, which no sum of single errors knows: so the first plan, made by the linear sensitivity, is compensated,
and what a step of each group changes there is measured (`trials`). The knapsack chooses again among these widths, with
more and less trust that the gains add up; the plan of the least error, compensated, is taken if that is lower, and
looked around once more: a coordinate search with a trust region, whose general form is in Numerical Optimization
(Nocedal and Wright, 2006), chapters 4 and 9.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffprune_plugin.planning.allocated import Errors, choices
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.plan import Allocation, GroupPlan, PruningPlan
from diffprune_plugin.planning.planner import Material, plan_from, strictly

ROUNDS = 2
FRACTION = 0.125  # of a group's units that a step is, at least one step of the group
TRUSTS = (1.0, 0.5, 0.25)  # in what single steps promise together, all of which are tried


@dataclass(frozen=True)
class Question:
    """What is to be measured: the plan that loses these units, and the same with one group's units changed."""

    removed: dict[str, list[int]]
    heads: dict[str, tuple[int, int]]
    changes: list[tuple[str, list[int]]]

    @classmethod
    def of(cls, plan: PruningPlan, changes: Sequence[GroupPlan] = ()) -> Question:
        return cls(plan.removed_units(), plan.heads, [(group.root, list(group.removed)) for group in changes])

    def key(self, change: Any = None) -> str:
        """By what an answer is stored: that of the plan itself, or of a change."""
        return hashlib.sha256(json.dumps([self.removed, self.heads, change]).encode()).hexdigest()[:24]

    @property
    def keys(self) -> list[str]:
        return [self.key(), *(self.key(change) for change in self.changes)]


Search = Generator[Question, list[float], PruningPlan]


@dataclass(frozen=True)
class Around:
    """What each width near a plan changes: by root, and by how many units go, the difference of the error.

    The plan itself is exact, and the others are noisy: fewer units gone never count as a loss, nor more as a gain.
    ``trust``: what gains are multiplied by and losses divided by; the less, the fewer groups move. ``most``: as of the
    sensitivity, so that both offer the same widths.
    """

    plan: PruningPlan
    changes: Mapping[str, Mapping[int, float]]
    most: float
    trust: float = 1.0
    sha256: str = ""

    def knows(self, root: str, count: int) -> bool:
        return count in self.changes[root]

    def error(self, root: str, units: Collection[int]) -> float:
        """Above that of the least width measured."""
        now = len(self.plan.removed_units()[root])
        of = {
            count: min(change, 0.0) * self.trust if count < now else max(change, 0.0) / self.trust
            for count, change in self.changes[root].items()
        }
        return of[len(units)] - min(of.values())

    def reason(self, group: GroupPlan, error: float) -> str:
        """Why a group has its width, in words: what the step to it changed, or what another would."""
        now, count = len(self.plan.removed_units()[group.root]), len(group.removed)
        others = {other: change for other, change in self.changes[group.root].items() if other != now}
        if not others:
            return group.reason
        if count != now:
            return f"measured: {count} instead of {now} changed the output's error by {others[count] / error:+.1%}"
        told = " and ".join(f"{other} by {change / error:+.1%}" for other, change in sorted(others.items()))
        return f"measured: {told} would change the output's error"


def search(material: Material, options: PlanOptions, description: dict[str, Any] | None, sensitivity: Errors) -> Search:
    """Asks for errors, one question at a time, and returns the plan."""

    def spent(errors: Errors) -> PruningPlan:
        return plan_from(material, options, description, errors)

    asked_for = options.with_wishes_of(material.criterion)
    options = asked_for.model_copy(update={"strict": False})  # what is tried may miss a target, what is found not
    best = spent(sensitivity)
    (error,) = yield Question.of(best)
    tried, reasons = [error], {group.root: group.reason for group in best.groups}
    asked = [best.removed_units()]
    for _ in range(ROUNDS):
        steps = near(best, material, options, sensitivity)
        answers = yield Question.of(best, steps)
        changes: dict[str, dict[int, float]] = {group.root: {len(group.removed): 0.0} for group in best.groups}
        for group, answer in zip(steps, answers[1:], strict=True):
            changes[group.root][len(group.removed)] = answer - error
        start = best, error
        for trust in TRUSTS:
            around = Around(start[0], changes, sensitivity.most, trust)
            proposed = spent(around)
            if proposed.removed_units() in asked:
                continue
            asked.append(proposed.removed_units())
            (found,) = yield Question.of(proposed)
            tried.append(found)
            if found < error and (best.shortfalls() or not proposed.shortfalls()):
                reasons = {group.root: around.reason(group, start[1]) for group in proposed.groups}
                best, error = proposed, found
        if best is start[0]:
            break
    errors = {group.root: sensitivity.error(group.root, group.removed) for group in best.groups}
    allocation = Allocation(
        error=sum(errors.values()), errors=errors, sensitivity=sensitivity.sha256, measured=tuple(tried)
    )
    groups = tuple(group.model_copy(update={"reason": reasons[group.root]}) for group in best.groups)
    return strictly(best.model_copy(update={"groups": groups, "allocation": allocation}), asked_for)


def near(plan: PruningPlan, material: Material, options: PlanOptions, errors: Errors) -> list[GroupPlan]:
    """For each group the widths a step below and above that of the plan, as far as the sensitivity offers any; heads
    stay."""
    found = []
    every = choices(material.items, options, errors.most)
    for group, item, of in zip(plan.groups, material.items, every, strict=True):
        if item.heads:  # their number is an attribute of the attention, which a trial leaves as it is
            continue
        now = len(group.removed)
        step = max(int(FRACTION * group.units), 1)
        offered = [count for count in of if errors.knows(group.root, count)]
        fewer = [count for count in offered if count < now]
        more = [count for count in offered if count > now]
        places = [min(some, key=lambda count: abs(abs(count - now) - step)) for some in (fewer, more) if some]
        found += [of[place] for place in places]
    return found
