"""Where channels go as a picture: the widths of every group, before and after, and what each width would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffprune_plugin.planning.plan import GroupPlan, PruningPlan
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.optional import need_pyplot

COLUMNS = 24  # of the heat map: shares of a group's units that go
NAMED = 80  # groups at most that have their names beside them
Errors = Mapping[str, Mapping[int, float]]  # by root layer, and by how many units go


def plot_widths(plan: PruningPlan, order: Sequence[str], path: Path, errors: Errors | None = None) -> None:
    """Widths of the dense and the pruned model, group by group in the ``order`` of execution of all layers, as PNG.

    With ``errors`` a heat map beside it: what each width would cost by itself, the chosen ones marked. Raises
    MissingExtra without matplotlib.
    """
    pyplot = need_pyplot()
    place = {name: number for number, name in enumerate(order)}
    groups = sorted(plan.groups, key=lambda group: place.get(group.root, len(place)))
    height = min(1.5 + 0.19 * len(groups), 40)
    columns = 2 if errors else 1
    figure, axes = pyplot.subplots(
        1, columns, figsize=(5 + 4 * (columns - 1), height), layout="constrained", squeeze=False, sharey=True
    )
    bars(axes[0][0], groups)
    if errors:
        image = heat_map(axes[0][1], groups, errors)
        figure.colorbar(image, ax=axes[0][1], label="error of this cut alone")
    for level in levels(groups):
        for each in axes[0]:
            each.axhline(level - 0.5, color="black", lw=0.5)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def bars(axes: Any, groups: Sequence[GroupPlan]) -> None:
    """A bar a group: its channels, and on it those that are left."""
    rows = np.arange(len(groups))
    dense = [group.units * group.pairs for group in groups]
    left = [(group.units - len(group.removed)) * group.pairs for group in groups]
    axes.barh(rows, dense, color="lightgrey", label="dense")
    axes.barh(rows, left, color="tab:blue", label="left")
    names = [group.root for group in groups] if len(groups) <= NAMED else []
    axes.set_yticks(rows if names else [], names, fontsize=7)
    axes.set(xlabel="channels", ylim=(len(groups) - 0.5, -0.5))
    axes.legend(fontsize=7, loc="lower right")


def heat_map(axes: Any, groups: Sequence[GroupPlan], errors: Errors) -> Any:
    """A row a group, a column a share of its units that goes; the colour is the error, and a cross what was chosen."""
    from matplotlib.colors import LogNorm

    edges = (np.arange(COLUMNS) + 0.5) / COLUMNS
    table = np.full((len(groups), COLUMNS), np.nan)
    for row, group in enumerate(groups):
        known = sorted(errors[group.root].items())
        if len(known) > 1:
            shares = np.array([count / group.units for count, _ in known])
            nearest = np.abs(edges[:, None] - shares).argmin(1)
            inside = edges < shares[-1] + 0.5 / COLUMNS
            table[row, inside] = np.array([error for _, error in known])[nearest[inside]]
    positive = table[np.isfinite(table) & (table > 0)]
    norm = LogNorm(positive.min(), positive.max()) if positive.size else None
    image = axes.imshow(
        np.where(table > 0, table, np.nan), aspect="auto", norm=norm, extent=(0, 1, len(groups) - 0.5, -0.5)
    )
    chosen = [(len(group.removed) / group.units, row) for row, group in enumerate(groups)]
    axes.plot(*zip(*chosen, strict=True), "x", color="red", ms=5, label="chosen", clip_on=False)
    axes.set(xlabel="share of the units that goes")
    axes.legend(fontsize=7, loc="lower right")
    return image


def levels(groups: Sequence[GroupPlan]) -> list[int]:
    """Rows at which another level of the model begins: down_blocks.1 after down_blocks.0."""
    names = [".".join(group.root.split(".")[:2]) for group in groups]
    return [row for row in range(1, len(names)) if names[row] != names[row - 1]]
