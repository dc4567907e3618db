"""Images for people to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffprune_plugin.utils.files import new_file


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
