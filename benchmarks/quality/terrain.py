"""A model that others trained and published as ONNX alone, by the commands of the README, judged by its own client.

    pip install --no-deps adaptive-terrain-diffusion==0.4.2
    python benchmarks/bench.py terrain

examples/terrain reads PyPI's adaptive-terrain-diffusion into torch; the commands prune, compensate and export it; the
package's own generator then draws with the exported file in the place of its own, from the same noise.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
import yaml
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import spearmanr
from shared.results import RESULTS, RUNS, mean, publish, some_shares, table
from torchmetrics.functional.image import structural_similarity_index_measure

from diffprune_plugin import load
from diffprune_plugin.export import to_onnx
from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.utils.images import image_grid, save_image

WORK = RUNS / "terrain"
# Calibrated with few samples: one of 128 x 128 takes seconds on a core.
CALIBRATION = {
    "timesteps": 50,
    "batch_size": 8,
    "importance": {"name": "diff_taylor", "samples": 96, "curve_samples": 1},
}
PUBLISHED, PRUNED, COMPENSATED = "published file", "pruned", "pruned and compensated"
Heights = NDArray[np.float32]


def command(*words: str) -> None:
    """Run one of this environment's commands in the work directory."""
    subprocess.run([str(Path(sys.executable).parent / words[0]), *words[1:]], cwd=WORK, check=True)


def made(row: str, ratio: float) -> tuple[Path, Path]:
    """The directory and the exported file of a model; the command proves and times that of the compensated one."""
    name = f"{'compensated' if row == COMPENSATED else 'pruned'}-{ratio}"
    directory, file = WORK / name, WORK / f"{name}.onnx"
    if not directory.exists():
        values = {"model": "model", "output": name, "data": "data.safetensors", "calibration": "calibration"}
        values |= {"pruning_ratio": ratio, "compensate": row == COMPENSATED, **CALIBRATION}
        (WORK / f"{name}.yaml").write_text(yaml.safe_dump(values))
        command("diffprune", "prune", f"{name}.yaml")
    if not file.exists() and row == COMPENSATED:
        less = ("--rounds", "5")  # than by default: minutes
        command("diffprune-export", file.name, "--model", f"{name}/unet", "--baseline", "model/unet", *less)
    elif not file.exists():
        to_onnx(load(directory), file)
    return directory, file


def drawn(file: Path | None, count: int) -> tuple[Heights, NDArray[np.int64]]:
    """Terrains (count, 128, 128) in metres, and their difficulties; without a file, the package's own."""
    from terrain_diffusion import TerrainGenerator

    generator, difficulties = TerrainGenerator(file, device="cpu"), np.linspace(1, 100, count).astype(int)
    return generator.generate(count, difficulty=difficulties, seed=0), difficulties


def compared(terrains: Heights, reference: Heights, difficulties: NDArray[np.int64]) -> dict[str, list[float]]:
    """By terrain the mean difference in metres, SSIM, and steepness; how that follows the difficulty is one number."""
    highest = float(reference.max())
    pairs = zip(torch.from_numpy(terrains)[:, None, None], torch.from_numpy(reference)[:, None, None], strict=True)
    ssim = [float(torch.as_tensor(structural_similarity_index_measure(a, b, data_range=highest))) for a, b in pairs]
    steepness = np.abs(np.gradient(terrains, axis=(1, 2))).mean((0, 2, 3))
    return {
        "difference": np.abs(terrains - reference).mean((1, 2)).tolist(),
        "ssim": ssim,
        "steepness": steepness.tolist(),
        "order": [float(spearmanr(steepness, difficulties).statistic)],
    }


def shaded(terrain: Heights) -> Image.Image:
    """A terrain lit from the upper left, brighter where it is higher."""
    down, right = np.gradient(terrain * 4)
    light = (down + right + 1) / np.sqrt(3 * (down**2 + right**2 + 1))
    height = terrain / max(float(terrain.max()), 1e-6)
    return Image.fromarray((np.clip(0.65 * np.clip(light, 0, 1) + 0.35 * height, 0, 1) * 255).astype(np.uint8))


def main(
    ratios: Annotated[str, typer.Option(**some_shares("pruning ratios"))] = "0.3",
    count: Annotated[int, typer.Option(help="terrains, of difficulties from 1 to 100")] = 24,
) -> None:
    """Make what is missing, then print the table and draw the picture."""
    WORK.mkdir(parents=True, exist_ok=True)
    if not (WORK / "data.safetensors").exists():
        command("python", "-m", "diffprune_terrain.read", ".")
    files: dict[str, Path | None] = {PUBLISHED: None}
    macs = {}
    for ratio, row in itertools.product(map(float, ratios.split(",")), (PRUNED, COMPENSATED)):
        directory, files[f"{row}, ratio {ratio}"] = made(row, ratio)
        macs[f"{row}, ratio {ratio}"] = read_plan(directory).macs
    results = {row: drawn(file, count) for row, file in files.items()}
    reference, difficulties = results[PUBLISHED]
    rows, pictures = [], {}
    for row, (terrains, _) in results.items():
        found = compared(terrains, reference, difficulties)
        share = f"{macs[row][1] / macs[row][0]:.0%}" if row in macs else ""
        cells = [mean(found[key], 3) for key in ("difference", "ssim", "steepness", "order")]
        rows.append([row, share, *cells])
        pictures[row] = [shaded(terrain) for terrain in terrains[:: max(count // 8, 1)]]
    save_image(image_grid(pictures, scale=1), RESULTS / "terrain.png")
    head = ["model", "MACs", "difference, m", "SSIM", "steepness, m", "order by difficulty"]
    text = f"Mean and standard error over {count} terrains of the package's generator, difficulties 1 to 100, seed 0; "
    text += f"heights to {reference.max():.1f} m. Order: Spearman's correlation of steepness and difficulty."
    publish("terrain", [text, "", *table(head, rows)])
