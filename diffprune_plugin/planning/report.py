"""Plans for people to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from diffprune_plugin.planning.plan import BlockChoice, GroupPlan, PruningPlan

SHOWN = 2  # of the layers coupled to one
INDENT = " " * 14
COLUMNS = ("layer", "before", "after", "coupled to it", "left as it is, or less, because")


def plan_rows(plan: PruningPlan) -> list[tuple[str, str, str, str, str]]:
    """One row a coupled group: root layer, its channels before and after, what is coupled, what was skipped and why."""
    return [(g.root, *channels(g), coupled(g.layers[1:]), g.reason) for g in plan.groups]


def channels(group: GroupPlan) -> tuple[str, str]:
    return str(group.units * group.pairs), str((group.units - len(group.removed)) * group.pairs)


def coupled(layers: Sequence[str]) -> str:
    """The first layers by name, and how many more."""
    shown, more = shortened(layers)
    return " and ".join(filter(None, [", ".join(shown), more]))


def shortened(layers: Sequence[str]) -> tuple[Sequence[str], str]:
    """The first layers, and in words how many more."""
    return layers[:SHOWN], f"{len(layers) - SHOWN} more" if len(layers) > SHOWN else ""


def plan_text(plan: PruningPlan, width: int) -> str:
    """The plan for a terminal: a line a name, which nothing breaks; what is coupled and why below each root layer."""
    lines = [summary(plan), "", "before after  layer, + what is coupled to it, and why it stays or loses less"]
    if plan.depth:
        lines.insert(0, f"depth: {len(plan.depth)} blocks go first, sizes are of what is left: {', '.join(plan.depth)}")
    if plan.blocks:
        lines.insert(1, chosen(plan.blocks))
    for group in plan.groups:
        before, after = channels(group)
        shown, more = shortened(group.layers[1:])
        below = [f"+ {name}" for name in (*shown, more) if name]
        lines.append(f"{before:>6} {after:>5}  {group.root}")
        lines += [INDENT + line for line in [*below, *whole_words(group.reason, width - len(INDENT))]]
    return "\n".join(lines)


def chosen(blocks: BlockChoice) -> str:
    """In one line what blocks were chosen from."""
    size = f"{quantity(blocks.params)} params, {quantity(blocks.macs)} MACs"
    errors = ", ".join(f"{name} {error:.2g}" for name, error in blocks.errors.items())
    return f"       chosen of a model of {size}, by the predicted error of removing each: {errors}"


def whole_words(text: str, width: int) -> list[str]:
    """A text in lines of a width; a word that is longer, a layer's name say, has a longer line."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


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


def error_text(error: float | None) -> str:
    """An error for people; None, as JSON has one without an end, is not finite."""
    return "not finite" if error is None else f"{error:.1e}"
