"""What every budget would cost: the predicted error of the output against size, allocated and by one ratio."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.diffusion.schedulers import training_scheduler
from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.allocated import LatencyCosts
from diffprune_plugin.planning.options import BUDGETS, LATENCIES, PlanOptions
from diffprune_plugin.planning.plan import TARGETS, WITHIN, PruningPlan
from diffprune_plugin.planning.planner import Material, plan_from, share_of
from diffprune_plugin.pruning.index import INDEX_FILE
from diffprune_plugin.pruning.removal import remove_
from diffprune_plugin.sensitivity.sensitivity import Sensitivity
from diffprune_plugin.sensitivity.trials import Look
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.optional import need_pyplot

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
WAYS = ("uniform", "linear")
TIMED = "latency"  # the way that spends a latency instead of the size
COLOURS = {"uniform": "tab:grey", "linear": "tab:blue", TIMED: "tab:orange"}


@dataclass(frozen=True)
class Point:
    """One budget met in one way: shares of the dense MACs and parameters that are left, and the error of the output.

    predicted: summed over the groups, as a share of the output's mean square; measured: after removal, and compensation
    where the config has one, likewise, of fresh samples; None where it was not measured. latency: the share of the
    dense model's by the sum of pieces, latency_measured: that of the whole file; None where no runtime was asked for.
    """

    allocation: str
    asked: float
    macs: float
    params: float
    predicted: float
    measured: float | None = None
    latency: float | None = None
    latency_measured: float | None = None


@dataclass(frozen=True)
class Frontier:
    """The points, and the plan of each; dense_ms: the dense model's latency in milliseconds, where it was measured;
    shares: the budgets, also those that cannot be met.
    """

    target: str
    points: tuple[Point, ...]
    plans: tuple[PruningPlan, ...]
    dense_ms: float | None = None
    shares: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        points = [asdict(point) for point in self.points]
        return {"target": self.target, "shares": list(self.shares), "dense_ms": self.dense_ms, "points": points}

    def timed_table(self) -> Table:
        """For a terminal: a row a point, by latency; what was measured stands in brackets."""
        title = f"error of the output by latency (dense: {self.dense_ms or 0:.3g} ms)"
        table = Table("latency", "ms", "allocation", "MACs", "params", "error", title=title)
        for point in sorted(self.points, key=lambda point: -(point.latency or 0)):
            share, seen = point.latency or 0.0, point.latency_measured
            told_share = f"{share:.1%}" + ("" if seen is None else f" ({seen:.1%})")
            milliseconds = f"{(share if seen is None else seen) * (self.dense_ms or 0):.3g}"
            table.add_row(
                told_share, milliseconds, point.allocation, f"{point.macs:.1%}", f"{point.params:.1%}", told(point)
            )
        return table

    def table(self) -> Table:
        """For a terminal: a row a budget, both ways beside each other, with the size of one that misses the budget."""
        table = Table(self.target, "MACs", "params", "uniform", "allocated", title="predicted error of the output")
        for share in self.shares:
            of = {point.allocation: point for point in self.points if point.asked == share}
            sizes = of.get("linear") or of.get("uniform")
            left = (f"{sizes.macs:.1%}", f"{sizes.params:.1%}") if sizes else ("", "")
            table.add_row(f"{share:g}", *left, *(self.cell(of.get(way)) for way in WAYS))
        return table

    def cell(self, point: Point | None) -> str:
        """A point's error, and where it misses its budget what it leaves."""
        if point is None:
            return "cannot"
        left = getattr(point, TARGETS[self.target])
        return told(point) + ("" if abs(left - point.asked) <= WITHIN * point.asked else f" at {left:.1%}")

    def plot(self, path: Path) -> None:
        """As PNG: error against the share of the MACs, or against milliseconds where they are known; crosses are
        measured. Raises MissingExtra without matplotlib.
        """
        pyplot = need_pyplot()
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for way, colour in COLOURS.items():
            points = sorted((p for p in self.points if p.allocation == way), key=self.across)
            seen = [point for point in points if point.measured is not None]
            for kind, of, style in (("predicted", points, ".-"), ("measured", seen, "x")):
                if of:
                    across = [self.across(point, measured=kind == "measured") for point in of]
                    axes.plot(across, [getattr(p, kind) for p in of], style, color=colour, label=f"{way}, {kind}")
        xlabel = "MACs left" if self.dense_ms is None else "milliseconds"
        axes.set(xlabel=xlabel, ylabel="error, share of the output's mean square", yscale="log")
        axes.legend()
        with new_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        pyplot.close(figure)

    def across(self, point: Point, measured: bool = False) -> float:
        """Where a point stands on the horizontal axis."""
        if self.dense_ms is None or point.latency is None:
            return point.macs
        return self.dense_ms * (point.latency_measured if measured and point.latency_measured else point.latency)


