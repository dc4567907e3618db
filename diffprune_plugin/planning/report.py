"""Plans, curves and images for people to look at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.markup import escape
from rich.table import Table

from diffprune_plugin.errors import MissingExtra
from diffprune_plugin.planning.plan import GroupPlan, PruningPlan
from diffprune_plugin.utils.files import new_file

if TYPE_CHECKING:
    from diffprune_plugin.calibration.calibration import Calibration

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


def pyplot_or_missing() -> Any:
    """matplotlib's pyplot, drawing into files; raises MissingExtra without it."""
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("matplotlib", "eval") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_curve(calibration: Calibration, path: Path) -> None:
    """The loss at each timestep with its standard error, and the threshold that decides which timesteps count.

    Raises MissingExtra without matplotlib.
    """
    pyplot = pyplot_or_missing()
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    points = (calibration.timesteps, calibration.loss, calibration.stderr)
    axes.errorbar(*points, fmt=".-", ms=3, lw=0.8, label="loss L_t, standard error")
    level = calibration.sweep.threshold * calibration.loss.max()
    label = f"threshold {calibration.sweep.threshold} x largest"
    axes.axhline(level, color="tab:red", lw=1, label=label)
    half = float(np.diff(calibration.timesteps).mean()) / 2 if len(calibration.timesteps) > 1 else 0.5
    for timestep in calibration.timesteps[calibration.counts]:
        axes.axvspan(timestep - half, timestep + half, color="tab:green", alpha=0.15, lw=0)
    axes.set(xlabel="timestep t", ylabel="noise-prediction loss", yscale="log")
    axes.set_title(f"{int(calibration.counts.sum())} of {len(calibration.counts)} points count (green)")
    axes.legend()
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def loss_plot(curve: Mapping[str, Sequence[float]]) -> bytes:
    """A training's loss and its terms at each step, and their running means, as PNG.

    Raises MissingExtra without matplotlib.
    """
    pyplot = pyplot_or_missing()
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for colour, (name, values) in enumerate(curve.items()):
        steps = np.arange(1, len(values) + 1)
        window = max(len(values) // 20, 1)
        means = np.convolve(values, np.ones(window) / window, "valid")
        axes.plot(steps, values, color=f"C{colour}", alpha=0.25, lw=0.6)
        axes.plot(steps[window - 1 :], means, color=f"C{colour}", lw=1.2, label=f"{name}, mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    pyplot.close(figure)
    return image.getvalue()


def image_grid(rows: Mapping[str, Sequence[Image.Image]], scale: int = 2) -> Image.Image:
    """Images in one row a name, written above the row."""
    tiles = {name: [np.asarray(image.convert("RGB")) for image in images] for name, images in rows.items()}
    height, width = next(iter(tiles.values()))[0].shape[:2]
    margin, caption = 2, 14
    columns = max(len(row) for row in tiles.values())
    cell = (width * scale + margin, height * scale + margin)
    grid = Image.new("RGB", (columns * cell[0] + margin, len(tiles) * (cell[1] + caption) + margin), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for line, (name, row) in enumerate(tiles.items()):
        top = line * (cell[1] + caption)
        draw.text((margin, top), name, fill="black", font=font)
        for column, tile in enumerate(row):
            image = Image.fromarray(tile).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            grid.paste(image, (margin + column * cell[0], top + caption))
    return grid


def save_image(image: Image.Image, path: Path) -> None:
    """As PNG, atomically."""
    with new_file(path) as temporary:
        image.save(temporary, format="PNG")


def pil_images(batch: Any) -> list[Image.Image]:
    """A pipeline's images (count, height, width, channels) in [0, 1] as PIL images."""
    pixels = (np.asarray(batch) * 255).round().astype(np.uint8)
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
