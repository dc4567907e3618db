"""What every budget would cost: the predicted error of the output against size, allocated and by one ratio."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.planning.planner import Material, plan_from
from diffprune_plugin.pruning.removal import remove_
from diffprune_plugin.recovery.compensate import compensate_
from diffprune_plugin.sensitivity.sensitivity import Sensitivity
from diffprune_plugin.sensitivity.trials import Look
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.optional import need_pyplot

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
WAYS = ("uniform", "linear")


@dataclass(frozen=True)
class Point:
    """One budget met in one way: shares of the dense MACs and parameters that are left, and the error of the output.

    predicted: summed over the groups, as a share of the output's mean square; measured: after removal and compensation,
    likewise, of fresh samples; None where it was not measured.
    """

    allocation: str
    asked: float
    macs: float
    params: float
    predicted: float
    measured: float | None = None


@dataclass(frozen=True)
class Frontier:
    """The points, and the plan of each."""

    target: str
    points: tuple[Point, ...]
    plans: tuple[PruningPlan, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"target": self.target, "points": [asdict(point) for point in self.points]}

    def table(self) -> Table:
        """For a terminal: a row a budget, both ways beside each other."""
        table = Table(self.target, "MACs", "params", "uniform", "allocated", title="predicted error of the output")
        for share in dict.fromkeys(point.asked for point in self.points):
            of = {point.allocation: point for point in self.points if point.asked == share}
            sizes = of.get("linear") or of["uniform"]
            errors = [told(of[way]) if way in of else "cannot" for way in WAYS]
            table.add_row(f"{share:g}", f"{sizes.macs:.1%}", f"{sizes.params:.1%}", *errors)
        return table

    def plot(self, path: Path) -> None:
        """As PNG: error against the share of the MACs; crosses are measured. Raises MissingExtra without matplotlib."""
        pyplot = need_pyplot()
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for way, colour in zip(WAYS, ("tab:grey", "tab:blue"), strict=True):
            points = [point for point in self.points if point.allocation == way]
            seen = [point for point in points if point.measured is not None]
            predicted = [point.predicted for point in points]
            axes.plot([p.macs for p in points], predicted, ".-", color=colour, label=f"{way}, predicted")
            if seen:
                measured = [point.measured for point in seen]
                axes.plot([p.macs for p in seen], measured, "x", color=colour, label=f"{way}, measured")
        axes.set(xlabel="MACs left", ylabel="error, share of the output's mean square", yscale="log")
        axes.legend()
        with new_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        pyplot.close(figure)


def told(point: Point) -> str:
    """A point's error in a cell."""
    return f"{point.predicted:.2%}" + ("" if point.measured is None else f" ({point.measured:.2%} measured)")


def frontier(
    material: Material, options: PlanOptions, sensitivity: Sensitivity, shares: Sequence[float] = SHARES
) -> Frontier:
    """The points of these shares of the dense size, for the target that the options have, else MACs.

    Budgets that cannot be met have no point. ``options``: their target and allocation are replaced.
    """
    target = next(iter(options.target), "macs_target")
    points, plans = [], []
    for share in shares:
        for way in WAYS:
            changes = {"pruning_ratio": None, "macs_target": None, "params_target": None, "allocation": way}
            asked = PlanOptions.make({**asked_of(options), **changes, target: share}, "frontier")
            try:
                plan = plan_from(material, asked, sensitivity=sensitivity)
            except BadInput:
                continue
            error = sum(sensitivity.error(group.root, group.removed) for group in plan.groups) / sensitivity.power
            macs, params = (after / before for before, after in (plan.macs, plan.params))
            points.append(Point(way, share, macs, params, error))
            plans.append(plan)
    return Frontier(target, tuple(points), tuple(plans))


def asked_of(options: PlanOptions) -> dict[str, Any]:
    """The options of a plan alone, whatever else a config holds."""
    return {key: getattr(options, key) for key in PlanOptions.model_fields}


def verified(
    found: Frontier,
    count: int,
    model: nn.Module,
    scheduler: Any,
    samples: Samples,
    adapter: ModelAdapter,
    seed: int = 0,
    progress: bool = True,
) -> Frontier:
    """With ``count`` budgets really pruned and compensated, both ways, and measured on fresh samples."""
    shares = list(dict.fromkeys(point.asked for point in found.points))
    chosen = {shares[(2 * i + 1) * len(shares) // (2 * count)] for i in range(min(count, len(shares)))}
    look = Look(model, scheduler, samples, adapter, seed)
    points = []
    for point, plan in zip(found.points, found.plans, strict=True):
        if point.asked in chosen:
            small = copy.deepcopy(model)
            remove_(small, plan)
            compensate_(small, model, plan, scheduler, samples, seed=seed, progress=progress)
            point = replace(point, measured=look.error(small) / look.power)
        points.append(point)
    return replace(found, points=tuple(points))
