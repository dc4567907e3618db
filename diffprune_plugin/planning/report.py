"""Plans, curves and images for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from diffprune_plugin.planning.plan import GroupPlan, PruningPlan

if TYPE_CHECKING:
    pass

COLUMNS = ("layer", "before", "after", "coupled to it", "left as it is, or less, because")


def plan_rows(plan: PruningPlan) -> list[tuple[str, str, str, str, str]]:
    """One row a coupled group: root layer, its channels before and after, what is coupled, what was skipped and why."""
    return [(g.root, *channels(g), coupled(g.layers[1:]), g.reason) for g in plan.groups]


def channels(group: GroupPlan) -> tuple[str, str]:
    return str(group.units * group.pairs), str((group.units - len(group.removed)) * group.pairs)


def coupled(layers: Sequence[str]) -> str:
    """The first layers by name, and how many more."""
    shown = ", ".join(layers[:2])
    return f"{shown} and {len(layers) - 2} more" if len(layers) > 2 else shown


def plan_table(plan: PruningPlan) -> Table:
    """The plan for a terminal."""
    table = Table(*COLUMNS, title=summary(plan))
    for row in plan_rows(plan):
        table.add_row(*map(escape, row))
    return table


def plan_markdown(plan: PruningPlan) -> str:
    """The plan as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, ("---",) * len(COLUMNS), *plan_rows(plan))]
    return "\n".join(lines)


def summary(plan: PruningPlan) -> str:
    """Params and MACs before and after in one line."""
    return f"{size_change('params', plan.params)}, {size_change('MACs', plan.macs)}"


def size_change(what: str, sizes: tuple[int, int]) -> str:
    before, after = sizes
    return f"{quantity(before)} -> {quantity(after)} {what} (-{1 - after / before:.1%})"


def quantity(number: int) -> str:
    """12345678 as '12.35 M'."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