def told(point: Point) -> str:
    """A point's error in a cell."""
    return f"{point.predicted:.2%}" + ("" if point.measured is None else f" ({point.measured:.2%} measured)")


def frontier(
    material: Material,
    options: PlanOptions,
    sensitivity: Sensitivity,
    shares: Sequence[float] = SHARES,
    latency: LatencyCosts | None = None,
) -> Frontier:
    """The points of these shares of the dense size, for the size that the options have as target, else MACs.

    Budgets that cannot be met have no point. ``options``: their target and allocation are replaced, and a budget that
    the steps of groups miss is no error. ``latency``: each point gets its own, and the same shares of the latency are
    points too. Raises BadInput where no budget can be met.
    """
    sizes = [key for key in options.target if key not in LATENCIES] or ["macs_target"]
    if len(sizes) > 1:
        raise BadInput(f"frontier: its budgets are of one size, not of {' and '.join(sizes)}; give one of them")
    target = sizes[0]
    free = {"pruning_ratio": None, **dict.fromkeys(BUDGETS), "strict": False}
    timed = share_of(material.items, material.costs, latency) if latency else None
    points, plans, refused = [], [], ""
    for share, way in itertools.product(shares, (*WAYS, TIMED) if latency else WAYS):
        budget = (
            {"allocation": "linear", "latency_target": share} if way == TIMED else {"allocation": way, target: share}
        )
        asked = PlanOptions.make({**asked_of(options), **free, **budget}, "frontier")
        try:
            plan = plan_from(material, asked, sensitivity=sensitivity, latency=latency)
        except BadInput as reason:
            refused = str(reason)
            continue
        error = sum(sensitivity.error(group.root, group.removed) for group in plan.groups) / sensitivity.power
        macs, params = (after / before for before, after in (plan.macs, plan.params))
        took = timed([len(group.removed) for group in plan.groups]) if timed else None
        points.append(Point(way, share, macs, params, error, latency=took))
        plans.append(plan)
    if not points:
        raise BadInput(f"frontier: no budget can be met, not even {max(shares)}: {refused}")
    return Frontier(target, tuple(points), tuple(plans), shares=tuple(shares))


def check_frontier(config: PruningConfig, latency: bool) -> None:
    """Raises BadInput for what a config asks that has no frontier; ``latency``: whether it is one of latencies too."""
    folder = Path(config.model)
    if config.data is None or (folder.is_dir() and not (folder / INDEX_FILE).exists()):
        raise BadInput("frontier: needs 'data' and a pipeline directory as 'model', to measure cuts by; add them")
    if config.chooses_depth:
        raise BadInput("depth: auto has one budget, a frontier many; name the blocks or drop it")
    if config.timed and not latency:
        raise BadInput(
            "latency_target, max_latency_ms: a frontier is of sizes; add --latency (latency=True), or drop it"
        )
    if config.global_pruning:
        raise BadInput("global_pruning: true ranks groups together, a frontier weighs them one by one; drop it")


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
    seed: int,
    repair: Callable[..., object] | None,
    timer: Callable[[PruningPlan], float] | None = None,
) -> Frontier:
    """With ``count`` budgets, all there are at most, really pruned, all ways, and measured on fresh samples.

    repair: compensates a pruned model, given the dense one, the plan, scheduler and samples; None leaves it as it is.
    timer: gives the share of the dense model's latency that the whole of a plan's model takes.
    """
    shares = list(dict.fromkeys(point.asked for point in found.points))
    count = min(count, len(shares))
    chosen = {shares[(2 * i + 1) * len(shares) // (2 * count)] for i in range(count)}
    samples, scheduler = fitting(samples, model, adapter, scheduler), training_scheduler(scheduler)
    look = Look(model, scheduler, samples, adapter, seed)
    points = []
    for point, plan in zip(found.points, found.plans, strict=True):
        if point.asked in chosen:
            small = copy.deepcopy(model)
            remove_(small, plan)
            if repair is not None:
                repair(small, model, plan, scheduler, samples)
            took = timer(plan) if timer else None
            point = replace(point, measured=look.error(small) / look.power, latency_measured=took)
        points.append(point)
    return replace(found, points=tuple(points))
