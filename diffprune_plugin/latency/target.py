"""A plan that meets a latency: plan by the sum of pieces, measure the whole model, correct, plan again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.latency.costs import MOST
from diffprune_plugin.latency.structures import Structures
from diffprune_plugin.latency.table import Table
from diffprune_plugin.latency.whole import Measured, Whole
from diffprune_plugin.planning.allocated import LatencyCosts, choices
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.plan import TIMED_WITHIN, GroupPlan, Latency, PruningPlan
from diffprune_plugin.planning.planner import share_of, strictly

ATTEMPTS = 3  # plans that are measured
NEXT = 2  # larger widths that each is compared with
Planned = Sequence[GroupPlan]
Planner = Callable[[PlanOptions, LatencyCosts], PruningPlan]


@dataclass
class Meeting:
    """A latency that is being met; ``plan`` makes the plan of options by what latency costs."""

    options: PlanOptions
    structures: Structures
    table: Table
    costs: LatencyCosts
    whole: Whole
    plan: Planner
    max_ms: float | None = None
    known: dict[tuple[int, ...], float] = field(default_factory=dict)

    def run(self) -> PruningPlan:
        """The plan whose measured latency is nearest to the target, of at most `ATTEMPTS`, with what was measured.

        Raises BadInput for a latency that cannot be reached, CheckFailed where noise hides what is asked, and with
        ``strict`` where it is missed.
        """
        share = self.share()
        bound, found = share, list[tuple[PruningPlan, float, Measured]]()
        while len(found) < ATTEMPTS:
            plan = self.without_slower(bound, first=not found)
            if plan is None or any(plan.groups == before.groups for before, _, _ in found):
                break
            predicted = self.predicted(plan)
            measured = checked(self.whole(self.structures.shrunk(plan.groups)))
            found.append((plan, predicted, measured))
            if abs(measured.share[0] - share) <= TIMED_WITHIN * share:
                break
            bound = aimed([(predicted, measured.share[0]) for _, predicted, measured in found], share)
        plan, predicted, measured = min(found, key=lambda one: abs(one[2].share[0] - share))
        return self.described(plan, share, predicted, measured, len(found))

    def share(self) -> float:
        """The target as a share of the dense model's latency, which is measured where milliseconds are asked for."""
        if self.options.latency_target is not None:
            return self.options.latency_target
        milliseconds = self.options.max_latency_ms or 0.0
        dense = checked(self.whole(self.structures.bare))
        if milliseconds >= dense.dense_ms:
            raise BadInput(f"max_latency_ms: {milliseconds:g}: the dense model takes {dense.dense_ms:.3g} ms already")
        self.max_ms = milliseconds
        return milliseconds / dense.dense_ms

    def without_slower(self, bound: float, first: bool) -> PruningPlan | None:
        """The plan within a predicted share, no group at a width that is no faster than a larger one.

        None if there is none, unless it is the ``first``: then BadInput.
        """
        changes = {"latency_target": bound, "max_latency_ms": None, "strict": False}
        options = self.options.model_copy(update=changes)
        plan = None
        while True:  # each time round at least one width is left out for good
            try:
                plan = self.plan(options, self.costs)
            except BadInput as error:
                if plan is not None or not first:
                    return plan
                raise self.in_its_words(error) from None
            slower = self.slower(plan) if plan.allocation and len(options.target) == 1 else {}
            if not slower:
                return plan
            kept = self.costs.slower
            more = {root: kept.get(root, frozenset()) | {count} for root, count in slower.items()}
            self.costs = replace(self.costs, slower={**kept, **more})

    def in_its_words(self, error: BadInput) -> BadInput:
        """An error of a plan's share, where milliseconds were asked for."""
        if self.max_ms is None:
            return error
        share = str(error).removeprefix("latency_target: ")
        return BadInput(f"max_latency_ms: {self.max_ms:g}: as a share of the dense model's latency, {share}")

    def slower(self, plan: PruningPlan) -> dict[str, int]:
        """The groups, with what they lose, that would be as fast at a larger width, the others as they are planned."""
        widths, variants = choices(self.structures.material.items, self.options, MOST), dict[int, list[Planned]]()
        for place, (group, of) in enumerate(zip(plan.groups, widths, strict=True)):
            larger = sorted(count for count in of if count < len(group.removed))[-NEXT:]
            variants[place] = [(*plan.groups[:place], of[count], *plan.groups[place + 1 :]) for count in larger]
        times = self.times([plan.groups, *(planned for of in variants.values() for planned in of)])
        now = times[counts(plan.groups)]
        found = [place for place, of in variants.items() if any(times[counts(planned)] <= now for planned in of)]
        return {plan.groups[place].root: len(plan.groups[place].removed) for place in found}

    def times(self, wanted: Sequence[Planned]) -> dict[tuple[int, ...], float]:
        """The sum of pieces of each of these plans, measured where it was not yet, by what its groups lose."""
        new = {
            counts(planned): self.structures.pieces(planned) for planned in wanted if counts(planned) not in self.known
        }
        self.table.measure((piece for of in new.values() for piece in of), "widths around the plan")
        self.known |= {key: self.table.total(pieces) for key, pieces in new.items()}
        return self.known

    def predicted(self, plan: PruningPlan) -> float:
        """The share by the column that the plan was made with."""
        material = self.structures.material
        return share_of(material.items, material.costs, self.costs)(counts(plan.groups))

    def described(
        self, plan: PruningPlan, share: float, predicted: float, measured: Measured, attempts: int
    ) -> PruningPlan:
        latency = Latency(
            **self.whole.facts,
            predicted=predicted,
            measured=measured.share,
            noise=measured.noise,
            dense_ms=measured.dense_ms,
            max_ms=self.max_ms,
            attempts=attempts,
        )
        found = plan.model_copy(update={"target": {**plan.target, "latency_target": share}, "latency": latency})
        return strictly(found, self.options)


def aimed(seen: Sequence[tuple[float, float]], share: float) -> float:
    """The predicted share that is to be measured as ``share``, by the plans (predicted, measured) seen so far.

    Between the nearest one above and the nearest below on the straight line; else the nearest one's ratio.
    """
    above = min((pair for pair in seen if pair[1] >= share), key=lambda pair: pair[1], default=None)
    below = max((pair for pair in seen if pair[1] < share), key=lambda pair: pair[1], default=None)
    if above and below:
        part = (share - below[1]) / (above[1] - below[1])
        return below[0] + part * (above[0] - below[0])
    nearest = min(seen, key=lambda pair: abs(pair[1] - share))
    return min(share * nearest[0] / nearest[1], 1.0)


def counts(planned: Planned) -> tuple[int, ...]:
    """What each group loses."""
    return tuple(len(group.removed) for group in planned)


def checked(measured: Measured) -> Measured:
    """Raises CheckFailed where the dense model against itself is as uncertain as what is to be told apart."""
    low, high = measured.noise
    if measured.noisy:
        raise CheckFailed(
            f"latency_target: the machine is too noisy: the dense model against itself is [{low:.3f}, {high:.3f}], "
            f"wider than the ±{TIMED_WITHIN:.0%} that a latency is met within; stop other work on it and try again"
        )
    return measured
