"""What `diffprune prune` and `diffprune frontier` write with --report: one HTML file each."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from diffprune_plugin.utils.html_report import markdown_of, write_report

if TYPE_CHECKING:
    from diffprune_plugin.config.pruning import PruningConfig
    from diffprune_plugin.recovery.compensate import CompensationReport
    from diffprune_plugin.sensitivity.frontier import Frontier
    from diffprune_plugin.workflow import Pruned


def write_pruning(path: Path, config: PruningConfig, result: Pruned) -> None:
    """The plan, what the calibration saw and what the compensation brought, to a file."""
    from diffprune_plugin.calibration.plot import plot_curve
    from diffprune_plugin.planning.report import plan_markdown, summary
    from diffprune_plugin.utils.optional import has

    plan, calibration, compensation = result.plan, result.calibration, result.compensation
    parts = [f"# {config.model}, pruned", f"{summary(plan)}."]
    parts += [f"- {shortfall}" for shortfall in plan.shortfalls()]
    with tempfile.TemporaryDirectory() as folder:
        if calibration and has("matplotlib"):
            plot_curve(calibration, Path(folder) / "loss_curve.png")
            parts += ["## Which timesteps count", "![loss at each timestep](loss_curve.png)"]
        if has("matplotlib"):
            result.plot(Path(folder) / "widths.png")
            parts += ["## Where the channels went", "![widths before and after](widths.png)"]
        parts += ["## Layers", plan_markdown(plan)]
        if compensation:
            parts += ["## Compensation", "| layers | error before | after |\n|---|---|---|\n" + repairs(compensation)]
        parts += [f"Plan {plan.sha256[:12]}, criterion {plan.criterion['name']}, seed {config.seed}."]
        write_report(path, f"{config.model}, pruned", "\n\n".join(parts), Path(folder))


def repairs(report: CompensationReport) -> str:
    """A row a regression: the layers that it refits, its error on held-out images before and after."""
    return "\n".join(f"| {', '.join(one.layers)} | {one.before:.4f} | {one.after:.4f} |" for one in report.repairs)


def write_frontier(path: Path, found: Frontier) -> None:
    """The picture and the table of what every budget would cost, to a file."""
    table = found.table() if found.dense_ms is None else found.timed_table()
    with tempfile.TemporaryDirectory() as folder:
        found.plot(Path(folder) / "frontier.png")
        parts = ["# What every budget would cost", "![error against size](frontier.png)", markdown_of(table)]
        write_report(path, "What every budget would cost", "\n\n".join(parts), Path(folder))
